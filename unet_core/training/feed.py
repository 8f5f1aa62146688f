"""Crops ahead of the device: this rank's part of every step of an epoch."""

import itertools
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from unet_core.errors import UnetJobsError
from unet_core.ordered import Prefetch
from unet_core.train_config import TrainConfig
from unet_core.training.augment import Examples, augmented, nothing
from unet_core.training.crops import Crop, CropShape, draw
from unet_core.training.dataset import Split
from unet_core.training.lanes import Entry, Order
from unet_core.training.ranks import Ranks

AHEAD_STEPS = 4
AHEAD_BYTES = 2**29


@dataclass(frozen=True)
class Fed:
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

    def steps(self, order: Order, ranks: Ranks, skip: int) -> Generator[Fed, None, None]:
        """What a rank's lanes give, step by step, after the first ``skip`` steps; close it."""
        lanes = ranks.lanes(order.lanes)
        streams = order.streams(lanes, skip)
        entries = (entry for drawn in streams for entry in drawn if entry is not None)

        def crop(entry: Entry) -> Crop:
            round_, item = entry
            seed = (order.seed, order.epoch, round_)
            return draw(self.split.load(item), self.shape, self.config.augment, seed)

        ahead = AHEAD_STEPS * len(lanes)
        with Prefetch(self.pool, crop, entries, ahead, _weight, AHEAD_BYTES) as prefetch:
            crops = iter(prefetch)
            for step in range(skip, order.steps):
                pieces = self._count(order, ranks, step)
                yield self._fed(itertools.islice(crops, order.present(lanes, step)), pieces)

    def _fed(self, crops: Iterator[Crop], pieces: int) -> Fed:
        started = time.perf_counter()
        drawn, error = list[Crop](), None
        try:
            drawn += crops
        except UnetJobsError as raised:
            error = raised
        waiting_s = time.perf_counter() - started
        ends = [len(drawn) * at // pieces for at in range(pieces + 1)]
        cut = (drawn[start:stop] for start, stop in itertools.pairwise(ends))
        return Fed([self._augmented(piece) for piece in cut], waiting_s, error)

    def _count(self, order: Order, ranks: Ranks, step: int) -> int:
        """In how many pieces a step is computed, on every rank alike; none is empty everywhere."""
        most = max(
            order.present(replace(ranks, rank=rank).lanes(order.lanes), step)
            for rank in range(ranks.count)
        )
        return min(self.config.train.accumulate, most)

    def _augmented(self, crops: list[Crop]) -> Examples:
        if not crops:
            return nothing(self.shape, self.channels, self.device)
        return augmented(crops, self.shape, self.device)


def _weight(crop: Crop) -> int:
    return crop.nbytes
