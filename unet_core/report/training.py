"""What there is to say of a training."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from unet_core.config import InputConfig, PredictConfig, build
from unet_core.report.charts import Plot, Series, lines
from unet_core.report.command import command, toml
from unet_core.train_config import TrainConfig
from unet_core.training.dataset import TRAIN, VAL
from unet_core.training.run import BEST, Position, TrainingRun

MOST_LINES = TONES = 8
SCORES = {"iou": "IoU", "dice": "Dice"}

Points = dict[tuple[str, str | None], list[tuple[int, float]]]


@dataclass(frozen=True)
class ClassFacts:
    """One class of a training; None is undefined."""

    name: str
    color: str
    share: float | None
    """Of the training pixels that count."""
    best: dict[str, float | None]
    """By score, at the best step."""
    last: dict[str, float | None]


@dataclass(frozen=True)
class TrainingFacts:
    """Everything on the page of a training."""

    uri: str
    is_finished: bool
    position: Position
    steps: int
    metric: str
    train_images: int
    val_images: int
    loss: float | None
    classes: tuple[ClassFacts, ...]
    scores: dict[str, str]
    plots: tuple[Plot, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    best: str
    look: str
    """The command that shows them on the images of the training."""
    command: str
    config: str
    versions: dict[str, str]
    identity: dict[str, str]


def training_facts(run: TrainingRun) -> TrainingFacts:
    """Read ``run.json``, the history, and how far it has come."""
    record, data, position = run.record, run.record["data"], run.position()
    rows = run.rows()
    points, config = _points(rows), record["config"]
    names = _class_names(rows) or config["model"]["classes"]
    losses = points["loss", None]
    uri = run.store.uri()
    best = f"{uri}/{BEST}"
    return TrainingFacts(
        uri=uri,
        is_finished=run.is_finished,
        position=position,
        steps=data["steps"],
        metric=config["train"]["best"],
        train_images=data[TRAIN],
        val_images=data[VAL],
        loss=losses[-1][1] if losses else None,
        classes=_classes(names, data["class_pixels"], points, position),
        scores=SCORES,
        plots=tuple(plot for plot in _plots(points, names, position) if plot is not None),
        warnings=tuple(_warnings(run, position, names)),
        notes=tuple(_notes(run, position, points)),
        best=best,
        look=_look(config["data"]["val"] or config["data"]["train"], best),
        command=_command(config, uri),
        config=toml(config),
        versions={"unet-jobs": record["version"]},
        identity={"fingerprint": record["fingerprint"]},
    )


def _points(rows: list[dict[str, Any]]) -> Points:
    found: Points = defaultdict(list)
    for row in rows:
        if row["value"] is not None:
            found[row["name"], row["class"]].append((row["step"], row["value"]))
    return found


def _class_names(rows: list[dict[str, Any]]) -> list[str]:
    """By class id; a checkpoint to begin with may have brought its own."""
    return list(dict.fromkeys(row["class"] for row in rows if row["name"] == "iou"))


def _classes(
    names: list[str], pixels: list[int], points: Points, position: Position
) -> tuple[ClassFacts, ...]:
    total = sum(pixels) or 1
    shares = [count / total for count in pixels] + [0.0] * (len(names) - len(pixels))

    def score(name: str, of_class: str, step: int | None) -> float | None:
        found = points.get((name, of_class), [])
        at = [value for when, value in found if step is None or when == step]
        return at[-1] if at else None

    return tuple(
        ClassFacts(
            name,
            f"var(--t{number % TONES})",
            share,
            {kind: score(kind, name, position.best_step) for kind in SCORES},
            {kind: score(kind, name, None) for kind in SCORES},
        )
        for number, (name, share) in enumerate(zip(names, shares, strict=True))
    )


def _plots(points: Points, names: list[str], position: Position) -> list[Plot | None]:
    rules = ((float(position.best_step), "best"),) if position.best is not None else ()
    plots = [
        lines("Training loss", [_series("loss", points["loss", None])], "steps", rules=rules),
        lines(
            "Learning rate", [_series("learning rate", points["learning_rate", None])], "steps",
            rules=rules,
        ),
    ]  # fmt: skip
    for kind, title in SCORES.items():
        series = [
            _series(name, points[kind, name], names.index(name))
            for name in _hardest(points, kind, names)
        ]
        plots.append(lines(f"Validation {title}", series, "steps", (0.0, 1.0), rules))
    accuracy = _series("right pixels", points["accuracy", None])
    plots.append(lines("Validation accuracy", [accuracy], "steps", (0.0, 1.0), rules))
    return plots


def _hardest(points: Points, kind: str, names: list[str]) -> list[str]:
    """All classes, or those of many that score lowest in the end."""
    last = {name: points[kind, name][-1][1] for name in names if points[kind, name]}
    kept = sorted(last, key=lambda name: last[name])[:MOST_LINES]
    return [name for name in names if name in kept]


def _series(name: str, points: list[tuple[int, float]], tone: int = 0) -> Series:
    return Series(name, [step for step, _ in points], [value for _, value in points], tone)


def _warnings(run: TrainingRun, position: Position, names: list[str]) -> list[str]:
    data, found = run.record["data"], []
    if not run.is_finished:
        found.append(
            f"Not finished: {position.step:,} of {data['steps']:,} steps are saved; run train "
            "again to continue."
        )
    pixels = [*data["class_pixels"], *[0] * (len(names) - len(data["class_pixels"]))]
    absent = [name for name, count in zip(names, pixels, strict=True) if not count]
    if absent:
        found.append(f"No training pixel is of class {', '.join(absent)}: it cannot be learnt.")
    return found


def _notes(run: TrainingRun, position: Position, points: Points) -> list[str]:
    losses = points["loss", None]
    if run.is_finished and len(losses) > 2 and position.best_step >= losses[-1][0]:
        return ["The last epoch was the best one: more epochs may help."]
    return []


def _command(config: dict[str, Any], uri: str) -> str:
    train = config["data"]["train"]
    verb = ["train", train["uri"], train["masks"], "--out", uri]
    told = {"data.train.uri", "output.uri"} | (
        {"data.train.masks"} if "/" in train["masks"] else set()
    )
    places = {"data": {"train": {"uri": train["uri"], "masks": train["masks"]}},
              "output": {"uri": uri}}  # fmt: skip
    defaults = build(TrainConfig, places, []).model_dump(mode="json")
    if "/" not in train["masks"]:
        defaults["data"]["train"]["masks"] = ""  # a plain word would be a folder
    if config["data"]["val"] is not None:
        defaults["data"]["val"] = defaults["data"]["train"] | {"uri": "", "masks": ""}
    return command(verb, config, defaults, told)


def _look(data: dict[str, Any], best: str) -> str:
    """Segments labelled images with the best weights; a truth of objects is no truth of classes."""
    left_out = {"masks", "label_map"} if data["instances"] else set()
    given = {k: v for k, v in data.items() if k in InputConfig.model_fields and k not in left_out}
    places = {"input": {"uri": data["uri"]}, "output": {"uri": "RUN"}}
    defaults = build(PredictConfig, places, []).model_dump(mode="json")
    verb = ["predict", data["uri"], "--model", best, "--out", "RUN"]
    return command(verb, {"input": given}, defaults, {"input.uri"})
