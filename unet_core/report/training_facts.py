"""Contents of a training's report."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from unet_core.metrics import SCORE_NAMES
from unet_core.report.charts import Plot, Points, lines
from unet_core.training.training_run import BEST, TrainingRun, TrainingState

MOST_LINES = TONES = 8
SCORES = {kind: SCORE_NAMES[kind] for kind in ("iou", "dice")}

Curves = dict[tuple[str, str | None], Points]
"""Values by step, by name and class."""


class TrainingFacts:
    """Everything on the page of a training: its ``run.json``, and its progress."""

    def __init__(self, run: TrainingRun) -> None:
        data, self.config = run.document["data"], run.document["config"]
        curves: Curves = defaultdict(list)
        for row in run.rows():
            points = curves[row["name"], row["class"]]
            if row["value"] is not None:
                points.append((row["step"], row["value"]))
        losses = curves["loss", None]
        # by class id; a checkpoint to begin with may have brought its own
        names = [n for kind, n in curves if kind == "iou" and n] or self.config["model"]["classes"]
        pixels = dict.fromkeys(names, 0) | dict(zip(names, data["class_pixels"], strict=False))
        self.uri, self.is_finished, self.record = run.store.uri(), run.is_finished, run.document
        self.position = position = run.position()
        self.loss = _last(losses)
        self.classes = list(_classes(pixels, curves, position.best_step))
        self.scores = SCORES
        self.plots = list(_plots(curves, names, position))
        self.absent = [name for name, count in pixels.items() if not count]
        """Classes without a pixel in the training images."""
        self.is_best_last = (
            run.is_finished
            and len(losses) > 2
            and position.best is not None
            and position.best_step >= losses[-1][0]
        )
        """True where more epochs may help."""
        self.best = f"{self.uri}/{BEST}"


def _last(points: Points) -> float | None:
    return points[-1][1] if points else None


def _classes(pixels: dict[str, int], curves: Curves, best_step: int) -> Iterator[dict[str, Any]]:
    """Describe each class: its share of the training pixels that count, its scores at the best step
    and in the last epoch; None is undefined.
    """
    total = sum(pixels.values()) or 1
    for number, (name, count) in enumerate(pixels.items()):
        yield {
            "name": name,
            "color": f"var(--t{number % TONES})",
            "share": count / total,
            "best": {kind: dict(curves[kind, name]).get(best_step) for kind in SCORES},
            "last": {kind: _last(curves[kind, name]) for kind in SCORES},
        }


def _plots(curves: Curves, names: list[str], position: TrainingState) -> Iterator[Plot]:
    rules = ((float(position.best_step), "best"),) if position.best is not None else ()
    drawn = {
        "Training loss": {"loss": curves["loss", None]},
        "Learning rate": {"learning rate": curves["learning_rate", None]},
        **{f"Validation {title}": _hardest(curves, kind, names) for kind, title in SCORES.items()},
        "Validation accuracy": {"right pixels": curves["accuracy", None]},
    }
    for title, series in drawn.items():
        if any(series.values()):
            y_range = (0.0, 1.0) if title.startswith("Validation") else None
            yield lines(title, series, "steps", y_range, rules)


def _hardest(curves: Curves, kind: str, names: list[str]) -> dict[str, Points]:
    """Select the curves of all classes, or of many those that end lowest; the others are empty."""
    last = {name: curves[kind, name][-1][1] for name in names if curves[kind, name]}
    kept = sorted(last, key=lambda name: last[name])[:MOST_LINES]
    return {name: curves[kind, name] if name in kept else [] for name in names}
