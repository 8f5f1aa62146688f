"""The order of an epoch: as many lanes as a global batch has places, each a stream of images.

A lane depends on the seed, the epoch and its number alone. A step takes one image from each lane;
ranks own lanes. So any number of ranks sees the same images in the same steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from unet_core.arrays import Array
from unet_core.train_config import FitConfig
from unet_core.training.dataset import Item, Split

SHUFFLED = 256
"""Images that wait to be drawn from, over all lanes; where a shard holds many, they lie near."""

Entry = tuple[int, Item]
"""A round, and an image."""


@dataclass(frozen=True)
class Order:
    """An epoch: all shards of a split in a random order, ``rounds`` times, cut into equal lanes."""

    split: Split
    seed: int
    epoch: int
    lanes: int
    rounds: int

    @classmethod
    def of(cls, config: FitConfig, split: Split, epoch: int) -> "Order":
        """Which images come when in an epoch of a training."""
        return cls(split, config.seed, epoch, config.batch, config.crops_per_image)

    @property
    def steps(self) -> int:
        """The length of the longest lane; the others are at most one image shorter."""
        return -(-self._total // self.lanes)

    def present(self, lanes: range, step: int) -> int:
        """How many of some lanes have an image for a step."""
        return sum(self._start(lane + 1) - self._start(lane) > step for lane in lanes)

    def streams(self, lanes: range, skip: int) -> Iterator[list[Entry | None]]:
        """Step by step what some lanes have; None for a lane that has ended. The first ``skip``
        steps are passed over.
        """
        shards = self._shards()
        ends = np.cumsum([self.split.counts[shard] for _, shard in shards])
        streams = [self._lane(lane, shards, ends) for lane in lanes]
        for step in range(self.steps):
            drawn = [next(stream, None) for stream in streams]
            if step >= skip:
                yield drawn

    @property
    def _total(self) -> int:
        return self.split.images * self.rounds

    def _start(self, lane: int) -> int:
        return self._total * lane // self.lanes

    def _shards(self) -> list[tuple[int, int]]:
        """Round and shard, in the order of this epoch."""
        there = np.flatnonzero(self.split.counts)
        return [
            (round_, int(shard))
            for round_ in range(self.rounds)
            for shard in np.random.default_rng([self.seed, self.epoch, round_]).permutation(there)
        ]

    def _lane(self, lane: int, shards: list[tuple[int, int]], ends: Array) -> Iterator[Entry]:
        """One lane's images, shuffled among those that are near."""
        random = np.random.default_rng([self.seed, self.epoch, lane, self.rounds])
        room = max(1, SHUFFLED // self.lanes)
        waiting: list[Entry] = []
        for entry in self._cut(lane, shards, ends):
            waiting.append(entry)
            if len(waiting) == room:
                yield _drawn(waiting, random)
        while waiting:
            yield _drawn(waiting, random)

    def _cut(self, lane: int, shards: list[tuple[int, int]], ends: Array) -> Iterator[Entry]:
        """One lane's part of all images, shard by shard; of one that several lanes share it has
        some at random.
        """
        start, stop = self._start(lane), self._start(lane + 1)
        for at in range(int(np.searchsorted(ends, start, side="right")), len(shards)):
            round_, shard = shards[at]
            count = self.split.counts[shard]
            first = int(ends[at]) - count
            if first >= stop:
                return
            here = slice(max(start - first, 0), min(stop - first, count))
            random = np.random.default_rng([self.seed, self.epoch, round_, shard])
            for item in self.split.items(shard, random.permutation(count)[here]):
                yield round_, item


def _drawn(waiting: list[Entry], random: np.random.Generator) -> Entry:
    """Take one at random; the last one fills its place."""
    at = int(random.integers(len(waiting)))
    waiting[at], waiting[-1] = waiting[-1], waiting[at]
    return waiting.pop()
