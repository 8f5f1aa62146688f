"""What people see while a network is trained."""

from rich.markup import escape

from jobs.progress import Display
from unet_core.config.train import TrainConfig
from unet_core.training.fit import Epoch, Event, Started, Step

PATIENT_EPOCHS = 2
"""A network may begin with one class."""


class TrainProgress(Display):
    """Follows the events of a training; a line for each epoch stays."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__("looking at the images")
        self._best = config.train.best
        self._names: tuple[str, ...] = ()
        self._steps = self._epochs = 0
        self._images, self._seconds, self._waiting_s = 0, 0.0, 0.0
        self._loss, self._value = "–", ""
        self._has_warned = False

    def on_event(self, event: Event) -> None:
        """Show it."""
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

    def _on_step(self, step: Step) -> None:
        self._images += step.images
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

    def _on_epoch(self, epoch: Epoch) -> None:
        validation = epoch.validation
        scores = ", ".join(
            f"{escape(name)} {'–' if score.iou is None else f'{score.iou:.3f}'}"
            for name, score in zip(self._names, validation.scores, strict=True)
        )
        self._value = f", val {self._best} {validation.of(self._best):.3f}"
        self.console.print(
            f"epoch {epoch.number + 1}/{self._epochs}  loss {epoch.loss:.4f}  val IoU: {scores}  "
            f"{self._rate()}  {epoch.seconds:.1f} s{'  best' if epoch.is_best else ''}"
        )
        self._images, self._seconds, self._waiting_s = 0, 0.0, 0.0
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
        if not self._seconds:
            return "– images/s"
        waiting = self._waiting_s / self._seconds
        return f"{self._images / self._seconds:.1f} images/s, {waiting:.0%} waiting for data"
