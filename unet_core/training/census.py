"""Looking at every image once before training: how many there are, and all that is wrong."""

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from unet_core.errors import ConfigError
from unet_core.ordered import Prefetch
from unet_core.training.dataset import TRAIN, VAL, Item, Split, divide_at, read_items, share_of
from unet_core.training.ranks import Ranks

AHEAD = 64
AHEAD_BYTES = 2**28
SHOWN = 5


@dataclass
class Census:
    """What was found; ``a + b`` is what both found."""

    images: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By split and shard."""
    label_pixels: Counter[int] = field(default_factory=Counter)
    """Training pixels of each class id, and of ``ignore_index``."""
    without_mask: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    lowest_share: float = 1.0
    """Of all images."""

    def of(self, split: str) -> int:
        """Images of a split."""
        return sum(count for (name, _), count in self.images.items() if name == split)

    def __add__(self, other: "Census") -> "Census":
        return Census(
            self.images + other.images,
            self.label_pixels + other.label_pixels,
            self.without_mask + other.without_mask,
            self.unusable + other.unusable,
            min(self.lowest_share, other.lowest_share),
        )


def take(splits: tuple[Split, Split], ranks: Ranks, pool: ThreadPoolExecutor) -> Census:
    """Look at all images, each rank at its own shards; sets the counts of the splits.

    Raises ConfigError that names what cannot be used, on every rank.
    """
    found = _look_together(splits, ranks, pool)
    train, val = splits
    if 0 < val.high < 1 and not found.of(VAL) and found.of(TRAIN) > 1:
        divide_at(splits, math.nextafter(found.lowest_share, 1))  # few images: one validates
        found = _look_together(splits, ranks, pool)
    for split in splits:
        shards = range(len(split.input.shards))
        split.counts = [found.images[split.name, shard] for shard in shards]
    _refuse_unusable(found, train)
    return found


def _look_together(splits: tuple[Split, Split], ranks: Ranks, pool: ThreadPoolExecutor) -> Census:
    train, val = splits
    groups = [[train, val]] if train.input is val.input else [[train], [val]]

    def mine() -> Census:
        return sum((_look(group, ranks, pool) for group in groups), Census())

    return sum(ranks.gather(ranks.together(mine)), Census())


def _look(splits: list[Split], ranks: Ranks, pool: ThreadPoolExecutor) -> Census:
    source, found = splits[0].input, Census()
    by_name = {split.name: split for split in splits}

    def items() -> Iterator[Item]:
        for shard in range(ranks.rank, len(source.shards), ranks.count):
            yield from read_items(splits, shard, found.without_mask)

    def look(item: Item) -> tuple[Item, Counter[int]] | str:
        try:
            image = by_name[item.key[0]].load(item)
        except ConfigError as error:
            return str(error)
        values, counts = np.unique(image.labels, return_counts=True)
        return item, Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    with Prefetch(pool, look, items(), AHEAD, lambda _: 0, AHEAD_BYTES) as looked:
        for seen in looked:
            if isinstance(seen, str):
                found.unusable.append(seen)
                continue
            item, pixels = seen
            found.images[item.key[:2]] += 1
            found.lowest_share = min(found.lowest_share, share_of(item.image_id))
            if item.key[0] == TRAIN:
                found.label_pixels += pixels
    return found


def _refuse_unusable(found: Census, train: Split) -> None:
    """Raise ConfigError for anything that would train another network than was meant."""
    config = train.input.config
    problems = [*found.unusable[:SHOWN]]
    if more := len(found.unusable) - len(problems):
        problems.append(f"and {more} more like these")
    if found.without_mask and config.on_missing_mask == "refuse":
        shown = ", ".join(sorted(found.without_mask)[:SHOWN])
        problems.append(
            f"data: {len(found.without_mask)} images have no mask: {shown}; add them, or set "
            'on_missing_mask = "skip" or "background"'
        )
    if problems:
        raise ConfigError("\n".join(problems))
    if not found.of(TRAIN) or not found.of(VAL):
        raise ConfigError(
            f"data: {found.of(TRAIN)} images for training and {found.of(VAL)} for validation; both "
            "need one: change data.val_fraction, or give data.val"
        )
    labels = {value: n for value, n in found.label_pixels.items() if value != config.ignore_index}
    ignored = found.label_pixels[config.ignore_index]
    if len(labels) < 2:
        share = ignored / max(1, found.label_pixels.total())
        raise ConfigError(
            f"data.train: every pixel that counts is of class {next(iter(labels), 'none')}"
            + (
                f", and {share:.0%} have the value {config.ignore_index}, which is ignored; if it "
                f"means a class, say data.train.label_map = {{{config.ignore_index} = 1}}"
                if ignored
                else "; there is nothing to learn"
            )
        )
