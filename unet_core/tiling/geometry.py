"""Tile and size arithmetic, one axis at a time.

A network moves with its input in steps of ``stride`` pixels, loses ``margin`` pixels on each side
(valid convolutions), and its logits within ``halo`` pixels of a tile's inner edge differ from those
of a pass over the whole image. So tiles begin at multiples of the stride, keep the logits that are
a halo away from their inner edges, and are shifted inward at the image's edge. Pixels of a tile
beyond the image are its reflection.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

Slices = tuple[slice, slice]


@dataclass(frozen=True)
class Sides:
    """The lengths that a network takes: ``smallest``, and every ``step`` pixels from there."""

    smallest: int
    step: int

    def __contains__(self, side: int) -> bool:
        return side >= self.smallest and (side - self.smallest) % self.step == 0

    def at_least(self, side: int) -> int:
        """The smallest allowed length that is not below ``side``."""
        return self.smallest + round_up(max(side - self.smallest, 0), self.step)

    def at_most(self, side: int) -> int:
        """The largest allowed length that is not above ``side``; ``smallest`` if there is none."""
        return max(self.smallest, self.smallest + (side - self.smallest) // self.step * self.step)

    def near(self, side: int) -> str:
        """Allowed lengths around one that is not, for a message."""
        low, high = self.at_most(side), self.at_least(side)
        return f"{low} and {high} are possible" if low != high else f"{high} is the smallest"

    def __str__(self) -> str:
        if self.step == 1:
            return f"{self.smallest} or more"
        if self.smallest == self.step:
            return f"multiples of {self.step}"
        return f"{self.smallest}, {self.smallest + self.step}, … (steps of {self.step})"


@dataclass(frozen=True)
class Tiling:
    """Sides of tiles that a network takes, and the part of their logits that is exact."""

    sides: Sides
    stride: int
    margin: int
    """Pixels lost on each side of a tile."""
    halo: int
    """Logits at a tile's inner edge that differ; a multiple of the stride."""
    receptive_field: int
    """Pixels along an axis that one logit depends on, at most; 0 if on all of them."""
    is_exact: bool
    """True if tiles can reproduce the pass over a whole image."""
    channels: int
    """Float values per pixel at the widest place, which decide how much memory a batch takes."""

    @property
    def tile_sides(self) -> Sides:
        """The sides of tiles, all the same modulo the stride also where a network takes any."""
        if self.sides.step >= self.stride:
            return self.sides
        return Sides(round_up(self.sides.smallest, self.stride), self.stride)

    @property
    def smallest_tile(self) -> int:
        """The smallest side of a tile that keeps a stride of pixels between its halos."""
        return self.tile_sides.at_least(2 * (self.margin + self.halo) + self.stride)

    def aligned(self) -> "Tiling":
        """The same network on sides that stay what they are when images are flipped."""
        return replace(self, sides=self.tile_sides)


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in pixels of the image: compute [start, stop), which may lie
    beyond the image, keep the logits of [keep_start, keep_stop).
    """

    start: int
    stop: int
    keep_start: int
    keep_stop: int


@dataclass(frozen=True)
class Tile:
    """The input of the network for one part of an image, as two spans."""

    y: Span
    x: Span

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.y.stop - self.y.start, self.x.stop - self.x.start

    def kept(self, margin: int) -> Slices:
        """The kept part in the coordinates of the tile's logits."""
        y, x = self.y.start + margin, self.x.start + margin
        rows, columns = self.target
        return slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x)

    @property
    def target(self) -> Slices:
        """The kept part in the coordinates of the image."""
        y, x = self.y, self.x
        return slice(y.keep_start, y.keep_stop), slice(x.keep_start, x.keep_stop)


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple that is not below ``length``."""
    return -(-length // multiple) * multiple


def exact_spans(length: int, size: int, tiling: Tiling) -> list[Span]:
    """Cut an axis of ``length`` pixels into tiles whose kept parts cover it once: as few as with
    tiles of ``size``, and then as small as so many can be.

    One tile if the axis fits. Otherwise all tiles have the same size; the last may be shorter
    where the network takes any. Raises ValueError if ``size`` leaves nothing to keep.
    """
    margin = tiling.margin
    total = tiling.sides.at_least(length + 2 * margin)
    if total <= size:
        return [Span(-margin, total - margin, 0, length)]
    if size not in tiling.tile_sides or size < tiling.smallest_tile:
        raise ValueError(f"no exact tiles: {length=} {size=} {tiling=}")
    most = len(_spans(length, size, tiling))
    shared = total + 2 * (most - 1) * (margin + tiling.halo)
    size = tiling.tile_sides.at_least(max(-(-shared // most), tiling.smallest_tile))
    while len(spans := _spans(length, size, tiling)) > most:
        size += tiling.tile_sides.step
    return spans


def _spans(length: int, size: int, tiling: Tiling) -> list[Span]:
    margin, halo, stride = tiling.margin, tiling.halo, tiling.stride
    total = tiling.sides.at_least(length + 2 * margin)
    last = round_up(total - size, stride)
    result: list[Span] = []
    kept = 0
    while kept < length:
        start = min(max(kept - halo, 0) // stride * stride, last)
        stop = min(start + size, total)
        inner = stop - 2 * margin - halo
        keep_stop = length if stop == total else min(inner, length)
        result.append(Span(start - margin, stop - margin, kept, keep_stop))
        kept = keep_stop
    return result


def overlapping_spans(length: int, size: int, tiling: Tiling) -> list[Span]:
    """Cut an axis into tiles of ``size`` that overlap by half and keep all that they give."""
    margin = tiling.margin
    total = tiling.sides.at_least(length + 2 * margin)
    size = min(size, total)
    out = size - 2 * margin
    starts = [*range(0, total - size, max(1, out // 2)), total - size]
    return [
        Span(start - margin, start - margin + size, start, min(start + out, length))
        for start in starts
        if start < length
    ]


MASK_WINDOW_PIXELS = 64 * 2**20  # part of the format: larger images have several mask windows
MASK_WINDOW_SIDE = 4096  # part of the format


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    y: int
    x: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def slices(self) -> Slices:
        """Rows and columns as slices."""
        return slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)

    def intersection(self, rows: slice, columns: slice) -> tuple[Slices, Slices]:
        """Intersect with rows and columns: slices from its corner and from theirs, maybe empty."""
        here, there = [], []
        for at, length, other in ((self.y, self.height, rows), (self.x, self.width, columns)):
            start = max(at, other.start)
            stop = max(start, min(at + length, other.stop))
            here.append(slice(start - at, stop - at))
            there.append(slice(start - other.start, stop - other.start))
        return (here[0], here[1]), (there[0], there[1])


def mask_windows(height: int, width: int) -> list[Box]:
    """Cut an image into mask windows, the rows of the masks part.

    An image up to 64 Mpx is one window; a larger one is cut into windows of 4096² from (0, 0).
    """
    if height * width <= MASK_WINDOW_PIXELS:
        return [Box(0, 0, height, width)]
    side = MASK_WINDOW_SIDE
    return [
        Box(y, x, min(side, height - y), min(side, width - x))
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]
