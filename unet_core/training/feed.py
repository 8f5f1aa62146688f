"""The order of images in an epoch, and the loading of their crops ahead of the device.

A slot is a place of the global batch: a stream of images that depends on the seed, the epoch and
the slot's number alone. A step takes one image from each slot, and each slot belongs to one rank.
So the images of a step do not depend on the number of ranks.
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
from unet_core.training.augment import Examples, augmented, no_examples
from unet_core.training.crops import Crop, CropShape, draw
from unet_core.training.dataset import Item, Split
from unet_core.training.ranks import Ranks

AHEAD_STEPS = 4
"""Steps whose crops are prefetched: enough to bridge a slow image."""
AHEAD_BYTES = 2**29
"""Memory for prefetched crops of a rank: 512 MiB, little beside the decoded images."""
SHUFFLE_BUFFER = 256
"""Images in the shuffle buffers of all slots; small, so that a shard is read within few steps."""

Entry = tuple[int, Item]
"""The round (from 0 to ``crops_per_image`` − 1) and the image of a crop."""


@dataclass(frozen=True)
class Order:
    """The order of images in an epoch: all shards of a split in a random order, once per round, cut
    into equal contiguous slots.
    """

    config: FitConfig
    split: Split
    epoch: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the epoch: the length of the longest slot; others may be one less."""
        return -(-self._total // self.config.batch)

    def present(self, slots: range, step: int) -> int:
        """Count the given slots that still have an image in a step."""
        return sum(self._start(slot + 1) - self._start(slot) > step for slot in slots)

    def streams(self, slots: range, skip: int) -> Iterator[list[Entry | None]]:
        """Yield one entry per slot for each step from ``skip`` on; None if a slot has ended."""
        nonempty = np.flatnonzero(self.split.counts)
        shards = [
            (round_, int(shard))
            for round_ in range(self.config.crops_per_image)
            for shard in self._random(round_).permutation(nonempty)
        ]
        ends = np.cumsum([self.split.counts[shard] for _, shard in shards])
        streams = [self._slot(slot, shards, ends) for slot in slots]
        for step in range(self.steps):
            entries = [next(stream, None) for stream in streams]
            if step >= skip:
                yield entries

    @cached_property
    def _total(self) -> int:  # sums over all shards, and is used for every slot of every step
        return self.split.images * self.config.crops_per_image

    def _start(self, slot: int) -> int:
        return self._total * slot // self.config.batch

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
            round_, shard = shards[index]
            count = self.split.counts[shard]
            first = int(ends[index]) - count
            if first >= stop:
                return
            shuffled = self._random(round_, shard).permutation(count)
            for item in self.split.items(shard, shuffled[max(start - first, 0) : stop - first]):
                yield round_, item


@dataclass(frozen=True)
class StepBatch:
    """The training data of one step on one rank."""

    pieces: list[Examples]
    """One per forward pass: ``train.accumulate``, or fewer in a small last step."""
    waiting_s: float
    """Seconds that this rank waited for the crops of the step."""
    error: UnetJobsError | None = None
    """The error of an image that could not be loaded; its crop and later ones are missing."""


@dataclass(frozen=True)
class Feed:
    """The data loader of a rank: draws crops on threads and augments them on the device."""

    config: TrainConfig
    split: Split
    shape: CropShape
    channels: int
    device: torch.device
    pool: ThreadPoolExecutor

    def steps(self, order: Order, ranks: Ranks, skip: int) -> Generator[StepBatch, None, None]:
        """Yield the batches of a rank's slots, step by step from ``skip`` on.

        The caller must close the generator, which stops the prefetching.
        """
        batch = order.config.batch
        slots_of_ranks = [replace(ranks, rank=n).slots(batch) for n in range(ranks.count)]
        slots = slots_of_ranks[ranks.rank]
        entries = filter(None, itertools.chain.from_iterable(order.streams(slots, skip)))

        def crop(entry: Entry) -> Crop:
            round_, item = entry
            seed = (order.config.seed, order.epoch, round_)
            return draw(self.split.load(item), self.shape, self.config.augment, seed)

        ahead, weigh = AHEAD_STEPS * len(slots), attrgetter("nbytes")
        with Prefetch(self.pool, crop, entries, ahead, weigh, AHEAD_BYTES) as prefetch:
            crops = iter(prefetch)
            for step in range(skip, order.steps):
                # as many forward passes on every rank, since DDP synchronises each last one
                most = max(order.present(some, step) for some in slots_of_ranks)
                pieces = min(self.config.train.accumulate, most)
                yield self._step_batch(itertools.islice(crops, order.present(slots, step)), pieces)

    def _step_batch(self, prefetched: Iterator[Crop], pieces: int) -> StepBatch:
        """Wait for the crops of a step; augment them in ``pieces`` parts of nearly equal size."""
        started = time.perf_counter()
        crops, error = list[Crop](), None
        try:
            crops += prefetched
        except UnetJobsError as raised:
            error = raised
        waiting_s = time.perf_counter() - started
        ends = [len(crops) * n // pieces for n in range(pieces + 1)]
        parts = (crops[start:stop] for start, stop in itertools.pairwise(ends))
        empty = no_examples(self.shape, self.channels, self.device)
        examples = [augmented(part, self.shape, self.device) if part else empty for part in parts]
        return StepBatch(examples, waiting_s, error)
