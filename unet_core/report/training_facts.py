"""Contents of a training's report."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from unet_core.metrics import SCORE_NAMES
from unet_core.report.charts import Plot, Series, lines
from unet_core.training.training_run import BEST, Position, TrainingRun

MOST_LINES = TONES = 8
SCORES = {kind: SCORE_NAMES[kind] for kind in ("iou", "dice")}

Point = tuple[float, float]
"""A step, and a value."""
Points = dict[tuple[str, str | None], list[Point]]


@dataclass(frozen=True)
class ClassFacts:
    """One class of a training; None is undefined."""

    name: str
    color: str
    share: float | None
    """Share of the training pixels that count."""
    best: dict[str, float | None]
    """Values by score at the best step."""
    last: dict[str, float | None]


class TrainingFacts:
    """Everything on the page of a training: its ``run.json``, and how far it has come."""

    def __init__(self, run: TrainingRun) -> None:
        data, config = run.record["data"], run.record["config"]
        points: Points = defaultdict(list)
        for row in run.rows():
            found = points[row["name"], row["class"]]
            if row["value"] is not None:
                found.append((row["step"], row["value"]))
        losses = points["loss", None]
        # by class id; a checkpoint to begin with may have brought its own
        names = [n for kind, n in points if kind == "iou" and n] or config["model"]["classes"]
        pixels = dict.fromkeys(names, 0) | dict(zip(names, data["class_pixels"], strict=False))
        self.uri, self.is_finished, self.record = run.store.uri(), run.is_finished, run.record
        self.position = position = run.position()
        self.loss = _last(losses)
        self.classes = list(_classes(pixels, points, position))
        self.scores = SCORES
        self.plots = [plot for plot in _plots(points, names, position) if plot is not None]
        self.warnings = list(_warnings(run, data["steps"], position, pixels))
        is_best_last = len(losses) > 2 and position.best_step >= losses[-1][0]
        self.is_best_last = run.is_finished and is_best_last
        """True where more epochs may help."""
        self.best = f"{self.uri}/{BEST}"
        self.config = config


def _last(points: list[Point]) -> float | None:
    return points[-1][1] if points else None


def _classes(pixels: dict[str, int], points: Points, position: Position) -> Iterator[ClassFacts]:
    total = sum(pixels.values()) or 1
    for number, (name, count) in enumerate(pixels.items()):
        best = {kind: dict(points[kind, name]).get(position.best_step) for kind in SCORES}
        last = {kind: _last(points[kind, name]) for kind in SCORES}
        yield ClassFacts(name, f"var(--t{number % TONES})", count / total, best, last)


def _plots(points: Points, names: list[str], position: Position) -> Iterator[Plot | None]:
    rules = ((float(position.best_step), "best"),) if position.best is not None else ()

    def plot(title: str, *series: Series, shares: bool = False) -> Plot | None:
        return lines(title, [*series], "steps", (0.0, 1.0) if shares else None, rules)

    yield plot("Training loss", Series("loss", points["loss", None]))
    yield plot("Learning rate", Series("learning rate", points["learning_rate", None]))
    for kind, title in SCORES.items():
        hardest = _hardest(points, kind, names)
        curves = (Series(name, points[kind, name], names.index(name)) for name in hardest)
        yield plot(f"Validation {title}", *curves, shares=True)
    accuracy = Series("right pixels", points["accuracy", None])
    yield plot("Validation accuracy", accuracy, shares=True)


def _hardest(points: Points, kind: str, names: list[str]) -> list[str]:
    """All classes, or those of many that score lowest in the end."""
    last = {name: points[kind, name][-1][1] for name in names if points[kind, name]}
    kept = sorted(last, key=lambda name: last[name])[:MOST_LINES]
    return [name for name in names if name in kept]


def _warnings(
    run: TrainingRun, steps: int, position: Position, pixels: dict[str, int]
) -> Iterator[str]:
    if not run.is_finished:
        yield (
            f"Not finished: {position.step:,} of {steps:,} steps are saved; run train "
            "again to continue."
        )
    if absent := [name for name, count in pixels.items() if not count]:
        yield f"No training pixel is of class {', '.join(absent)}: it cannot be learnt."
