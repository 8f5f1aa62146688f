"""Crops ahead of the device: this rank's part of every step of an epoch."""

import contextlib
import itertools
import time
from collections.abc import Iterator
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

    @contextlib.contextmanager
    def steps(self, order: Order, ranks: Ranks, skip: int) -> Iterator[Iterator[Fed]]:
        """What a rank's lanes give, step by step, after the first ``skip`` steps."""
        lanes = ranks.lanes(order.lanes)

        def crop(entry: Entry | None) -> Crop | None:
            if entry is None:
                return None
            round_, item = entry
            seed = (order.seed, order.epoch, round_)
            return draw(self.split.load(item), self.shape, self.config.augment, seed)

        entries = (entry for drawn in order.streams(lanes, skip) for entry in drawn)
        ahead = AHEAD_STEPS * len(lanes)
        with Prefetch(self.pool, crop, entries, ahead, _weight, AHEAD_BYTES) as crops:
            yield self._fed(iter(crops), order, ranks, skip)

    def _fed(
        self, crops: Iterator[Crop | None], order: Order, ranks: Ranks, skip: int
    ) -> Iterator[Fed]:
        lanes = ranks.lanes(order.lanes)
        for step in range(skip, order.steps):
            started = time.perf_counter()
            drawn: list[Crop] = []
            error: UnetJobsError | None = None
            try:
                for _ in lanes:
                    crop = next(crops)
                    drawn += [crop] if crop is not None else []
            except UnetJobsError as raised:
                error = raised
            waiting_s = time.perf_counter() - started
            yield Fed(self._pieces(drawn, self._count(order, ranks, step)), waiting_s, error)

    def _count(self, order: Order, ranks: Ranks, step: int) -> int:
        """In how many pieces a step is computed, on every rank alike; none is empty everywhere."""
        most = max(
            order.present(replace(ranks, rank=rank).lanes(order.lanes), step)
            for rank in range(ranks.count)
        )
        return min(self.config.train.accumulate, most)

    def _pieces(self, drawn: list[Crop], count: int) -> list[Examples]:
        ends = [len(drawn) * at // count for at in range(count + 1)]
        pieces = (drawn[start:stop] for start, stop in itertools.pairwise(ends))
        return [
            augmented(piece, self.shape, self.device)
            if piece
            else nothing(self.shape, self.channels, self.device)
            for piece in pieces
        ]


def _weight(crop: Crop | None) -> int:
    return 0 if crop is None else crop.nbytes
