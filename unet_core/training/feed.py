"""Which images come when in an epoch, and their crops ahead of the device.

An epoch has as many slots as a global batch has places, each a stream of images. A slot depends on
the seed, the epoch and its number alone. A step takes one image from each slot; ranks own slots. So
any number of ranks sees the same images in the same steps.
"""

import itertools
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter

import numpy as np
import torch

from unet_core.arrays import Array
from unet_core.concurrency import Prefetch
from unet_core.config.train import FitConfig, TrainConfig
from unet_core.errors import UnetJobsError
from unet_core.training.augment import Examples, augmented, nothing
from unet_core.training.crops import Crop, CropShape, draw
from unet_core.training.dataset import Item, Split
from unet_core.training.ranks import Ranks

AHEAD_STEPS = 4
AHEAD_BYTES = 2**29
SHUFFLED = 256
"""Images, over all slots, among which the next is drawn; fewer than an epoch, so that those of one
shard are read soon after each other."""

Entry = tuple[int, Item]
"""A round, and an image."""


@dataclass(frozen=True)
class Order:
    """An epoch: all shards of a split in a random order, ``crops_per_image`` times, cut into equal
    slots, one for each place of a batch.
    """

    config: FitConfig
    split: Split
    epoch: int

    @property
    def steps(self) -> int:
        """The length of the longest slot; the others are at most one image shorter."""
        return -(-self._total // self.config.batch)

    def present(self, slots: range, step: int) -> int:
        """How many of some slots have an image for a step."""
        return sum(self._start(slot + 1) - self._start(slot) > step for slot in slots)

    def streams(self, slots: range, skip: int) -> Iterator[list[Entry | None]]:
        """Step by step, after ``skip`` of them, what slots have; None for one that has ended."""
        there = np.flatnonzero(self.split.counts)
        shards = [
            (round_, int(shard))
            for round_ in range(self.config.crops_per_image)
            for shard in self._random(round_).permutation(there)
        ]
        ends = np.cumsum([self.split.counts[shard] for _, shard in shards])
        streams = [self._slot(slot, shards, ends) for slot in slots]
        for step in range(self.steps):
            drawn = [next(stream, None) for stream in streams]
            if step >= skip:
                yield drawn

    @cached_property
    def _total(self) -> int:  # of millions of shards, for every place of every step
        return self.split.images * self.config.crops_per_image

    def _start(self, slot: int) -> int:
        return self._total * slot // self.config.batch

    def _random(self, *of: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.epoch, *of])

    def _slot(self, slot: int, shards: list[tuple[int, int]], ends: Array) -> Iterator[Entry]:
        """One slot's images, shuffled among those that are near."""
        random = self._random(slot, self.config.crops_per_image)
        entries = self._cut(slot, shards, ends)
        waiting = list(itertools.islice(entries, max(1, SHUFFLED // self.config.batch)))
        while waiting:
            at = int(random.integers(len(waiting)))
            waiting[at], waiting[-1] = waiting[-1], waiting[at]
            yield waiting.pop()
            waiting += itertools.islice(entries, 1)

    def _cut(self, slot: int, shards: list[tuple[int, int]], ends: Array) -> Iterator[Entry]:
        """One slot's part of all images by shard; of a shard that slots share, some at random."""
        start, stop = self._start(slot), self._start(slot + 1)
        for at in range(int(np.searchsorted(ends, start, side="right")), len(shards)):
            round_, shard = shards[at]
            count = self.split.counts[shard]
            first = int(ends[at]) - count
            if first >= stop:
                return
            here = slice(max(start - first, 0), min(stop - first, count))
            drawn = self._random(round_, shard).permutation(count)[here]
            for item in self.split.items(shard, drawn):
                yield round_, item


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of one step."""

    pieces: list[Examples]
    waiting_s: float
    """Seconds until the last crop was drawn."""
    error: UnetJobsError | None = None
    """Why an image of it is missing."""


@dataclass(frozen=True)
class Feed:
    """Draws crops on threads, and augments them on the device."""

    config: TrainConfig
    split: Split
    shape: CropShape
    channels: int
    device: torch.device
    pool: ThreadPoolExecutor

    def steps(self, order: Order, ranks: Ranks, skip: int) -> Generator[StepBatch, None, None]:
        """What a rank's slots give, step by step, after the first ``skip`` steps; close it."""
        batch, everyone = order.config.batch, (replace(ranks, rank=n) for n in range(ranks.count))
        slots, of_all = ranks.slots(batch), [one.slots(batch) for one in everyone]
        streams = order.streams(slots, skip)
        entries = (entry for drawn in streams for entry in drawn if entry is not None)

        def crop(entry: Entry) -> Crop:
            round_, item = entry
            seed = (order.config.seed, order.epoch, round_)
            return draw(self.split.load(item), self.shape, self.config.augment, seed)

        ahead, weigh = AHEAD_STEPS * len(slots), attrgetter("nbytes")
        with Prefetch(self.pool, crop, entries, ahead, weigh, AHEAD_BYTES) as prefetch:
            crops = iter(prefetch)
            for step in range(skip, order.steps):
                # on every rank alike, and none is empty everywhere
                most = max(order.present(some, step) for some in of_all)
                pieces = min(self.config.train.accumulate, most)
                yield self._fed(itertools.islice(crops, order.present(slots, step)), pieces)

    def _fed(self, crops: Iterator[Crop], pieces: int) -> StepBatch:
        started = time.perf_counter()
        drawn, error = list[Crop](), None
        try:
            drawn += crops
        except UnetJobsError as raised:
            error = raised
        waiting_s = time.perf_counter() - started
        ends = [len(drawn) * at // pieces for at in range(pieces + 1)]
        cut = (drawn[start:stop] for start, stop in itertools.pairwise(ends))
        none = nothing(self.shape, self.channels, self.device)
        made = [augmented(some, self.shape, self.device) if some else none for some in cut]
        return StepBatch(made, waiting_s, error)
