"""The data loader of a rank: draws crops on threads, ahead of the device that augments them."""

import itertools
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter

import torch

from unet_core.concurrency import Prefetch
from unet_core.config.train import TrainConfig
from unet_core.errors import UnetJobsError
from unet_core.training.augment import MicroBatch, augment, empty_micro_batch
from unet_core.training.crops import Crop, CropShape, draw
from unet_core.training.dataset import Split
from unet_core.training.ranks import Ranks
from unet_core.training.sampler import Entry, EpochSampler, slots_of

AHEAD_STEPS = 4
"""Steps whose crops are prefetched: enough to bridge a slow image."""
AHEAD_BYTES = 2**29
"""Memory for prefetched crops of a rank: 512 MiB, little beside the decoded images."""


@dataclass(frozen=True)
class StepBatch:
    """The training data of one step on one rank."""

    micro_batches: list[MicroBatch]
    """One per forward pass: ``train.accumulate`` micro-batches, or fewer in a small last step."""
    waiting_s: float
    """Seconds that this rank waited for the crops of the step."""
    error: UnetJobsError | None = None
    """The error of an image that could not be loaded; its crop and later ones are missing."""


@dataclass(frozen=True)
class CropLoader:
    """The data loader of a rank: draws crops on threads and augments them on the device."""

    config: TrainConfig
    split: Split
    shape: CropShape
    channels: int
    device: torch.device
    pool: ThreadPoolExecutor

    def batches(
        self, sampler: EpochSampler, ranks: Ranks, skip: int
    ) -> Generator[StepBatch, None, None]:
        """Yield the batches of a rank's slots, step by step from ``skip`` on.

        The caller must close the generator, which stops the prefetching.
        """
        slots_of_ranks = [
            slots_of(rank, ranks.world_size, sampler.config.batch)
            for rank in range(ranks.world_size)
        ]
        slots = slots_of_ranks[ranks.rank]
        entries = filter(None, itertools.chain.from_iterable(sampler.batches(slots, skip)))

        def crop(entry: Entry) -> Crop:
            repeat, item = entry
            seed = (sampler.config.seed, sampler.epoch, repeat)
            return draw(self.split.load(item), self.shape, self.config.augment, seed)

        with Prefetch(
            self.pool, crop, entries, AHEAD_STEPS * len(slots), attrgetter("nbytes"), AHEAD_BYTES
        ) as prefetch:
            crops = iter(prefetch)
            for step in range(skip, sampler.steps):
                # as many forward passes on every rank, since DDP synchronizes each last one
                passes = min(
                    self.config.train.accumulate,
                    max(sampler.batch_size(some, step) for some in slots_of_ranks),
                )
                yield self._step_batch(
                    itertools.islice(crops, sampler.batch_size(slots, step)), passes
                )

    def _step_batch(self, prefetched: Iterator[Crop], passes: int) -> StepBatch:
        """Wait for the crops of a step; augment them in ``passes`` parts of nearly equal size."""
        started = time.perf_counter()
        crops, error = list[Crop](), None
        try:
            crops += prefetched
        except UnetJobsError as raised:
            error = raised
        waiting_s = time.perf_counter() - started
        ends = [len(crops) * n // passes for n in range(passes + 1)]
        empty = empty_micro_batch(self.shape, self.channels, self.device)
        micro_batches = [
            augment(crops[start:stop], self.shape, self.device) if start < stop else empty
            for start, stop in itertools.pairwise(ends)
        ]
        return StepBatch(micro_batches, waiting_s, error)
