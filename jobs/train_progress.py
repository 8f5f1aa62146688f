"""What people see while a network is trained: a bar on a terminal, lines elsewhere."""

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.progress import Pace
from unet_core.fit import Epoch, Event, Started, Step
from unet_core.train_config import TrainConfig

PATIENT_EPOCHS = 2
"""A network may begin with one class."""


class TrainProgress:
    """Follows the events of a training; a line for each epoch stays."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("looking at the images", total=None, text="")
        self._epochs = 0
        self._names: tuple[str, ...] = ()
        self._steps = 0
        self._pace = Pace()
        self._images, self._seconds, self._waiting_s = 0, 0.0, 0.0
        self._loss: float | None = None
        self._value = ""
        self._has_warned = False

    def __enter__(self) -> "TrainProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_event(self, event: Event) -> None:
        """Show it."""
        if isinstance(event, Started):
            self._names = event.class_names
            self._steps = event.steps
            self._epochs = -(-event.steps // event.steps_per_epoch)
            self._bar.update(self._task, total=event.steps, completed=event.step)
            again = f", going on after step {event.step:,}" if event.step else ""
            self._console.print(
                f"{event.train_images:,} images to train on, {event.val_images:,} to validate "
                f"with; {event.steps:,} steps{again}"
            )
        elif isinstance(event, Step):
            self._on_step(event)
        else:
            self._on_epoch(event)

    def _on_step(self, step: Step) -> None:
        self._images += step.images
        self._seconds += step.seconds
        self._waiting_s += step.waiting_s
        self._loss = step.loss or self._loss
        text = f"{self._rate()}, {self._loss_text()}{self._value}"
        epoch = f"epoch {step.epoch + 1}/{self._epochs}"
        self._bar.update(self._task, description=epoch, completed=step.number, text=text)
        if not self._console.is_terminal and self._pace.is_due():
            at = f"{step.number:,} of {self._steps:,} steps"
            self._console.print(f"training: {at}, {epoch}, {text}")

    def _on_epoch(self, epoch: Epoch) -> None:
        names = self._names
        scores = ", ".join(
            f"{escape(name)} {score.iou:.3f}" if score.iou is not None else f"{escape(name)} –"
            for name, score in zip(names, epoch.evaluation.scores, strict=True)
        )
        self._value = f", val {self._config.train.best} "
        self._value += f"{epoch.evaluation.of(self._config.train.best):.3f}"
        self._console.print(
            f"epoch {epoch.number + 1}/{self._epochs}  loss {epoch.loss:.4f}  val IoU: {scores}  "
            f"{self._rate()}  {epoch.seconds:.1f} s{'  best' if epoch.is_best else ''}"
        )
        self._images, self._seconds, self._waiting_s = 0, 0.0, 0.0
        only = epoch.evaluation.only_class
        if only is not None and epoch.number >= PATIENT_EPOCHS and not self._has_warned:
            self._has_warned = True
            self._console.print(
                Panel(
                    f"The network predicts a single class: every validation pixel is "
                    f"{escape(names[only])!r}.\nThat means a wrong label_map, a "
                    "learning rate that is too high, or a class that is too rare (try "
                    'loss.class_weights = "balanced").',
                    title="WARNING",
                    style="bold red",
                    expand=False,
                ),
                soft_wrap=False,
            )

    def _rate(self) -> str:
        if not self._seconds:
            return "– images/s"
        waiting = self._waiting_s / self._seconds
        return f"{self._images / self._seconds:.1f} images/s, {waiting:.0%} waiting for data"

    def _loss_text(self) -> str:
        return "loss –" if self._loss is None else f"loss {self._loss:.4f}"
