"""Looking at every image once before training: how many there are, and all that is wrong."""

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from unet_core.concurrency import Prefetch
from unet_core.config.train import TrainConfig
from unet_core.errors import ConfigError, RunMismatchError, StoppedError
from unet_core.runs.manifest import manifest_name
from unet_core.training import dataset
from unet_core.training.dataset import TRAIN, VAL, DatasetScan, Item, Split, Splits
from unet_core.training.feed import Order
from unet_core.training.ranks import Ranks
from unet_core.training.training_run import TrainingRun

AHEAD = 16
SHOWN = 5


def scan_dataset(
    splits: Splits, ranks: Ranks, pool: ThreadPoolExecutor, wants_stop: Callable[[], bool]
) -> DatasetScan:
    """Look at all images, each rank at its own shards; sets the counts of the splits.

    Raises ConfigError that names what cannot be used, StoppedError if someone asks for it; on every
    rank.
    """
    train, val = splits
    groups = [[train, val]] if train.input is val.input else [[train], [val]]

    def mine() -> DatasetScan:
        return _sum(_look(group, ranks, pool, wants_stop) for group in groups)

    found = _sum(ranks.gather(ranks.on_all(mine)))
    if 0 < val.high < 1 and not found.of(VAL) and found.of(TRAIN) > 1:
        just_above = math.nextafter(found.lowest_share, 1)  # few images: one validates
        dataset.split_at(splits, just_above)
        found = _sum(ranks.gather(ranks.on_all(mine)))
    for split in splits:
        shards = range(len(split.input.shards))
        split.counts = [found.images[split.name, shard] for shard in shards]
    _refuse_unusable(found, train)
    return found


def _look(
    splits: list[Split], ranks: Ranks, pool: ThreadPoolExecutor, wants_stop: Callable[[], bool]
) -> DatasetScan:
    source, found, left_out = splits[0].input, DatasetScan(), DatasetScan()
    by_name = {split.name: split for split in splits}

    def items() -> Iterator[Item]:
        for shard in range(ranks.rank, len(source.shards), ranks.count):
            yield from dataset.read_items(splits, shard, left_out)

    def look(item: Item) -> DatasetScan:
        try:
            image = by_name[item.key[0]].load(item)
        except ConfigError as error:
            return DatasetScan(unusable=[str(error)])
        seen = DatasetScan(
            Counter([item.key[:2]]), lowest_share=dataset.share_of(item.found.image_id)
        )
        if item.key[0] == TRAIN:
            labels, counts = np.unique(image.labels_HW, return_counts=True)
            seen.label_pixels.update(dict(zip(labels.tolist(), counts.tolist(), strict=True)))
        return seen

    with Prefetch(pool, look, items(), AHEAD) as looked:
        for seen in looked:
            if wants_stop():
                raise StoppedError("stopped while looking at the images")
            found += seen
    found += left_out
    return found


def _sum(parts: Iterable[DatasetScan]) -> DatasetScan:
    return functools.reduce(operator.iadd, parts, DatasetScan())


def _refuse_unusable(found: DatasetScan, train: Split) -> None:
    """Raise ConfigError for anything that would train another network than was meant."""
    problems = found.unusable[:SHOWN]
    if more := len(found.unusable) - len(problems):
        problems.append(f"and {more} more like these")
    if found.without_mask:
        shown = ", ".join(sorted(found.without_mask)[:SHOWN])
        problems.append(
            f"{len(found.without_mask)} images have no mask: {shown}; add them, or set "
            'on_missing_mask = "skip" or "background" there'
        )
    if problems:
        raise ConfigError("\n".join(problems))
    if not found.of(TRAIN) or not found.of(VAL):
        raise ConfigError(
            f"data: {found.of(TRAIN)} images for training and {found.of(VAL)} for validation; both "
            "need one: change data.val_fraction, or give data.val"
        )
    _refuse_single_class(found, train.input.config.ignore_index)


def _refuse_single_class(found: DatasetScan, ignore_index: int) -> None:
    labels = [value for value in found.label_pixels if value != ignore_index]
    if len(labels) > 1:
        return
    share = found.label_pixels[ignore_index] / max(1, found.label_pixels.total())
    way_out = "there is nothing to learn"
    if share:
        way_out = (
            f"{share:.0%} have the value {ignore_index}, which is ignored; if it means a class, "
            f"say data.train.label_map = {{{ignore_index} = 1}}"
        )
    only = labels[0] if labels else "none"
    raise ConfigError(f"data.train: every pixel that counts is of class {only}; {way_out}")


def scan(
    config: TrainConfig, run: TrainingRun, splits: Splits, ranks: Ranks, pool: ThreadPoolExecutor,
    wants_stop: Callable[[], bool],
) -> dict[str, Any]:  # fmt: skip
    """What ``run.json`` says of the data: looked at now, or recalled from the first session. Sets
    the counts of the splits; the first rank publishes.

    Raises RunMismatchError if the images changed since then, and what ``scan_dataset`` raises.
    """
    was_counted = ranks.on_first(lambda: run.store.exists(manifest_name(0)))
    if run.record and was_counted:
        data: dict[str, Any] = run.record["data"]
        if data["val_below"] < 1:
            dataset.split_at(splits, data["val_below"])
        ranks.on_all(lambda: run.recall_counts(splits))
        return data
    found = scan_dataset(splits, ranks, pool, wants_stop)
    train, val = splits
    classes = max(label for label in found.label_pixels if label != train.input.config.ignore_index)
    epoch = Order(config.train, train, 0)
    data = {
        TRAIN: train.images,
        VAL: val.images,
        "class_pixels": [found.label_pixels[label] for label in range(classes + 1)],
        "val_below": val.high,
        "steps": config.train.steps or config.train.epochs * epoch.steps,
    }

    def publish() -> dict[str, Any]:
        if not run.record:
            run.create_or_join(config, data)
        elif run.record["data"] != data:
            raise RunMismatchError(
                f"{run.store.uri()}: the images changed since the training began; restore them, or "
                "train into a new folder"
            )
        run.publish_manifest(splits)
        return data

    return ranks.on_first(publish)
