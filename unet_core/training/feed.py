"""Crops ahead of the device: this rank's part of every step of an epoch."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from unet_core.errors import UnetJobsError
from unet_core.ordered import Prefetch
from unet_core.train_config import TrainConfig
from unet_core.training.augment import Examples, augmented, idle
from unet_core.training.crops import Crop, CropShape, draw
from unet_core.training.dataset import Item, Split
from unet_core.training.lanes import Order

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
    def steps(self, order: Order, lanes: range, skip: int) -> Iterator[Iterator[Fed]]:
        """What some lanes give, step by step, after the first ``skip`` steps."""

        def crop(entry: tuple[int, Item] | None) -> Crop | None:
            if entry is None:
                return None
            round_, item = entry
            seed = (order.seed, order.epoch, round_)
            return draw(self.split.load(item), self.shape, self.config.augment, seed)

        entries = (entry for drawn in order.streams(lanes, skip) for entry in drawn)
        ahead = AHEAD_STEPS * len(lanes)
        with Prefetch(self.pool, crop, entries, ahead, _weight, AHEAD_BYTES) as crops:
            yield self._fed(iter(crops), len(lanes))

    def _fed(self, crops: Iterator[Crop | None], lanes: int) -> Iterator[Fed]:
        while True:
            started = time.perf_counter()
            drawn: list[Crop] = []
            error: UnetJobsError | None = None
            try:
                for _ in range(lanes):
                    crop = next(crops)
                    drawn += [crop] if crop is not None else []
            except UnetJobsError as raised:
                error = raised
            waiting_s = time.perf_counter() - started
            yield Fed(self._pieces(drawn), waiting_s, error)

    def _pieces(self, drawn: list[Crop]) -> list[Examples]:
        """A batch in as many pieces as were asked for; a piece without crops is idle."""
        count = self.config.train.accumulate
        ends = [len(drawn) * at // count for at in range(count + 1)]
        pieces = (drawn[start:stop] for start, stop in itertools.pairwise(ends))
        return [
            augmented(piece, self.shape, self.device) if piece else self._idle() for piece in pieces
        ]

    def _idle(self) -> Examples:
        ignore_index = self.split.input.config.ignore_index
        has_boundary = self.config.loss.boundary > 0
        return idle(self.shape, self.channels, ignore_index, has_boundary, self.device)


def _weight(crop: Crop | None) -> int:
    return 0 if crop is None else crop.pixels_CHW.nbytes + crop.labels_HW.nbytes
