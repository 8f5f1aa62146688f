"""Numbers to shapes: ticks, and paths in a square of 100 × 100 that the page stretches to fit.

Texts are no part of the square, so that they keep their size at any width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unet_core.arrays import Array

BINS = 32
MOST_POINTS = 400


@dataclass(frozen=True)
class Tick:
    """A label on an axis, at so many percent of it."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """One column of a histogram."""

    x: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A line, or the area of one share of a stack."""

    d: str
    tone: int
    """Which of the page's colours."""
    name: str
    is_area: bool = False


@dataclass(frozen=True)
class Plot:
    """A chart, without its looks."""

    title: str
    text: str
    """The same in words, for who does not see it."""
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    bars: tuple[Bar, ...] = ()
    marks: tuple[Mark, ...] = ()
    rules: tuple[Tick, ...] = ()
    """Vertical lines with a text each."""
    x_name: str = ""


@dataclass(frozen=True)
class Series:
    """Points of a line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: int = 0


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    step = _step(high - low, most)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def outward(low: float, high: float, most: int = 5) -> tuple[float, float]:
    """The range widened to round numbers."""
    step = _step(high - low, most)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _step(span: float, most: int) -> float:
    rough = (span or 1.0) / most
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def number(value: float) -> str:
    """A tick's text."""
    if value and abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{round(value, 9):,.6g}" if abs(value) < 1e6 else f"{value / 1e6:,.6g} M"


def histogram(title: str, values: Array, of: str = "images") -> Plot | None:
    """Of shares between 0 and 1; None if there is no value."""
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    least, greatest = float(known.min()), float(known.max())
    left = min(least, 0.99)  # so that one value alone has room too, also where it is 1
    low, high = outward(left, max(greatest, left + 0.01), 5)
    low, high = max(low, 0.0), min(high, 1.0)
    counts, edges = np.histogram(known, BINS, (low, high))
    top = outward(0, int(counts.max()), 3)[1]
    wide = 100 / BINS
    bars = tuple(
        Bar(n * wide, wide, 100 * int(count) / top,
            f"{edges[n]:.3f} to {edges[n + 1]:.3f}: {int(count):,} {of}")
        for n, count in enumerate(counts) if count
    )  # fmt: skip
    low_5, median = (float(q) for q in np.quantile(known, (0.05, 0.5)))
    text = (
        f"median {median:.3f}, mean {float(known.mean(dtype=np.float64)):.3f}, "
        f"5 % below {low_5:.3f}, from {least:.3f} to {greatest:.3f}"
    )
    x = _axis(ticks(low, high, 5), low, high)
    y = _axis([t for t in ticks(0, top, 3) if t == int(t)], 0, top)
    return Plot(title, text, x, y, bars)


def lines(
    title: str,
    series: list[Series],
    x_name: str,
    y_range: tuple[float, float] | None = None,
    rules: tuple[tuple[float, str], ...] = (),
) -> Plot | None:
    """Lines over a common x; None if there is no point."""
    drawn = [one for one in series if len(one.x)]
    if not drawn:
        return None
    xs = [x for one in drawn for x in (one.x[0], one.x[-1])]
    left, right = min(xs), max(xs)
    ys = np.concatenate([np.asarray(one.y, float) for one in drawn])
    low, high = y_range or outward(min(0.0, float(ys.min())), float(ys.max()) or 1.0, 4)
    marks = tuple(Mark(_path(one, (left, right), (low, high)), one.tone, one.name) for one in drawn)
    ends = "; ".join(f"{one.name} from {one.y[0]:.4g} to {one.y[-1]:.4g}" for one in drawn)
    x = _axis(ticks(left, right, 6), left, right)
    ruled = tuple(Tick(_percent(at, left, right), text) for at, text in rules)
    y = _axis(ticks(low, high, 4), low, high)
    return Plot(title, ends, x, y, marks=marks, rules=ruled, x_name=x_name)


def stack(title: str, names: list[str], shares: Array, like: Plot) -> Plot:
    """Shares (bins, parts) above each other, as steps, over the x of another plot."""
    tops = np.concatenate([np.zeros((len(shares), 1)), shares.cumsum(axis=1)], axis=1) * 100
    depths = 100 - np.repeat(tops, 2, axis=0)
    xs = np.repeat(np.linspace(0, 100, len(shares) + 1), 2)[1:-1]
    marks = []
    for part, name in enumerate(names):
        upper, lower = (
            zip(xs, depths[:, part + 1], strict=True),
            zip(xs, depths[:, part], strict=True),
        )
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in [*upper, *reversed([*lower])])
        marks.append(Mark(f"M{points}Z", part, name, is_area=True))
    mean = shares.mean(axis=0) if len(shares) else np.zeros(len(names))
    text = "; ".join(f"{name} {share:.0%}" for name, share in zip(names, mean, strict=True))
    y = tuple(Tick(at, f"{at:g} %") for at in (0, 50, 100))
    return Plot(title, text, like.x, y, marks=tuple(marks), rules=like.rules, x_name=like.x_name)


def _path(one: Series, across: tuple[float, float], up: tuple[float, float]) -> str:
    every = max(1, len(one.x) // MOST_POINTS)
    kept = [*range(0, len(one.x) - 1, every), len(one.x) - 1]
    points = [(_percent(one.x[n], *across), 100 - _percent(one.y[n], *up)) for n in kept]
    if len(points) == 1:
        points *= 2  # a round cap makes it a dot
    return "M" + " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def _percent(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / ((high - low) or 1)


def _axis(values: list[float], low: float, high: float) -> tuple[Tick, ...]:
    return tuple(Tick(_percent(value, low, high), number(value)) for value in values)
