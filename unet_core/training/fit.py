"""The training loop, the same in one process and on every rank of a DDP group. No Ray.

The images, crops and learning rate of a step depend on the config, the epoch and the step alone:
not on the number of ranks, the time, or restarts.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch

from unet_core.config.train import TrainConfig
from unet_core.errors import DivergedError, StoppedError, few
from unet_core.inference.engine import choose_device
from unet_core.memory import retain_freed_memory, usable_bytes
from unet_core.networks import checkpoint
from unet_core.training.crops import CropShape
from unet_core.training.dataset import TRAIN, VAL, ImageCache, open_splits
from unet_core.training.learner import Learner, StepResult, learning_rate_at, new_network
from unet_core.training.loader import CropLoader, StepBatch
from unet_core.training.losses import BatchCounts, Loss, class_weights
from unet_core.training.ranks import Ranks
from unet_core.training.sampler import EpochSampler, steps_per_epoch
from unet_core.training.scan import scan_or_read
from unet_core.training.training_run import BEST, LAST, TrainingRun, TrainingState, open_training
from unet_core.training.validation import Validation, validate

CACHE_DIVISOR = 4
"""Decoded images of all ranks may take a quarter of the memory; crops and readers need some too."""
SHOWN = 8
"""Images that an error message names; the others are counted."""
NO_STEP = StepResult([], [], is_finite=True)


@dataclass(frozen=True)
class Started:
    """Event: the images are counted, and the newest checkpoint, if any, is loaded."""

    class_names: tuple[str, ...]
    train_images: int
    val_images: int
    steps: int
    """Optimizer steps of the whole training."""
    steps_per_epoch: int
    step: int
    """Steps that were taken before this session."""


@dataclass(frozen=True)
class Step:
    """Event: one optimizer step was taken."""

    number: int
    """Number of the step in the training, from 1."""
    epoch: int
    crops: int
    """Crops of the step, over all ranks."""
    loss: float
    """Loss of the previous step, over all ranks; 0 in the first step of an epoch or session."""
    seconds: float
    waiting_s: float
    """Part of ``seconds`` in which this rank waited for crops."""


@dataclass(frozen=True)
class Epoch:
    """Event: an epoch was validated and saved."""

    number: int
    step: int
    """Steps of the training so far."""
    loss: float
    """Mean over the steps of the epoch."""
    validation: Validation
    is_best: bool
    seconds: float


Event = Started | Step | Epoch


@dataclass(frozen=True)
class StepStats(BatchCounts):
    """Values of one rank before a step, or their sums over all ranks."""

    errors: float
    """Number of ranks that could not load an image."""
    loss: float
    """Loss of the previous step; NaN if its gradient was not finite."""
    stops: float
    """Number of ranks that were asked to stop."""
    saves: float
    """1 if rank 0 is due to save a checkpoint, else 0."""


def fit(
    config: TrainConfig,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    wants_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train from the newest checkpoint of the output folder, or from the beginning, to the end.

    Every rank must call it. Raises, on all ranks, ConfigError for unusable data, RunMismatchError
    for the folder of another training, DivergedError if the loss or gradient is not finite, and
    StoppedError soon after ``wants_stop`` was true on any rank: during the scan of the images
    without a checkpoint, later after one.
    """
    ranks = ranks or Ranks.joined()
    device = device or choose_device(config.model.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for NCCL, which uses the current device
        torch.backends.cudnn.benchmark = True  # all crops have one shape
    if device.type == "cpu":
        retain_freed_memory()
    run = ranks.on_all(lambda: open_training(config))
    run.document = ranks.on_first(lambda: run.document)
    if ranks.on_first(lambda: run.is_finished):
        return
    with ThreadPoolExecutor(max(2, torch.get_num_threads()), "decode") as pool:
        loop = TrainingLoop(config, run, ranks, device, pool, wants_stop)
        yield loop.restore()
        # the second: all steps were taken, but the last validation was interrupted
        while loop.position.step < loop.steps or loop.position.step_in_epoch:
            yield from loop.train_epoch()
        loop.finish()


class TrainingLoop:
    """Network, data and progress of a training on one rank. Creation scans the images, or on
    a resume reads their counts.
    """

    def __init__(
        self, config: TrainConfig, run: TrainingRun, ranks: Ranks, device: torch.device,
        pool: ThreadPoolExecutor, wants_stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.config, self.run, self.ranks = config, run, ranks
        self.pool, self.wants_stop = pool, wants_stop
        self.position = TrainingState()
        network, self.header = ranks.on_all(lambda: new_network(config))
        header, cache = self.header, ImageCache(usable_bytes() // CACHE_DIVISOR // ranks.world_size)
        splits = ranks.on_all(lambda: open_splits(config, header, cache))
        data = scan_or_read(config, run, splits, ranks, pool, wants_stop)
        self.steps: int = data["steps"]
        self._stretch: dict[str, float] | None = data.get("stretch")
        """Optimizer steps of the whole training."""
        loss = Loss(
            config.loss,
            config.data.train.ignore_index,
            class_weights(config.loss, len(header.class_names), data["class_pixels"]),
            header.first_foreground,
        )
        self.learner = Learner(network, loss, config.train, device, ranks)
        shape = CropShape.of(config.train.crop, header.tiling.margin, config.augment)
        self.loader = CropLoader(
            config, splits[0], shape, header.preprocessing.channels, device, pool
        )
        self.val = splits[1]
        self._saved_at = time.monotonic()
        self._last_result = NO_STEP
        """Result of the last step on this rank, until ``_all_reduce`` has summed it over all."""

    def restore(self) -> Started:
        """Load the newest checkpoint; publish its weights again if they are the best, in case
        that was interrupted.
        """
        newest = self.ranks.on_first(self.run.newest_step)
        self.ranks.on_first(lambda: self.run.remove_leftovers(after=newest))
        if newest is not None:
            self.position, tensors = self.ranks.on_all(lambda: self.run.load(newest))
            self.ranks.on_all(lambda: self.learner.load_state_dict(tensors))
            if 0 < self.position.best_step == self.position.step:
                self.ranks.on_first(lambda: self._publish(BEST))
        return Started(
            class_names=self.header.class_names,
            train_images=self.loader.split.images,
            val_images=self.val.images,
            steps=self.steps,
            steps_per_epoch=steps_per_epoch(self.config.train, self.loader.split.images),
            step=self.position.step,
        )

    def train_epoch(self) -> Iterator[Step | Epoch]:
        """Take the remaining steps of an epoch, then validate and save a checkpoint."""
        began, position = time.perf_counter(), self.position
        sampler = EpochSampler(self.config.train, self.loader.split, position.epoch)
        last = min(sampler.steps, position.step_in_epoch + self.steps - position.step)
        with contextlib.closing(
            self.loader.batches(sampler, self.ranks, skip=position.step_in_epoch)
        ) as batches:
            while position.step_in_epoch < last:
                started = time.perf_counter()
                batch = next(batches)
                total = self._all_reduce(batch)
                self._take_step(batch, total)
                seconds, crops = time.perf_counter() - started, round(total.crops)
                yield Step(
                    position.step, sampler.epoch, crops, total.loss, seconds, batch.waiting_s
                )
        self._all_reduce(StepBatch([], waiting_s=0.0))  # the loss of the last step
        yield self._end_epoch(began)

    def finish(self) -> None:
        """Publish the last weights, then ``_SUCCESS``."""
        self.ranks.on_first(lambda: self._publish(LAST))
        self.ranks.on_first(lambda: self.run.finish(self.position))

    def _end_epoch(self, began: float) -> Epoch:
        """Validate; publish history, a checkpoint, and the weights if they are the best so far."""
        validation, position = self._validate(), self.position
        number, loss = position.epoch, position.loss_sum / position.step_in_epoch
        value = validation.of(self.config.train.best)
        # where the value is undefined so far, the newest weights are the best
        is_best = position.best is None or (value is not None and value > position.best)
        if is_best:
            position.best, position.best_step = value, position.step
        self._record(loss, validation)
        position.epoch, position.step_in_epoch, position.loss_sum = number + 1, 0, 0.0
        self._save()
        if is_best:
            self.ranks.on_first(lambda: self._publish(BEST))
        return Epoch(number, position.step, loss, validation, is_best, time.perf_counter() - began)

    def _all_reduce(self, batch: StepBatch) -> StepStats:
        """Sum the counts of a batch, the loss of the previous step and requests to stop or save
        over all ranks; save if asked. Called before each step, and once after the last of an epoch.

        Raises, on all ranks, an error of any rank's batch, DivergedError, or StoppedError.
        """
        total = StepStats(*self.ranks.all_reduce_sum([*astuple(self._local_stats(batch))]))
        if total.errors:
            raise next(e for e in self.ranks.all_gather(batch.error) if e is not None)
        if not math.isfinite(total.loss):
            raise self._diverged()
        self.position.loss_sum += total.loss
        self._last_result = NO_STEP
        if total.stops or total.saves:
            self._save()
        if total.stops:
            raise StoppedError(f"stopped after step {self.position.step}")
        return total

    def _local_stats(self, batch: StepBatch) -> StepStats:
        counts = [BatchCounts(0, 0, 0), *map(self.learner.loss.counts, batch.micro_batches)]
        valid_pixels, valid_crops, crops = map(math.fsum, zip(*map(astuple, counts), strict=True))
        minutes = self.config.train.checkpoint_minutes or math.inf
        is_due = time.monotonic() - self._saved_at > 60 * minutes
        return StepStats(
            valid_pixels,
            valid_crops,
            crops,
            errors=float(batch.error is not None),
            loss=math.fsum(self._last_result.losses) if self._last_result.is_finite else math.nan,
            stops=float(self.wants_stop()),
            saves=float(is_due and self.ranks.is_first),
        )

    def _diverged(self) -> DivergedError:
        """Create an error that names the images of micro-batches whose loss is not finite; if only
        the gradient is not, all images of the step.
        """
        last = self._last_result
        by_micro_batch = zip(last.image_ids, last.losses, strict=True)
        local = [(i, not math.isfinite(loss)) for ids, loss in by_micro_batch for i in ids]
        images = [image for part in self.ranks.all_gather(local) for image in part]
        suspects = [i for i, is_bad in images if is_bad] or [i for i, _ in images]
        named = few(list(dict.fromkeys(suspects)), SHOWN)
        return DivergedError(
            f"the loss or its gradient is no number at step {self.position.step}; images: "
            f"{named}; the last good checkpoint is kept in {self.run.store.uri()}: look at these "
            "images, or train into a new folder with a lower train.learning_rate"
        )

    def _take_step(self, batch: StepBatch, counts: BatchCounts) -> None:
        train, position = self.config.train, self.position
        seeds = np.random.SeedSequence([train.seed, position.step, self.ranks.rank])
        self._last_result = self.learner.step(
            batch.micro_batches,
            counts,
            learning_rate_at(position.step, self.steps, train),
            int(seeds.generate_state(1)[0]),
        )
        position.step += 1
        position.step_in_epoch += 1

    def _validate(self) -> Validation:
        """Validate the weights that are published, with the BatchNorm statistics of rank 0."""
        network, device = self.learner.eval_network, self.learner.device
        self.ranks.broadcast(network.buffers())
        try:
            return validate(
                network, self.header, device, self.val, self.ranks, self.pool, self.wants_stop
            )
        except StoppedError:
            self._save()
            raise

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        self.ranks.on_first(lambda: self.run.save(self.position, self.learner.state_dict()))

    def _publish(self, name: str) -> None:
        """Write the weights with their header, for prediction; called on rank 0."""
        position = self.position
        header = replace(
            self.header,
            training={
                "step": position.step,
                "epochs": position.epoch,
                "best": {self.config.train.best: position.best, "step": position.best_step},
                "config": self.config.model_dump(mode="json"),
                "stretch": self._stretch,
            },
        )
        self.run.store.publish(name, checkpoint.serialize(self.learner.eval_network, header))

    def _record(self, loss: float, validation: Validation) -> None:
        """Add rows to the history; without times, so that two runs of a config give equal files."""
        position = self.position
        rate = learning_rate_at(position.step - 1, self.steps, self.config.train)
        rows = [
            (TRAIN, "loss", None, loss),
            (TRAIN, "learning_rate", None, rate),
            *(
                (VAL, metric, name, getattr(score, metric))
                for name, score in zip(self.header.class_names, validation.scores, strict=True)
                for metric in ("iou", "dice")
            ),
            (VAL, "accuracy", None, validation.accuracy),
        ]
        columns = ("step", "epoch", "split", "name", "class", "value")
        at = (position.step, position.epoch)
        self.run.history += [dict(zip(columns, at + row, strict=True)) for row in rows]
