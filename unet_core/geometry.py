"""Tile and size arithmetic, one axis at a time.

A padded U-Net with p pools moves with its input in steps of ``stride = 2**p`` pixels, and an
output pixel sees at most ``reach`` pixels to each side. A window that begins at a multiple of the
stride and carries a halo of at least ``reach`` pixels therefore reproduces the whole-image pass,
if windows at the image's edge are shifted inward instead of being mirrored.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One window along one axis, in pixels: compute [start, stop), keep [keep_start, keep_stop)."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


@dataclass(frozen=True)
class Tile:
    """A window of one image: two spans, and the part of it that the mask takes."""

    y: Span
    x: Span

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the window in pixels."""
        return self.y.stop - self.y.start, self.x.stop - self.x.start


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple that is not below ``length``."""
    return -(-length // multiple) * multiple


def reach(depth: int) -> int:
    """How far, in pixels, an output pixel of a same-padded U-Net with ``depth`` pools sees.

    Follows the interval of inputs that one output pixel needs down through the network (two 3×3
    convolutions a block, 2×2 pools, 2×2 transposed convolutions), for each of the 2**depth phases.
    """

    def needs(low: int, high: int, level: int) -> tuple[int, int]:
        low, high = low - 2, high + 2  # the decoder block, or the bottom block
        if level == depth:
            return low, high
        deep_low, deep_high = needs(low // 2, high // 2, level + 1)
        encoded = min(low, 2 * deep_low), max(high, 2 * deep_high + 1)
        return encoded[0] - 2, encoded[1] + 2  # the encoder block, which feeds skip and pool

    spans = [(phase, *needs(phase, phase, 0)) for phase in range(2**depth)]
    return max(max(at - low, high - at) for at, low, high in spans)


def spans(length: int, size: int, halo: int, stride: int) -> list[Span]:
    """Cut an axis of ``length`` pixels (a multiple of ``stride``) into windows of ``size``.

    One window if the axis fits. Otherwise all windows have the same size, begin at multiples of
    the stride, and the last is shifted inward; each keeps what lies a halo away from its inner
    edges, so that the kept parts cover the axis once.
    """
    if length <= size:
        return [Span(0, length, 0, length)]
    step = size - 2 * halo
    if step < stride or size % stride or halo % stride or length % stride:
        raise ValueError(f"no exact windows: {length=} {size=} {halo=} {stride=}")
    result: list[Span] = []
    kept = 0
    while kept < length:
        start = min(max(kept - halo, 0), length - size)
        stop = start + size
        keep_stop = length if stop == length else stop - halo
        result.append(Span(start, stop, kept, keep_stop))
        kept = keep_stop
    return result


def tiles(height: int, width: int, size: int, halo: int, stride: int) -> list[Tile]:
    """Windows over an image of ``height`` × ``width`` pixels, row by row.

    Spans may end beyond the image: an axis is first rounded up to the stride, and whoever cuts the
    window fills that rest by reflection. Kept parts end at the image.
    """

    def axis(length: int) -> list[Span]:
        return [
            Span(s.start, s.stop, s.keep_start, min(s.keep_stop, length))
            for s in spans(round_up(length, stride), size, halo, stride)
            if s.keep_start < length
        ]

    return [Tile(y, x) for y in axis(height) for x in axis(width)]


MASK_WINDOW_PIXELS = 64 * 2**20
MASK_WINDOW_SIDE = 4096


def mask_windows(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Rows of the masks part for one image as (y, x, height, width), in pixels.

    An image up to 64 Mpx is one window; a larger one is cut into windows of 4096² from (0, 0).
    """
    if height * width <= MASK_WINDOW_PIXELS:
        return [(0, 0, height, width)]
    side = MASK_WINDOW_SIDE
    return [
        (y, x, min(side, height - y), min(side, width - x))
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]
