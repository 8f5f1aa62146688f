"""The order of an epoch: as many lanes as a global batch has places, each a stream of images.

A lane depends on the seed, the epoch and its number alone. A step takes one image from each lane;
ranks own lanes. So any number of ranks sees the same images in the same steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from unet_core.arrays import Array
from unet_core.training.dataset import Item, Split

SHUFFLED = 64
"""Images of a lane that wait to be drawn from, where a shard holds many."""


@dataclass(frozen=True)
class Order:
    """An epoch: all shards of a split in a random order, ``rounds`` times, cut into equal lanes."""

    split: Split
    seed: int
    epoch: int
    lanes: int
    rounds: int

    @property
    def steps(self) -> int:
        """The length of the longest lane; the others are at most one image shorter."""
        return -(-self.split.images * self.rounds // self.lanes)

    def streams(self, lanes: range, skip: int) -> Iterator[list[tuple[int, Item] | None]]:
        """Step by step what some lanes have, each image with its round; None for a lane that has
        ended. The first ``skip`` steps are passed over.
        """
        order = self._order()
        streams = [self._lane(lane, order) for lane in lanes]
        for step in range(self.steps):
            drawn = [next(stream, None) for stream in streams]
            if step >= skip:
                yield drawn

    def _order(self) -> list[tuple[int, int]]:
        """Round and shard, in the order of this epoch."""
        there = np.flatnonzero(self.split.counts)
        return [
            (round_, int(shard))
            for round_ in range(self.rounds)
            for shard in np.random.default_rng([self.seed, self.epoch, round_]).permutation(there)
        ]

    def _lane(self, lane: int, order: list[tuple[int, int]]) -> Iterator[tuple[int, Item]]:
        """One lane's images, shuffled among those that are near."""
        random = np.random.default_rng([self.seed, self.epoch, lane, self.rounds])
        waiting: list[tuple[int, Item]] = []
        for entry in self._cut(lane, order):
            waiting.append(entry)
            if len(waiting) == SHUFFLED:
                yield _drawn(waiting, random)
        while waiting:
            yield _drawn(waiting, random)

    def _cut(self, lane: int, order: list[tuple[int, int]]) -> Iterator[tuple[int, Item]]:
        """One lane's part of all images, shard by shard; of one that several lanes share it has
        some at random.
        """
        total = self.split.images * self.rounds
        start, stop = (total * at // self.lanes for at in (lane, lane + 1))
        ends: Array = np.cumsum([self.split.counts[shard] for _, shard in order])
        for at in range(int(np.searchsorted(ends, start, side="right")), len(order)):
            round_, shard = order[at]
            first = int(ends[at]) - self.split.counts[shard]
            if first >= stop:
                return
            count = self.split.counts[shard]
            here = slice(max(start - first, 0), min(stop - first, count))
            random = np.random.default_rng([self.seed, self.epoch, round_, shard])
            for item in self.split.items(shard, random.permutation(count)[here]):
                yield round_, item


def _drawn(waiting: list[tuple[int, Item]], random: np.random.Generator) -> tuple[int, Item]:
    """Take one at random; the last one fills its place."""
    at = int(random.integers(len(waiting)))
    waiting[at], waiting[-1] = waiting[-1], waiting[at]
    return waiting.pop()
