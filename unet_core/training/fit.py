"""The story of a training: the same loop in one process and on every rank of a DDP group. No Ray.

What a step does follows from the config, the epoch and the step alone: not from the number of
ranks, the time, or what was done before a restart.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from unet_core.config.train import TrainConfig
from unet_core.errors import DivergedError, StoppedError
from unet_core.inference.engine import choose_device
from unet_core.memory import keep_freed, usable_bytes
from unet_core.networks import checkpoint
from unet_core.training.crops import CropShape
from unet_core.training.dataset import TRAIN, VAL, Memory, open_splits
from unet_core.training.feed import Feed, Order, StepBatch
from unet_core.training.learner import Learner, StepResult, new_network, rate_at
from unet_core.training.losses import BatchCounts, Loss, class_weights
from unet_core.training.ranks import Ranks
from unet_core.training.scan import scan
from unet_core.training.training_run import BEST, LAST, Position, TrainingRun, open_training
from unet_core.training.validation import Validation, validate

MEMORY_SHARE = 4
"""Decoded images may take this part of the memory, as if all ranks were on this machine."""
SHOWN = 8
NOTHING = StepResult([], [], is_finite=True)


@dataclass(frozen=True)
class Started:
    """All images were looked at, and the newest checkpoint was loaded."""

    class_names: tuple[str, ...]
    train_images: int
    val_images: int
    steps: int
    """Of the whole training."""
    steps_per_epoch: int
    step: int
    """Where it goes on."""


@dataclass(frozen=True)
class Step:
    """One optimiser step."""

    number: int
    """From 1."""
    epoch: int
    images: int
    """Over all ranks."""
    loss: float
    """Of the step before, over all ranks."""
    seconds: float
    waiting_s: float
    """Of these, until this rank's crops were drawn."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave."""

    number: int
    step: int
    loss: float
    """Mean over its steps."""
    validation: Validation
    is_best: bool
    seconds: float


Event = Started | Step | Epoch


class ReducedStats(NamedTuple):
    """What ranks tell each other before a step, and what it adds up to."""

    pixels: float
    crops: float
    images: float
    errors: float
    """Ranks that lack an image."""
    loss: float
    """Of the step before; no number if its gradient was none."""
    stops: float
    """Ranks that are to stop."""
    saves: float
    """Whether it is time for a checkpoint."""


def fit(
    config: TrainConfig,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    wants_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train from the newest checkpoint of the output folder, or from the beginning, to the end.

    Every rank calls it alike. Raises ConfigError for unusable data, RunMismatchError for a folder
    of another training, DivergedError for a loss that is no longer a number, StoppedError, after a
    checkpoint, soon after ``wants_stop`` was true on any rank; on all ranks.
    """
    ranks = ranks or Ranks.joined()
    device = device or choose_device(config.model.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where ranks meet
        torch.backends.cudnn.benchmark = True  # all crops have one shape
    if device.type == "cpu":
        keep_freed()
    run = ranks.on_all(lambda: open_training(config))
    run.record = ranks.on_first(lambda: run.record)
    if ranks.on_first(lambda: run.is_finished):
        return
    with ThreadPoolExecutor(max(2, torch.get_num_threads()), "decode") as pool:
        fitting = Fitting(config, run, ranks, device, pool, wants_stop)
        yield fitting.restore()
        while fitting.position.step < fitting.steps or fitting.position.step_in_epoch:
            yield from fitting.train_epoch()
        fitting.finish()


class Fitting:
    """What a training consists of on one rank, and its steps."""

    def __init__(
        self, config: TrainConfig, run: TrainingRun, ranks: Ranks, device: torch.device,
        pool: ThreadPoolExecutor, wants_stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.config, self.run, self.ranks = config, run, ranks
        self.pool, self.wants_stop = pool, wants_stop
        self.position = Position()
        network, self.header = ranks.on_all(lambda: new_network(config))
        header, memory = self.header, Memory(usable_bytes() // MEMORY_SHARE // ranks.count)
        splits = ranks.on_all(lambda: open_splits(config, header, memory))
        data = scan(config, run, splits, ranks, pool, wants_stop)
        self.steps: int = data["steps"]
        """Optimiser steps of the whole training."""
        weights = class_weights(config.loss, len(header.class_names), data["class_pixels"])
        loss = Loss(config.loss, config.data.train.ignore_index, weights)
        self.learner = Learner(network, loss, config.train, device, ranks)
        shape = CropShape.of(config.train.crop, header.tiling.margin, config.augment)
        self.feed = Feed(config, splits[0], shape, header.preprocessing.channels, device, pool)
        self.val = splits[1]
        self._saved = time.monotonic()
        self._unchecked = NOTHING
        """What this rank saw of the last step."""

    def restore(self) -> Started:
        """Load the newest checkpoint; publish the best weights if their writer died before that."""
        newest = self.ranks.on_first(self.run.newest)
        if newest is not None:
            self.position, tensors = self.ranks.on_all(lambda: self.run.load(newest))
            self.ranks.on_all(lambda: self.learner.restore(tensors))
            if self.position.best is not None and self.position.best_step == self.position.step:
                self.ranks.on_first(lambda: self._publish(BEST))
        return Started(
            class_names=self.header.class_names,
            train_images=self.feed.split.images,
            val_images=self.val.images,
            steps=self.steps,
            steps_per_epoch=Order(self.config.train, self.feed.split, 0).steps,
            step=self.position.step,
        )

    def train_epoch(self) -> Iterator[Step | Epoch]:
        """Take the steps left of an epoch and validate; saves a checkpoint when it is time."""
        began, position = time.perf_counter(), self.position
        order = Order(self.config.train, self.feed.split, position.epoch)
        skip = position.step_in_epoch
        last = min(order.steps, skip + self.steps - position.step)
        with contextlib.closing(self.feed.steps(order, self.ranks, skip)) as fed:
            while position.step_in_epoch < last:
                started = time.perf_counter()
                mine = next(fed)
                agreed = self._reduce(mine)
                counts = BatchCounts(agreed.pixels, agreed.crops, agreed.images)
                self._take_step(mine, counts)
                seconds, images = time.perf_counter() - started, round(agreed.images)
                yield Step(position.step, order.epoch, images, agreed.loss, seconds, mine.waiting_s)
        self._reduce(StepBatch([], waiting_s=0.0))  # on what came of the last step
        yield self._end_epoch(began)

    def finish(self) -> None:
        """Publish the last weights, then ``_SUCCESS``."""
        self.ranks.on_first(lambda: self._publish(LAST))
        self.ranks.on_first(lambda: self.run.finish(self.position))

    def _end_epoch(self, began: float) -> Epoch:
        """Validate, write the history, a checkpoint, and the weights if they are the best yet."""
        found, position = self._validate(), self.position
        number, loss = position.epoch, position.loss_sum / position.step_in_epoch
        value = found.of(self.config.train.best)
        is_best = position.best is None or value > position.best
        if is_best:
            position.best, position.best_step = value, position.step
        self._record(loss, found)
        position.epoch, position.step_in_epoch, position.loss_sum = number + 1, 0, 0.0
        self._save()
        if is_best:
            self.ranks.on_first(lambda: self._publish(BEST))
        return Epoch(number, position.step, loss, found, is_best, time.perf_counter() - began)

    def _reduce(self, mine: StepBatch) -> ReducedStats:
        """Add up over all ranks what a step needs to know, and save a checkpoint if it is time.

        Raises what went wrong on any rank, on all of them.
        """
        agreed = ReducedStats(*self.ranks.summed([*self._local_stats(mine)]))
        if agreed.errors:
            raise next(e for e in self.ranks.gather(mine.error) if e is not None)
        if not math.isfinite(agreed.loss):
            raise self._diverged()
        self.position.loss_sum += agreed.loss
        self._unchecked = NOTHING
        if agreed.stops or agreed.saves:
            self._save()
        if agreed.stops:
            raise StoppedError(f"stopped after step {self.position.step}")
        return agreed

    def _local_stats(self, mine: StepBatch) -> ReducedStats:
        taken = self._unchecked
        counts = [BatchCounts(0, 0, 0), *map(self.learner.loss.counts, mine.pieces)]
        pixels, crops, images = map(math.fsum, zip(*counts, strict=True))
        minutes = self.config.train.checkpoint_minutes or math.inf
        is_late = time.monotonic() - self._saved > 60 * minutes
        return ReducedStats(
            pixels,
            crops,
            images,
            errors=float(mine.error is not None),
            loss=math.fsum(taken.losses) if taken.is_finite else math.nan,
            stops=float(self.wants_stop()),
            saves=float(is_late and self.ranks.is_first),
        )

    def _diverged(self) -> DivergedError:
        """Names the images of the pieces whose loss is no number; of all, if it is the gradient."""
        taken = self._unchecked
        pieces = zip(taken.image_ids, taken.losses, strict=True)
        mine = [(i, not math.isfinite(loss)) for piece, loss in pieces for i in piece]
        images = [image for part in self.ranks.gather(mine) for image in part]
        guilty = [i for i, bad in images if bad] or [i for i, _ in images]
        named = list(dict.fromkeys(guilty))
        more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        return DivergedError(
            f"the loss or its gradient is no number at step {self.position.step}; images: "
            f"{', '.join(named[:SHOWN])}{more}; the last good checkpoint is kept in "
            f"{self.run.store.uri()}: look at these images, or train into a new folder with a "
            "lower train.learning_rate"
        )

    def _take_step(self, mine: StepBatch, counts: BatchCounts) -> None:
        train, position = self.config.train, self.position
        seed = np.random.SeedSequence([train.seed, position.step, self.ranks.rank])
        rate = rate_at(position.step, self.steps, train)
        dropout = int(seed.generate_state(1)[0])
        self._unchecked = self.learner.step(mine.pieces, counts, rate, dropout)
        position.step += 1
        position.step_in_epoch += 1

    def _validate(self) -> Validation:
        """On the weights that will be kept: statistics of BatchNorm are the first rank's."""
        network, device = self.learner.kept, self.learner.device
        self.ranks.broadcast(network.buffers())
        try:
            return validate(
                network, self.header, device, self.val, self.ranks, self.pool, self.wants_stop
            )
        except StoppedError:
            self._save()
            raise

    def _save(self) -> None:
        self._saved = time.monotonic()
        self.ranks.on_first(lambda: self.run.save(self.position, self.learner.tensors()))

    def _publish(self, name: str) -> None:
        """A checkpoint to predict with."""
        position = self.position
        about = {
            "step": position.step,
            "epochs": position.epoch,
            "best": {self.config.train.best: position.best, "step": position.best_step},
            "config": self.config.model_dump(mode="json"),
        }
        header = replace(self.header, training=about)
        self.run.store.publish(name, checkpoint.serialize(self.learner.kept, header))

    def _record(self, loss: float, found: Validation) -> None:
        """Rows for the history; times are not in it, so that two runs of a config agree."""
        position = self.position
        rate = rate_at(position.step - 1, self.steps, self.config.train)
        rows: list[tuple[str, str, str | None, float | None]] = [
            (TRAIN, "loss", None, loss),
            (TRAIN, "learning_rate", None, rate),
        ]
        for name, score in zip(self.header.class_names, found.scores, strict=True):
            rows += [(VAL, "iou", name, score.iou), (VAL, "dice", name, score.dice)]
        rows.append((VAL, "accuracy", None, found.accuracy))
        columns = ("step", "epoch", "split", "name", "class", "value")
        at = (position.step, position.epoch)
        self.run.history += [dict(zip(columns, at + row, strict=True)) for row in rows]
