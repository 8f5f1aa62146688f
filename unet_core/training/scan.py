"""The scan of all images before training: counts per shard, label statistics, and every problem."""

import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from unet_core.concurrency import Prefetch
from unet_core.config.train import TrainConfig
from unet_core.errors import ConfigError, RunMismatchError, StoppedError
from unet_core.images.guard import NO_STRETCH
from unet_core.runs.manifest import manifest_name
from unet_core.training.dataset import (
    TRAIN,
    VAL,
    DatasetScan,
    Item,
    Split,
    Splits,
    read_items,
    split_at,
    split_hash,
)
from unet_core.training.ranks import Ranks
from unet_core.training.sampler import steps_per_epoch
from unet_core.training.training_run import TrainingRun

AHEAD = 16
"""Images that are decoded ahead: some for each thread."""
SHOWN = 5
"""Problems that an error message lists; the others are counted."""


def scan_or_read(
    config: TrainConfig, run: TrainingRun, splits: Splits, ranks: Ranks, pool: ThreadPoolExecutor,
    wants_stop: Callable[[], bool],
) -> dict[str, Any]:  # fmt: skip
    """Return the ``data`` of ``run.json`` and set the counts of the splits.

    The first session scans the images and publishes both; later ones read them. Raises
    RunMismatchError if the images changed since then, and what ``scan_dataset`` raises.
    """
    was_scanned = ranks.on_first(lambda: run.store.exists(manifest_name(0)))
    if run.document and was_scanned:
        data: dict[str, Any] = run.document["data"]
        if data["val_below"] < 1:
            split_at(splits, data["val_below"])
        ranks.on_all(lambda: run.load_counts(splits))
        return data
    found = scan_dataset(splits, ranks, pool, wants_stop)
    train, val = splits
    highest = max(label for label in found.label_pixels if label != train.input.config.ignore_index)
    data = {
        TRAIN: train.images,
        VAL: val.images,
        "class_pixels": [found.label_pixels[label] for label in range(highest + 1)],
        "val_below": val.high,
        "stretch": found.stretch._asdict(),
        "steps": config.train.steps
        or config.train.epochs * steps_per_epoch(config.train, train.images),
    }

    def publish() -> dict[str, Any]:
        if not run.document:
            run.create(config, data)
        elif run.document["data"] != data:
            raise RunMismatchError(
                f"{run.store.uri()}: the images changed since the training began; restore them, or "
                "train into a new folder"
            )
        run.publish_manifest(splits)
        return data

    return ranks.on_first(publish)


def scan_dataset(
    splits: Splits, ranks: Ranks, pool: ThreadPoolExecutor, wants_stop: Callable[[], bool]
) -> DatasetScan:
    """Decode and check all images, each rank its share of shards; sets the counts of the splits.

    Raises, on every rank, ConfigError that lists what cannot be used, StoppedError if
    ``wants_stop`` was true on any rank.
    """
    train, val = splits
    groups = [[train, val]] if train.input is val.input else [[train], [val]]

    def scan_all() -> DatasetScan:
        parts = ranks.on_all(
            lambda: [_scan_input(group, ranks, pool, wants_stop) for group in groups]
        )
        return functools.reduce(
            operator.iadd, itertools.chain(*ranks.all_gather(parts)), DatasetScan()
        )

    found = scan_all()
    if 0 < val.high < 1 and not found.of(VAL) and found.of(TRAIN) > 1:
        # too few images for val_fraction: one validates
        split_at(splits, math.nextafter(found.lowest_hash, 1))
        found = scan_all()
    for split in splits:
        split.counts = [found.images[split.name, shard] for shard in range(len(split.input.shards))]
    _refuse_unusable(found, train)
    return found


def _scan_input(
    splits: list[Split], ranks: Ranks, pool: ThreadPoolExecutor, wants_stop: Callable[[], bool]
) -> DatasetScan:
    """Scan this rank's shards of one input, which ``splits`` share."""
    source, result, problems = splits[0].input, DatasetScan(), DatasetScan()
    by_name = {split.name: split for split in splits}

    def items() -> Iterator[Item]:
        for shard in range(ranks.rank, len(source.shards), ranks.world_size):
            yield from read_items(splits, shard, problems)

    def scan_item(item: Item) -> DatasetScan:
        try:
            image = by_name[item.key[0]].load(item)
        except ConfigError as error:
            return DatasetScan(unusable=[str(error)])
        item_scan = DatasetScan(
            Counter([item.key[:2]]), lowest_hash=split_hash(item.image.image_id)
        )
        if item.key[0] == TRAIN:
            labels, counts = np.unique(image.labels_HW, return_counts=True)
            item_scan.stretch = image.decoded.measured.stretch or NO_STRETCH
            item_scan.label_pixels.update(dict(zip(labels.tolist(), counts.tolist(), strict=True)))
        return item_scan

    with Prefetch(pool, scan_item, items(), AHEAD) as scans:
        for item_scan in scans:
            if wants_stop():
                raise StoppedError("stopped while looking at the images")
            result += item_scan
    result += problems
    return result


def _refuse_unusable(found: DatasetScan, train: Split) -> None:
    """Raise ConfigError for unusable images, missing masks, an empty split or a single class."""
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
    """Raise ConfigError, with a hint at ``label_map``, if fewer than two classes occur."""
    labels = [value for value in found.label_pixels if value != ignore_index]
    if len(labels) > 1:
        return
    share = found.label_pixels[ignore_index] / max(1, found.label_pixels.total())
    advice = (
        f"{share:.0%} have the value {ignore_index}, which is ignored; if it means a class, "
        f"say data.train.label_map = {{{ignore_index} = 1}}"
        if share
        else "there is nothing to learn"
    )
    only = labels[0] if labels else "none"
    raise ConfigError(f"data.train: every pixel that counts is of class {only}; {advice}")
