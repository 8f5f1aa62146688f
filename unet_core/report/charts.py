"""Charts as shapes: ticks, and paths in a square of 100 × 100 that the page stretches to fit.

Texts are no part of the square, so that they keep their size at any width.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import starmap

import numpy as np

from unet_core.arrays import Array

BINS = 32
GAP = 0.2
"""Space on each side of a bar."""
MOST_POINTS = 400

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A label at a percentage of an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A ``line``, a ``bar`` of a histogram, or the ``area`` of one share of a stack."""

    kind: str
    name: str
    d: str
    """SVG path."""
    tone: int = 0
    """Number among the page's colours."""


@dataclass(frozen=True)
class Plot:
    """A chart, without its looks."""

    title: str
    text: str
    """Summary in words, for readers who cannot see the chart."""
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    rules: tuple[Tick, ...] = ()
    """Vertical lines with their texts."""
    x_name: str = ""


def histogram(title: str, values: Array) -> Plot:
    """Plot how images spread over shares between 0 and 1; at least one finite value is needed."""
    least, low_5, median, greatest = np.quantile(values, (0, 0.05, 0.5, 1)).tolist()
    left = min(least, 0.99)  # so that one value alone has room too, also where it is 1
    low, high = np.clip(_outward(left, max(greatest, left + 0.01), 5), 0, 1).tolist()
    counts, edges = np.histogram(values, BINS, (low, high))
    top = _outward(0, int(counts.max()), 3)[1]
    lefts = np.linspace(0, 100, BINS + 1) + GAP
    bars = tuple(
        Mark(
            "bar",
            f"{edges[n]:.3f} to {edges[n + 1]:.3f}: {count:,} images",
            f"M{lefts[n]:.2f},100V{100 - 100 * count / top:.2f}H{lefts[n + 1] - 2 * GAP:.2f}V100Z",
        )
        for n, count in enumerate(counts.tolist())
        if count
    )
    text = (
        f"median {median:.3f}, mean {float(values.mean(dtype=np.float64)):.3f}, "
        f"5 % below {low_5:.3f}, from {least:.3f} to {greatest:.3f}"
    )
    return Plot(title, text, _axis(low, high, 5), _axis(0, top, 3, least_step=1), bars)


def lines(
    title: str,
    series: dict[str, Points],
    x_name: str,
    y_range: tuple[float, float] | None = None,
    rules: tuple[tuple[float, str], ...] = (),
) -> Plot:
    """Plot lines by name over a common x, those without a point left out; one point is needed."""
    xs, ys = np.concatenate([np.asarray(points, float) for points in series.values() if points]).T
    left, right = float(xs.min()), float(xs.max())
    low, high = y_range or _outward(min(0.0, float(ys.min())), float(ys.max()) or 1.0, 4)
    drawn = [(tone, *line) for tone, line in enumerate(series.items()) if line[1]]

    def place(x: float, y: float) -> tuple[float, float]:
        return _percent(x, left, right), 100 - _percent(y, low, high)

    return Plot(
        title,
        "; ".join(f"{n} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for _, n, points in drawn),
        _axis(left, right, 6),
        _axis(low, high, 4),
        tuple(
            Mark("line", name, _path(starmap(place, _thinned(points))), tone)
            for tone, name, points in drawn
        ),
        tuple(Tick(_percent(at, left, right), text) for at, text in rules),
        x_name,
    )


def _thinned(points: Points) -> Points:
    """Keep about ``MOST_POINTS`` and the last one; a single point is given twice, as a dot."""
    every = max(1, len(points) // MOST_POINTS)
    return [*(points[:-1:every] or points), points[-1]]


def stack(title: str, names: list[str], shares: Array, like: Plot) -> Plot:
    """Plot shares (bins, parts) above each other, as steps, over the x of another plot."""
    tops = np.pad(shares.cumsum(axis=1), ((0, 0), (1, 0)))
    depths = 100 - 100 * np.repeat(tops, 2, axis=0)
    xs = np.repeat(np.linspace(0, 100, len(shares) + 1), 2)[1:-1]
    borders = [np.stack([xs, depth], axis=1) for depth in depths.T]
    marks = tuple(
        Mark("area", name, _path([*borders[part + 1], *borders[part][::-1]]) + "Z", part)
        for part, name in enumerate(names)
    )
    means = zip(names, shares.mean(axis=0), strict=True)
    text = "; ".join(f"{name} {share:.0%}" for name, share in means)
    y = tuple(Tick(at, f"{at:g} %") for at in (0, 50, 100))
    return replace(like, title=title, text=text, y=y, marks=marks)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + " ".join(f"{x:.2f},{y:z.2f}" for x, y in points)


def _axis(low: float, high: float, most: int, least_step: float = 0.0) -> tuple[Tick, ...]:
    """Place ticks at round numbers from ``low`` to ``high``."""
    step = max(least_step, _step(high - low, most))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return tuple(Tick(_percent(n * step, low, high), _number(n * step)) for n in numbers)


def _outward(low: float, high: float, most: int) -> tuple[float, float]:
    """Widen a range to round numbers."""
    step = _step(high - low, most)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _step(span: float, most: int) -> float:
    rough = (span or 1.0) / most
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _percent(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / ((high - low) or 1)


def _number(value: float) -> str:
    if value and abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{round(value, 9):,.6g}" if abs(value) < 1e6 else f"{value / 1e6:,.6g} M"
