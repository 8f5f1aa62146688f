"""Progress of runs and trainings: a bar on a terminal, plain lines elsewhere.

``submit --follow`` turns the plain lines of a job on a cluster into a bar again.
"""

import re
import threading
import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from unet_core.inputs.shards import Shard, images_in
from unet_core.metrics import Totals

if TYPE_CHECKING:
    from unet_core.config.train import TrainConfig
    from unet_core.training.fit import Epoch, Event, Step

MOST_OFTEN_S, LEAST_OFTEN_S = 2.0, 60.0
"""Seconds between two plain lines: short runs show some, and the log of a long one stays small."""
PATIENT_EPOCHS = 2
"""Epochs without a warning about a single predicted class: a network may begin with one."""
LINE = re.compile(r"(segmenting|training): (([\d,]+) of ~?([\d,?]+) .*)")
"""A plain line: the activity, its text, the count done and the total."""


class Display:
    """A bar, or without a terminal plain lines at growing intervals."""

    def __init__(self, what: str, on_stderr: bool = True) -> None:
        self.console = Console(stderr=on_stderr, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self.bar.add_task(what, total=1.0, text="")
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, what: str, share: float, text: str, is_last: bool = False) -> None:
        """Move the bar; without one, print a line if one is due or it is the last."""
        self.bar.update(self._task, description=what, completed=share, text=text)
        now = time.monotonic()
        wait_s = min(max(MOST_OFTEN_S, (now - self._began) / 20), LEAST_OFTEN_S)
        if self.bar.disable and (is_last or now - self._said >= wait_s):
            self._said = now
            self.console.print(f"{what}: {text}")


def rate(count: int, seconds: float, unit: str = "images") -> str:
    """Images, or another unit, per second as text; a dash before the first one."""
    return f"{count / max(seconds, 1e-3):.1f} {unit}/s" if count else f"– {unit}/s"


class FollowedProgress(Display):
    """Output of a job, line by line; on a terminal its progress lines move a bar."""

    def __init__(self) -> None:
        super().__init__("starting", on_stderr=False)

    def on_line(self, line: str) -> None:
        """Show one line of the job."""
        found = LINE.fullmatch(line.rstrip())
        if found is None or self.bar.disable:
            self.console.print(line, markup=False)
            return
        what, text, done, total = found.groups()
        known = total.replace(",", "")
        share = int(done.replace(",", "")) / int(known) if known.isdigit() and int(known) else 0.0
        self.show(what, min(1.0, share), text)


class RunProgress(Display):
    """Progress of a run, by images; a total that is not known is estimated by bytes, and marked
    with ~.
    """

    def __init__(self, shards: list[Shard], plan: list[Shard], before: Totals) -> None:
        super().__init__("segmenting")
        self._bytes, self._known = sum(shard.bytes for shard in plan), images_in(plan)
        self._shards, self._before, self._done = len(shards), before, Totals()
        self._done_bytes = self._provisional = self._actors = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def __exit__(self, *_: object) -> None:
        if self._done.shards:
            self.tick(self._actors, is_last=True)
        super().__exit__()

    def on_image(self) -> None:
        """Count an image of a shard under way; called from threads of an inline run."""
        with self._lock:
            self._provisional += 1

    def on_done(self, shard: Shard, totals: Totals) -> None:
        """Count a committed shard."""
        with self._lock:
            self._provisional = max(0, self._provisional - totals.images_seen)
        self._done += totals
        self._done_bytes += shard.bytes

    def tick(self, actors: int, is_last: bool = False) -> None:
        """Show the progress, and the number of workers that take shards."""
        if not self._actors and not self._done.shards:
            self._started = time.monotonic()  # loading the model is no part of the rate
        self._actors = actors
        done = self._done.images_seen + self._provisional
        total: float | None = self._known
        if total is None and self._done_bytes:
            total = self._done.images_seen * self._bytes / self._done_bytes
        before = self._before.images_seen
        shards = self._before.shards + self._done.shards
        is_over = shards == self._shards
        about = "" if is_over or self._known is not None else "~"
        of = "?" if total is None else f"{before + total:,.0f}"
        text = (
            f"{before + done:,} of {about}{of} images, "
            f"{rate(done, time.monotonic() - self._started)}, "
            f"{self._before.failed + self._done.failed} failed, "
            f"{shards}/{self._shards} shards"
            f"{'' if is_over else f', {actors} actors'}"
        )
        self.show("segmenting", min(1.0, done / total) if total else 0.0, text, is_last)


class ShardsProgress(Display):
    """Progress of a task over the shards of a run."""

    def __init__(self, what: str, shards: int, done: int) -> None:
        super().__init__(what)
        self._what, self._shards, self._done = what, shards, done
        self._images = 0

    def on_done(self, images: int) -> None:
        """Count a shard and its images."""
        self._done += 1
        self._images += images
        self.show(
            self._what,
            self._done / self._shards,
            f"{self._done:,}/{self._shards:,} shards, "
            f"{rate(self._images, time.monotonic() - self._began)}",
        )


class TrainProgress(Display):
    """Progress of a training; the line of each epoch stays."""

    def __init__(self, config: "TrainConfig") -> None:
        super().__init__("looking at the images")
        self._best = config.train.best
        self._names: tuple[str, ...] = ()
        self._steps = self._epochs = 0
        self._crops, self._seconds, self._waiting_s = 0, 0.0, 0.0
        self._loss, self._value = "–", ""
        self._has_warned = False

    def on_event(self, event: "Event") -> None:
        """Show one event of a training."""
        from unet_core.training.fit import Started, Step  # torch

        if isinstance(event, Started):
            self._names, self._steps = event.class_names, event.steps
            self._epochs = -(-event.steps // event.steps_per_epoch)
            again = f", going on after step {event.step:,}" if event.step else ""
            self.console.print(
                f"{event.train_images:,} images to train on, {event.val_images:,} to validate "
                f"with; {event.steps:,} steps{again}"
            )
        elif isinstance(event, Step):
            self._on_step(event)
        else:
            self._on_epoch(event)

    def _on_step(self, step: "Step") -> None:
        self._crops += step.crops
        self._seconds += step.seconds
        self._waiting_s += step.waiting_s
        if step.loss:
            self._loss = f"{step.loss:.4f}"
        self.show(
            "training",
            step.number / self._steps,
            f"{step.number:,} of {self._steps:,} steps, epoch {step.epoch + 1}/{self._epochs}, "
            f"{self._rate()}, loss {self._loss}{self._value}",
        )

    def _on_epoch(self, epoch: "Epoch") -> None:
        validation = epoch.validation
        scores = ", ".join(
            f"{escape(name)} {'–' if score.iou is None else f'{score.iou:.3f}'}"
            for name, score in zip(self._names, validation.scores, strict=True)
        )
        value = validation.of(self._best)
        self._value = f", val {self._best} {'–' if value is None else f'{value:.3f}'}"
        self.console.print(
            f"epoch {epoch.number + 1}/{self._epochs}  loss {epoch.loss:.4f}  val IoU: {scores}  "
            f"{self._rate()}  {epoch.seconds:.1f} s{'  best' if epoch.is_best else ''}"
        )
        self._crops, self._seconds, self._waiting_s = 0, 0.0, 0.0
        if value is None and epoch.is_best:
            self.console.print(
                f"val {self._best} is undefined: no validation image has foreground in its truth "
                "or mask, so there is no best; the newest weights are kept"
            )
        only = validation.only_class
        if only is not None and epoch.number >= PATIENT_EPOCHS and not self._has_warned:
            self._has_warned = True
            self.console.print(
                "WARNING: the network predicts a single class: every validation pixel is "
                f"{escape(repr(self._names[only]))}. That means a wrong label_map, a learning rate "
                "that is too high, or a class that is too rare (try loss.class_weights = "
                '"balanced").',
                style="bold red",
            )

    def _rate(self) -> str:
        return (
            f"{rate(self._crops, self._seconds, 'crops')}, "
            f"{self._waiting_s / max(self._seconds, 1e-3):.0%} waiting for data"
        )
