"""The story of a training: the same loop in one process and on every rank of a DDP group. No Ray.

What a step does follows from the config, the epoch and the step alone: not from the number of
ranks, the time, or what was done before a restart.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from unet_core import checkpoint
from unet_core.checkpoint import Header
from unet_core.engine import choose_device
from unet_core.errors import DivergedError, RunMismatchError, StoppedError
from unet_core.run import Identity
from unet_core.train_config import TrainConfig
from unet_core.training import census, curves
from unet_core.training.crops import CropShape
from unet_core.training.dataset import TRAIN, VAL, Memory, Split, divide_at, open_splits
from unet_core.training.evaluation import Evaluation, evaluate
from unet_core.training.feed import Fed, Feed
from unet_core.training.lanes import Order
from unet_core.training.learner import Learner, Totals, rate_at
from unet_core.training.losses import Loss, balanced
from unet_core.training.ranks import Ranks
from unet_core.training.run import BEST, CURVES, LAST, Position, TrainingRun, identity
from unet_core.training.start import checkpoint_digest, new_network

CURVES_S = 60.0


@dataclass(frozen=True)
class Started:
    """All images were looked at, and the newest checkpoint was loaded."""

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
    evaluation: Evaluation
    is_best: bool
    seconds: float


Event = Started | Step | Epoch


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
    run, wanted = ranks.together(lambda: _open(config))
    if run.is_finished:
        return
    with ThreadPoolExecutor(max(2, torch.get_num_threads()), "decode") as pool:
        fitting = _begin(config, run, wanted, ranks, device, pool)
        fitting.wants_stop = wants_stop
        position = fitting.restore()
        yield fitting.started(position)
        while position.step < fitting.steps or position.step_in_epoch:
            started = time.perf_counter()
            yield from fitting.train_epoch(position)
            yield fitting.end_epoch(position, started)
        fitting.finish(position)


def _open(config: TrainConfig) -> tuple[TrainingRun, Identity]:
    """The folder, and what the config makes of it; raises RunMismatchError for another's."""
    run, wanted = (
        TrainingRun.open(config.output.uri, config.storage),
        identity(config, checkpoint_digest(config)),
    )
    run.require_same(wanted)
    return run, wanted


def _begin(
    config: TrainConfig, run: TrainingRun, wanted: Identity, ranks: Ranks, device: torch.device,
    pool: ThreadPoolExecutor,
) -> "Fitting":  # fmt: skip
    """Build the network, look at the images."""
    network, header = ranks.together(lambda: new_network(config))
    memory, classes = Memory.shared_by(ranks.count), len(header.class_names)
    splits = ranks.together(lambda: open_splits(config, header.preprocessing, classes, memory))
    data = _count_images(config, run, wanted, splits, ranks, pool)
    weights = config.loss.class_weights
    of_class = balanced(data["class_pixels"]) if weights == "balanced" else weights
    loss = Loss(
        config.loss,
        config.data.train.ignore_index,
        of_class if isinstance(of_class, list) else None,
    )
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all crops have one shape
    learner = Learner(network, loss, config.train, device, ranks)
    shape = CropShape.of(config.train.crop, header.tiling.margin, config.augment)
    feed = Feed(config, splits[0], shape, header.preprocessing.channels, device, pool)
    return Fitting(config, ranks, run, header, learner, feed, splits[1], pool, data["steps"])


def _count_images(
    config: TrainConfig, run: TrainingRun, wanted: Identity, splits: tuple[Split, Split],
    ranks: Ranks, pool: ThreadPoolExecutor,
) -> dict[str, Any]:  # fmt: skip
    """Look at all images, or recall what was found when the training began; ``run.json``'s data."""
    if run.record is not None and ranks.together(run.has_manifest):
        if run.record["data"]["val_below"] < 1:
            divide_at(splits, run.record["data"]["val_below"])
        ranks.together(lambda: run.recall_counts(splits))
        return dict(run.record["data"])
    found = census.take(splits, ranks, pool)
    names, train = config.model.classes, config.train
    data = {
        TRAIN: splits[0].images,
        VAL: splits[1].images,
        "class_pixels": [found.label_pixels[label] for label in range(len(names))],
        "without_mask": len(found.without_mask),
        "val_below": splits[1].high,
        "steps": train.steps or train.epochs * order_of(config, splits[0], 0).steps,
    }
    if run.record is not None and run.record["data"] != data:
        raise RunMismatchError(f"{run.store.uri()}: the images changed since the training began")

    def publish() -> None:
        if ranks.is_first and run.record is None:
            run.establish(wanted, config, data)
        if ranks.is_first:
            run.publish_manifest(splits)

    ranks.together(publish)
    return data


def order_of(config: TrainConfig, split: Split, epoch: int) -> Order:
    """Which images come when in an epoch."""
    train = config.train
    return Order(split, train.seed, epoch, train.batch, train.crops_per_image)


@dataclass
class Fitting:
    """What a training consists of on one rank, and its steps."""

    config: TrainConfig
    ranks: Ranks
    run: TrainingRun
    header: Header
    learner: Learner
    feed: Feed
    val: Split
    pool: ThreadPoolExecutor
    steps: int
    """Optimiser steps of the whole training."""
    wants_stop: Callable[[], bool] = lambda: False
    _saved: float = field(default_factory=time.monotonic)
    _drawn: float = field(default_factory=time.monotonic)
    _unchecked: tuple[float, list[str]] = (0.0, [])
    """This rank's part of the last step's loss, and whose it is."""

    def started(self, position: Position) -> Started:
        """What is known before the first step."""
        images = self.feed.split.images, self.val.images
        per_epoch = order_of(self.config, self.feed.split, 0).steps
        return Started(*images, self.steps, per_epoch, position.step)

    def restore(self) -> Position:
        """Load the newest checkpoint; publish the best weights if their writer died before that."""
        found = self.ranks.together(self.run.load)
        if found is None:
            return Position()
        position, tensors = found
        self.ranks.together(lambda: self.learner.restore(tensors))
        if position.best_step == position.step:
            self.ranks.together(lambda: self._publish_best(position))
        return position

    def train_epoch(self, position: Position) -> Iterator[Step]:
        """Take the steps that are left of an epoch; saves a checkpoint when it is time for one."""
        order = order_of(self.config, self.feed.split, position.epoch)
        skip = position.step_in_epoch
        last = min(order.steps, skip + self.steps - position.step)
        lanes = self.ranks.lanes(order.lanes)
        with self.feed.steps(order, lanes, skip) as fed:
            while position.step_in_epoch < last:
                started = time.perf_counter()
                part = next(fed)
                totals, loss = self._agree(position, part)
                self._take_step(position, part, totals)
                seconds = time.perf_counter() - started
                images = round(totals.images)
                yield Step(position.step, order.epoch, images, loss, seconds, part.waiting_s)
        self._agree(position, Fed([], 0.0))

    def end_epoch(self, position: Position, started: float) -> Epoch:
        """Evaluate, write the history, a checkpoint, and the weights if they are the best yet."""
        found = evaluate(
            self.learner.kept, self.header, self.learner.device, self.val, self.ranks, self.pool
        )
        number, loss = position.epoch, position.loss_sum / position.step_in_epoch
        value = found.of(self.config.train.best)
        is_best = position.best is None or value > position.best
        if is_best:
            position.best, position.best_step = value, position.step
        self._record(position, loss, found)
        position.epoch, position.step_in_epoch, position.loss_sum = number + 1, 0, 0.0
        self._save(position)
        if is_best:
            self.ranks.together(lambda: self._publish_best(position))
        if time.monotonic() - self._drawn > CURVES_S:
            self.ranks.together(self._draw_curves)
        seconds = time.perf_counter() - started
        return Epoch(number, position.step, loss, found, is_best, seconds)

    def finish(self, position: Position) -> None:
        """Publish the last weights and the curves, then ``_SUCCESS``."""

        def publish() -> None:
            if self.ranks.is_first:
                self.run.store.publish(LAST, self._weights(position))
                self._draw_curves()
                self.run.finish(position)

        self.ranks.together(publish)

    def _agree(self, position: Position, part: Fed) -> tuple[Totals, float]:
        """Add up over all ranks what the step needs to know; the loss is that of the step before.
        Saves a checkpoint if it is time for one.

        Raises what went wrong on any rank, on all of them.
        """
        loss, image_ids = self._unchecked
        counts = [self.learner.counts(piece) for piece in part.pieces]
        minutes = self.config.train.checkpoint_minutes or math.inf
        is_late = time.monotonic() - self._saved > 60 * minutes
        pixels, crops, images, errors, whole_loss, stops, late = self.ranks.total(
            [
                math.fsum(pixels for pixels, _ in counts),
                math.fsum(crops for _, crops in counts),
                float(sum(len(piece.image_ids) for piece in part.pieces)),
                float(part.error is not None),
                loss,
                float(self.wants_stop()),
                float(is_late and self.ranks.is_first),
            ]
        )
        if errors:
            raise next(e for e in self.ranks.gather(part.error) if e is not None)
        if not math.isfinite(whole_loss):
            guilty = self.ranks.gather([] if math.isfinite(loss) else image_ids)
            names = ", ".join([i for ids in guilty for i in ids][:8])
            raise DivergedError(
                f"the loss is {whole_loss} at step {position.step}; images: {names}; the last good "
                f"checkpoint is kept in {self.run.store.uri()}: look at these images, or train "
                "into a new folder with a lower train.learning_rate"
            )
        position.loss_sum += whole_loss
        self._unchecked = 0.0, []
        if stops or late:
            self._save(position)
        if stops:
            raise StoppedError(f"stopped after step {position.step}")
        return Totals(pixels, crops, images), whole_loss

    def _take_step(self, position: Position, part: Fed, totals: Totals) -> None:
        train = self.config.train
        seed = np.random.SeedSequence([train.seed, position.step, self.ranks.rank])
        rate = rate_at(position.step, self.steps, train)
        loss = self.learner.step(part.pieces, totals, rate, int(seed.generate_state(1)[0]))
        self._unchecked = loss, [i for piece in part.pieces for i in piece.image_ids]
        position.step += 1
        position.step_in_epoch += 1

    def _save(self, position: Position) -> None:
        self._saved = time.monotonic()

        def save() -> None:
            if self.ranks.is_first:
                self.run.save(position, self.learner.tensors())

        self.ranks.together(save)

    def _publish_best(self, position: Position) -> None:
        if self.ranks.is_first:
            self.run.store.publish(BEST, self._weights(position))

    def _weights(self, position: Position) -> bytes:
        """A checkpoint to predict with."""
        about = {
            "step": position.step,
            "epochs": position.epoch,
            "best": {self.config.train.best: position.best, "step": position.best_step},
            "config": self.config.model_dump(mode="json"),
        }
        return checkpoint.serialise(self.learner.kept, replace(self.header, training=about))

    def _record(self, position: Position, loss: float, found: Evaluation) -> None:
        """Rows for the history; times are not in it, so that two runs of a config agree."""
        rate = rate_at(position.step - 1, self.steps, self.config.train)
        rows: list[tuple[str, str, str | None, float | None]] = [
            (TRAIN, "loss", None, loss),
            (TRAIN, "learning_rate", None, rate),
        ]
        for name, score in zip(self.header.class_names, found.scores, strict=True):
            rows += [(VAL, "iou", name, score.iou), (VAL, "dice", name, score.dice)]
        rows.append((VAL, "accuracy", None, found.accuracy))
        at = {"step": position.step, "epoch": position.epoch}
        columns = ("split", "name", "class", "value")
        self.run.history += [{**at, **dict(zip(columns, row, strict=True))} for row in rows]

    def _draw_curves(self) -> None:
        self._drawn = time.monotonic()
        if self.ranks.is_first:
            title = self.run.store.uri()
            self.run.store.publish(CURVES, curves.draw(self.run.rows(), title))
