"""A guard against stretching noise: does an image show more than noise and an uneven background?

The stretch between an image's own percentiles turns noise into objects where there is nothing else.
Measured here are the noise, the variation of the background and the local contrast of each channel,
from integer differences and sums, so equal on every machine. H W rows and columns.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from unet_core.arrays import Array
from unet_core.images.preprocessing import Limits, known_of
from unet_core.images.raster import Raster
from unet_core.tiling.geometry import Box

WINDOW = 2048
"""Side of the windows that are measured one by one: the same ones, however an image is read."""
LAG = 8
"""Pixels between the two of a difference: farther than blur reaches, nearer than light changes."""
SIGMAS = 0.954
"""Median of |a − b| for normal a and b, in standard deviations."""
PATCH, BLOCK, COARSE = 8, 32, 5
"""Side of the smallest patch that may be an object, and of the blocks whose patches are compared,
in pixels; and coarse blocks along an image, between which the background may vary."""
EVIDENCE = 6
"""Contrast of a patch, in deviations of the noise, that noise alone does not reach."""
MANY, LARGE = 0.04, 5
"""An image shows something, too, if this share of differences is larger than so many deviations."""
EMPTY = 0.1
"""Value of the brightest pixel, after normalization, of an image that shows nothing: about that of
the background of images with objects."""


class Stretch(NamedTuple):
    """Noise and variation of the background after normalization: larger, the more an image was
    stretched.
    """

    noise: float = 0.0
    background: float = 0.0

    def __or__(self, other: "Stretch") -> "Stretch":
        """Return the larger of each."""
        return Stretch(*map(max, self, other))


NO_STRETCH = Stretch()


class Content(NamedTuple):
    """Noise, contrast and background of a channel, in pixel values."""

    noise: float
    """Standard deviation of the noise."""
    difference: float
    """Largest difference of pixels ``LAG`` apart but for ``MANY`` of them."""
    contrast: float
    """Largest difference of the darkest pixels of two patches in a block."""
    darkest: float
    """Least of the backgrounds of coarse blocks."""
    lightest: float
    top: float
    """Largest value."""

    def stretch(self, limits: Limits) -> Stretch:
        """Return the stretch by these limits; 0 for limits without a span."""
        span = limits.span or np.inf
        return Stretch(self.noise / span, (self.lightest - self.darkest) / span)

    def guarded(self, limits: Limits, trained: Stretch) -> Limits:
        """Widen limits until the stretch is not beyond a trained one."""
        span = max(
            limits.span,
            self.noise / trained.noise,
            (self.lightest - self.darkest) / trained.background,
        )
        shows = self.contrast >= EVIDENCE * self.noise or self.difference >= LARGE * self.noise
        if not shows or not self.noise:
            span = max(span, (self.top - limits.offset) / EMPTY)
        return Limits(limits.offset, span)


def measure_content(raster: Raster, on_step: Callable[[], None]) -> list[Content]:
    """Measure the content of each channel of an image, from the samples that are known."""
    windows = [_of_window(raster, box, on_step) for box in _windows(*raster.shape)]
    return [_joined([c for c in contents if c]) for contents in zip(*windows, strict=True)]


def _windows(height: int, width: int) -> Iterator[Box]:
    for y in range(0, height, WINDOW):
        for x in range(0, width, WINDOW):
            yield Box(y, x, min(WINDOW, height - y), min(WINDOW, width - x))


def _of_window(raster: Raster, box: Box, on_step: Callable[[], None]) -> list[Content | None]:
    on_step()
    window = raster.read(box)
    known_CHW = known_of(window)
    if known_CHW is None:
        return [_content(plane_HW, None) for plane_HW in window.pixels_CHW]
    known_CHW = np.broadcast_to(known_CHW, window.pixels_CHW.shape)
    return [*map(_content, window.pixels_CHW, known_CHW)]


def _joined(contents: list[Content]) -> Content:
    """Join the contents of windows: the median of noise, the extremes of all else."""
    if not contents:
        return Content(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    noise, difference, contrast, darkest, lightest, top = zip(*contents, strict=True)
    middle = sorted(noise)[(len(noise) - 1) // 2]
    return Content(middle, max(difference), max(contrast), min(darkest), max(lightest), max(top))


def _content(plane_HW: Array, known_HW: Array | None) -> Content | None:
    """Measure a channel of a window; None if nothing of it is known."""
    known_HW = np.broadcast_to(True, plane_HW.shape) if known_HW is None else known_HW
    if not known_HW.any():
        return None
    noise, difference = _noise(plane_HW[::LAG], known_HW[::LAG])
    floors = _floors(plane_HW, known_HW)
    regions = _of_blocks(np.minimum, floors, *(max(2, side // COARSE) for side in floors.shape))
    backgrounds = regions[np.isfinite(regions)] if np.isfinite(regions).any() else np.zeros(1)
    contrast = math.inf
    if not difference >= LARGE * noise > 0:  # else patches have nothing to add
        highest = _highest_patches(plane_HW, known_HW, floors.shape)
        contrast = float(np.max(highest - floors, initial=0.0, where=np.isfinite(floors)))
    top = plane_HW.max(where=known_HW, initial=plane_HW.dtype.type(0))
    return Content(
        noise, difference, contrast, float(backgrounds.min()), float(backgrounds.max()), float(top)
    )


def _noise(rows_HW: Array, known_HW: Array) -> tuple[float, float]:
    """Estimate the deviation of the noise by differences of pixels ``LAG`` apart, in rows that lie
    ``LAG`` apart; also return the difference that ``MANY`` of them exceed.

    Noise is at least that of rounding: half of the least difference.
    """
    noise, step, many = 0.0, math.inf, 0.0
    along, down = (np.s_[::2, LAG:], np.s_[::2, :-LAG]), (np.s_[1::2], np.s_[:-1:2])
    for far, near in (along, down):
        a, b = rows_HW[far], rows_HW[near]
        is_known = known_HW[far] & known_HW[near]
        found = (np.maximum(a, b) - np.minimum(a, b))[is_known]  # unsigned types have no signs
        if found.size:
            ranks = [(found.size - 1) // 2, found.size - 1 - int(MANY * found.size)]
            middle, large = np.partition(found, ranks)[ranks].tolist()
            noise, many = max(noise, middle), max(many, large)
            if found.any():
                step = min(step, float(found[found > 0].min()))
    return max(noise, 0.0 if step == math.inf else step / 2) / SIGMAS, many


def _quads(upper: Array, lower: Array, known_upper: Array, known_lower: Array) -> Array:
    """Compute means of 2 × 2 pixels, which quiet the noise; NaN where one is not known."""
    sums = upper.astype(np.float32) + lower.astype(np.float32)
    sums[~(known_upper & known_lower)] = np.nan
    return (sums[:, :-1] + sums[:, 1:]) / 4


def _floors(plane_HW: Array, known_HW: Array) -> Array:
    """Find the background of each block: the second smallest of the minima of every ``LAG``-th row,
    so that one dead pixel does not count; infinite where too little is known.
    """
    end = plane_HW.shape[0] - 1
    if end < 1 or plane_HW.shape[1] < 2:
        return np.full((1, 1), np.inf)
    upper, lower = slice(0, end, LAG), slice(1, end + 1, LAG)
    rows = _quads(plane_HW[upper], plane_HW[lower], known_HW[upper], known_HW[lower])
    rows[np.isnan(rows)] = np.inf
    per, width = min(BLOCK // LAG, rows.shape[0]), min(BLOCK, rows.shape[1])
    down, across = rows.shape[0] // per, rows.shape[1] // width  # a rest at an end is left out
    blocks = rows[: down * per, : across * width].reshape(down, per, across, width)
    return np.sort(blocks.min(axis=3), axis=1)[:, min(1, per - 1)]


def _highest_patches(plane_HW: Array, known_HW: Array, shape: tuple[int, ...]) -> Array:
    """Find the lightest patch that begins in each block, by its darkest 2 × 2 pixels; minus
    infinity where none is known.
    """
    highest = np.full(shape, -np.inf, np.float32)
    if min(plane_HW.shape) < PATCH:
        return highest
    end = plane_HW.shape[0] // 2 * 2
    upper, lower = slice(0, end, 2), slice(1, end, 2)
    least = _quads(plane_HW[upper], plane_HW[lower], known_HW[upper], known_HW[lower])
    least = np.minimum(least[:-1], least[1:])
    least = np.minimum(least[:-2], least[2:])[::2]  # of patches that begin at every 4th row
    for step in (1, 2, 3):
        least = np.minimum(least[:, :-step], least[:, step:])
    least[np.isnan(least)] = -np.inf
    for axis, side in enumerate((BLOCK // 4, BLOCK)):
        starts = np.arange(shape[axis]) * side
        least = np.maximum.reduceat(least, starts[starts < least.shape[axis]], axis=axis)
    highest[: least.shape[0], : least.shape[1]] = least
    return highest


def _of_blocks(extreme: np.ufunc, values: Array, rows: int, columns: int) -> Array:
    """Reduce blocks of an array to their extremes; the rest at an end belongs to the last block."""
    for axis, side in enumerate((rows, columns)):
        starts = np.arange(max(1, values.shape[axis] // side)) * side
        values = extreme.reduceat(values, starts, axis=axis)
    return values
