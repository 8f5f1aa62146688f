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
        if not shows:
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
    noise, difference = _noise(plane_HW, known_HW)
    lows, highs = _patches(plane_HW, known_HW)
    # patches begin at every 4th row and at every column
    lows = _of_blocks(np.minimum, lows, BLOCK // 4, BLOCK)
    contrast = float((_of_blocks(np.maximum, highs, BLOCK // 4, BLOCK) - lows).max(initial=0))
    coarse = _of_blocks(np.minimum, lows, *(max(2, side // COARSE) for side in lows.shape))
    backgrounds = coarse[np.isfinite(coarse)] if np.isfinite(coarse).any() else np.zeros(1)
    top = plane_HW.max(where=known_HW, initial=plane_HW.dtype.type(0))
    return Content(
        noise, difference, contrast, float(backgrounds.min()), float(backgrounds.max()), float(top)
    )


def _noise(plane_HW: Array, known_HW: Array) -> tuple[float, float]:
    """Estimate the deviation of the noise by differences of pixels ``LAG`` apart, in every
    ``LAG``-th row; also return the difference that ``MANY`` of them exceed.

    Noise is at least that of rounding: half of the least difference.
    """
    rows_HW, known_HW = plane_HW[::LAG], known_HW[::LAG]
    noise, step, many = 0.0, math.inf, 0.0
    for far, near in (np.s_[:, LAG:], np.s_[:, :-LAG]), (np.s_[1:], np.s_[:-1]):
        a, b = rows_HW[far], rows_HW[near]
        is_known = known_HW[far] & known_HW[near]
        found = (np.maximum(a, b) - np.minimum(a, b))[is_known]  # unsigned types have no signs
        if found.size:
            ranks = (found.size - 1) // 2, found.size - 1 - int(MANY * found.size)
            middle, large = np.partition(found, ranks)[[*ranks]].tolist()
            noise, many = max(noise, middle), max(many, large)
            if found.any():
                step = min(step, float(found[found > 0].min()))
    return max(noise, 0.0 if step == math.inf else step / 2) / SIGMAS, many


def _patches(plane_HW: Array, known_HW: Array) -> tuple[Array, Array]:
    """Find the darkest 2 × 2 pixels of each patch, in float32 means; where all of a patch is known,
    else infinity and minus infinity.
    """
    height = plane_HW.shape[0] // 2 * 2
    rows = plane_HW[:height].astype(np.float32)
    rows[~known_HW[:height]] = np.nan
    quads = rows[::2] + rows[1::2]
    quads = (quads[:, :-1] + quads[:, 1:]) / 4
    if min(plane_HW.shape) < PATCH:
        return quads[:0], quads[:0]
    quads = np.minimum(quads[:-1], quads[1:])
    quads = np.minimum(quads[:-2], quads[2:])[::2]
    quads = np.minimum(quads[:, :-2], quads[:, 2:])
    quads = np.minimum(quads[:, :-4], quads[:, 4:])
    is_known = np.isfinite(quads)
    return np.where(is_known, quads, np.inf), np.where(is_known, quads, -np.inf)


def _of_blocks(extreme: np.ufunc, values: Array, rows: int, columns: int) -> Array:
    """Reduce blocks of an array to their extremes; the rest at an end belongs to the last block."""
    if not values.size:
        return values
    for axis, side in enumerate((rows, columns)):
        starts = np.arange(max(1, values.shape[axis] // side)) * side
        values = extreme.reduceat(values, starts, axis=axis)
    return values
