"""The learning curves as a picture: loss and learning rate, scores of the validation images."""

import io
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

Series = dict[tuple[str, str | None], list[tuple[int, float]]]


def draw(rows: Iterable[dict[str, Any]], title: str) -> bytes:
    """PNG bytes of the history's curves over optimiser steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series: Series = defaultdict(list)
    for row in rows:
        if row["value"] is not None:
            series[row["name"], row["class"]].append((row["step"], row["value"]))
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _plot(left, {"loss": series["loss", None]}, "training loss")
    rate = left.twinx()
    rate.plot(*_columns(series["learning_rate", None]), color="0.7", linewidth=1)
    rate.set_ylabel("learning rate", color="0.5")
    scores = {f"IoU {c}": at for (name, c), at in series.items() if name == "iou"}
    _plot(right, scores | {"accuracy": series["accuracy", None]}, "validation")
    right.set_ylim(0, 1)
    right.legend(loc="lower right", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _plot(axes: Any, lines: dict[str, list[tuple[int, float]]], title: str) -> None:
    for name, points in lines.items():
        axes.plot(*_columns(points), label=name, marker="." if len(points) < 30 else None)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
