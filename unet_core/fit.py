"""The story of a training: the same loop in one process and on every rank of a DDP group. No Ray.

What a step does follows from the config, the epoch and the step alone: not from the number of
ranks, the time, or what was done before a restart.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from unet_core.engine import choose_device
from unet_core.errors import DivergedError, StoppedError
from unet_core.memory import keep_freed
from unet_core.networks import checkpoint
from unet_core.networks.checkpoint import Header
from unet_core.run import Identity
from unet_core.storage.store import Store
from unet_core.train_config import TrainConfig
from unet_core.training.census import counted
from unet_core.training.crops import CropShape
from unet_core.training.dataset import TRAIN, VAL, Memory, Split, open_splits
from unet_core.training.evaluation import Evaluation, evaluate
from unet_core.training.feed import Fed, Feed
from unet_core.training.lanes import Order
from unet_core.training.learner import BatchCounts, Learner, rate_at
from unet_core.training.losses import Loss, balanced
from unet_core.training.ranks import Ranks
from unet_core.training.run import BEST, LAST, Position, TrainingRun, identity
from unet_core.training.start import checkpoint_digest, new_network


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
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where ranks meet
        torch.backends.cudnn.benchmark = True  # all crops have one shape
    if device.type == "cpu":
        keep_freed()
    run, wanted = ranks.together(lambda: _open(config))
    run.record = ranks.first(lambda: run.record)
    if ranks.first(lambda: run.is_finished):
        return
    with ThreadPoolExecutor(max(2, torch.get_num_threads()), "decode") as pool:
        fitting = _begin(config, run, wanted, ranks, device, pool, wants_stop)
        position = fitting.restore()
        yield fitting.started(position)
        while position.step < fitting.steps or position.step_in_epoch:
            started = time.perf_counter()
            yield from fitting.train_epoch(position)
            yield fitting.end_epoch(position, started)
        fitting.finish(position)


def _open(config: TrainConfig) -> tuple[TrainingRun, Identity]:
    """The folder, and what the config makes of it; raises RunMismatchError for another's."""
    run = TrainingRun(Store(config.output.uri, config.storage)).look()
    wanted = identity(config, checkpoint_digest(config))
    run.require_same(wanted)
    return run, wanted


def _begin(
    config: TrainConfig, run: TrainingRun, wanted: Identity, ranks: Ranks, device: torch.device,
    pool: ThreadPoolExecutor, wants_stop: Callable[[], bool],
) -> "Fitting":  # fmt: skip
    """Build the network, look at the images."""
    network, header = ranks.together(lambda: new_network(config))
    memory, classes = Memory.shared_by(ranks.count), len(header.class_names)
    splits = ranks.together(lambda: open_splits(config, header.preprocessing, classes, memory))
    data = counted(config, run, wanted, splits, ranks, pool, wants_stop)
    weights = config.loss.class_weights
    if weights == "balanced":
        pixels = data["class_pixels"]
        weights = balanced([*pixels, *[0] * (classes - len(pixels))])
    of_class = weights if isinstance(weights, list) else None
    loss = Loss(config.loss, config.data.train.ignore_index, of_class)
    learner = Learner(network, loss, config.train, device, ranks)
    shape = CropShape.of(config.train.crop, header.tiling.margin, config.augment)
    feed = Feed(config, splits[0], shape, header.preprocessing.channels, device, pool)
    return Fitting(
        config, ranks, run, header, learner, feed, splits[1], pool, wants_stop, data["steps"]
    )


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
    wants_stop: Callable[[], bool]
    steps: int
    """Optimiser steps of the whole training."""
    _saved: float = field(default_factory=time.monotonic)
    _unchecked: tuple[float, list[str]] = (0.0, [])
    """This rank's part of the last step's loss, and whose it is."""

    def started(self, position: Position) -> Started:
        """What is known before the first step."""
        return Started(
            class_names=self.header.class_names,
            train_images=self.feed.split.images,
            val_images=self.val.images,
            steps=self.steps,
            steps_per_epoch=Order.of(self.config.train, self.feed.split, 0).steps,
            step=position.step,
        )

    def restore(self) -> Position:
        """Load the newest checkpoint; publish the best weights if their writer died before that."""
        newest = self.ranks.first(self.run.newest)
        if newest is None:
            return Position()
        position, tensors = self.ranks.together(lambda: self.run.load(newest))
        self.ranks.together(lambda: self.learner.restore(tensors))
        if position.best is not None and position.best_step == position.step:
            self.ranks.first(lambda: self._publish(BEST, position))
        return position

    def train_epoch(self, position: Position) -> Iterator[Step]:
        """Take the steps that are left of an epoch; saves a checkpoint when it is time for one."""
        order = Order.of(self.config.train, self.feed.split, position.epoch)
        skip = position.step_in_epoch
        last = min(order.steps, skip + self.steps - position.step)
        with self.feed.steps(order, self.ranks, skip) as fed:
            while position.step_in_epoch < last:
                started = time.perf_counter()
                mine = next(fed)
                counts, loss = self._agree(position, mine)
                self._take_step(position, mine, counts)
                seconds = time.perf_counter() - started
                images = round(counts.images)
                yield Step(position.step, order.epoch, images, loss, seconds, mine.waiting_s)
        self._agree(position, Fed([], 0.0))

    def end_epoch(self, position: Position, started: float) -> Epoch:
        """Evaluate, write the history, a checkpoint, and the weights if they are the best yet."""
        found = self._evaluate(position)
        number, loss = position.epoch, position.loss_sum / position.step_in_epoch
        value = found.of(self.config.train.best)
        is_best = position.best is None or value > position.best
        if is_best:
            position.best, position.best_step = value, position.step
        self._record(position, loss, found)
        position.epoch, position.step_in_epoch, position.loss_sum = number + 1, 0, 0.0
        self._save(position)
        if is_best:
            self.ranks.first(lambda: self._publish(BEST, position))
        seconds = time.perf_counter() - started
        return Epoch(number, position.step, loss, found, is_best, seconds)

    def finish(self, position: Position) -> None:
        """Publish the last weights, then ``_SUCCESS``."""

        def publish() -> None:
            self._publish(LAST, position)
            self.run.finish(position)

        self.ranks.first(publish)

    def _agree(self, position: Position, mine: Fed) -> tuple[BatchCounts, float]:
        """Add up over all ranks what the step needs to know; the loss is that of the step before.
        Saves a checkpoint if it is time for one.

        Raises what went wrong on any rank, on all of them.
        """
        loss, image_ids = self._unchecked
        counts = [self.learner.counts(piece) for piece in mine.pieces]
        minutes = self.config.train.checkpoint_minutes or math.inf
        is_late = time.monotonic() - self._saved > 60 * minutes
        pixels, crops, images, errors, whole_loss, stops, late = self.ranks.total(
            [
                math.fsum(pixels for pixels, _ in counts),
                math.fsum(crops for _, crops in counts),
                float(sum(len(piece.image_ids) for piece in mine.pieces)),
                float(mine.error is not None),
                loss,
                float(self.wants_stop()),
                float(is_late and self.ranks.is_first),
            ]
        )
        if errors:
            raise next(e for e in self.ranks.gather(mine.error) if e is not None)
        if not math.isfinite(whole_loss):
            guilty = self.ranks.gather([] if math.isfinite(loss) else image_ids)
            names = ", ".join([i for ids in guilty for i in ids][:8])
            raise DivergedError(
                f"the loss or its gradient is no number at step {position.step}; images: {names}; "
                f"the last good checkpoint is kept in {self.run.store.uri()}: look at these "
                "images, or train into a new folder with a lower train.learning_rate"
            )
        position.loss_sum += whole_loss
        self._unchecked = 0.0, []
        if stops or late:
            self._save(position)
        if stops:
            raise StoppedError(f"stopped after step {position.step}")
        return BatchCounts(pixels, crops, images), whole_loss

    def _take_step(self, position: Position, mine: Fed, counts: BatchCounts) -> None:
        train = self.config.train
        seed = np.random.SeedSequence([train.seed, position.step, self.ranks.rank])
        rate = rate_at(position.step, self.steps, train)
        loss = self.learner.step(mine.pieces, counts, rate, int(seed.generate_state(1)[0]))
        self._unchecked = loss, [i for piece in mine.pieces for i in piece.image_ids]
        position.step += 1
        position.step_in_epoch += 1

    def _evaluate(self, position: Position) -> Evaluation:
        """On the weights that will be kept: statistics of BatchNorm are the first rank's."""
        network = self.learner.kept
        self.ranks.share(network.buffers())
        try:
            return evaluate(
                network, self.header, self.learner.device, self.val, self.ranks, self.pool,
                self.wants_stop,
            )  # fmt: skip
        except StoppedError:
            self._save(position)
            raise

    def _save(self, position: Position) -> None:
        self._saved = time.monotonic()
        self.ranks.first(lambda: self.run.save(position, self.learner.tensors()))

    def _publish(self, name: str, position: Position) -> None:
        """A checkpoint to predict with."""
        about = {
            "step": position.step,
            "epochs": position.epoch,
            "best": {self.config.train.best: position.best, "step": position.best_step},
            "config": self.config.model_dump(mode="json"),
        }
        header = replace(self.header, training=about)
        self.run.store.publish(name, checkpoint.serialise(self.learner.kept, header))

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
