"""The order of images in an epoch. No torch.

A slot is a place of the global batch: a stream of images that depends on the seed, the epoch and
the slot's number alone. A step takes one image from each slot, and each slot belongs to one rank.
So the images of a step do not depend on the number of ranks.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from unet_core.arrays import Array
from unet_core.config.train import FitConfig
from unet_core.training.dataset import Item, Split

SHUFFLE_BUFFER = 256
"""Images in the shuffle buffers of all slots; small, so that a shard is read within few steps."""

Entry = tuple[int, Item]
"""Which of an image's ``crops_per_image`` crops of the epoch, from 0 (its repeat); and the image.
"""


@dataclass(frozen=True)
class EpochSampler:
    """The order of images in an epoch: all shards of a split in a random order, once per repeat,
    cut into contiguous slots, whose lengths differ by one at most.
    """

    config: FitConfig
    split: Split
    epoch: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the epoch."""
        return steps_per_epoch(self.config, self._images)

    def batch_size(self, slots: range, step: int) -> int:
        """Count the given slots that still have an image in a step."""
        return sum(self._start(slot + 1) - self._start(slot) > step for slot in slots)

    def batches(self, slots: range, skip: int) -> Iterator[list[Entry | None]]:
        """Yield one entry per slot for each step from ``skip`` on; None if a slot has ended."""
        nonempty = np.flatnonzero(self.split.counts)
        shards = [
            (repeat, int(shard))
            for repeat in range(self.config.crops_per_image)
            for shard in self._random(repeat).permutation(nonempty)
        ]
        ends = np.cumsum([self.split.counts[shard] for _, shard in shards])
        streams = [self._slot(slot, shards, ends) for slot in slots]
        for step in range(self.steps):
            entries = [next(stream, None) for stream in streams]
            if step >= skip:
                yield entries

    @cached_property
    def _images(self) -> int:  # sums over all shards, and is used for every slot of every step
        return self.split.images

    def _start(self, slot: int) -> int:
        return self._images * self.config.crops_per_image * slot // self.config.batch

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.epoch, *key])

    def _slot(self, slot: int, shards: list[tuple[int, int]], ends: Array) -> Iterator[Entry]:
        """Yield a slot's entries, shuffled with a buffer."""
        random = self._random(slot, self.config.crops_per_image)
        entries = self._cut(slot, shards, ends)
        buffer = list(itertools.islice(entries, max(1, SHUFFLE_BUFFER // self.config.batch)))
        while buffer:
            chosen = int(random.integers(len(buffer)))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            yield buffer.pop()
            buffer += itertools.islice(entries, 1)

    def _cut(self, slot: int, shards: list[tuple[int, int]], ends: Array) -> Iterator[Entry]:
        """Yield a slot's entries in the order of ``shards``; ``ends`` holds cumulated image counts.

        A shard at the border of slots is divided among them at random.
        """
        start, stop = self._start(slot), self._start(slot + 1)
        for index in range(int(np.searchsorted(ends, start, side="right")), len(shards)):
            repeat, shard = shards[index]
            count = self.split.counts[shard]
            first = int(ends[index]) - count
            if first >= stop:
                return
            shuffled = self._random(repeat, shard).permutation(count)
            # decides only which slot gets which image: items() yields them in the shard's order
            for item in self.split.items(shard, shuffled[max(start - first, 0) : stop - first]):
                yield repeat, item


def steps_per_epoch(config: FitConfig, images: int) -> int:
    """Compute the optimizer steps of an epoch: the length of its longest slot; others may be one
    shorter.
    """
    return -(-images * config.crops_per_image // config.batch)


def slots_of(rank: int, world_size: int, batch: int) -> range:
    """Return the slots of a global batch that belong to a rank."""
    return range(rank * batch // world_size, (rank + 1) * batch // world_size)
