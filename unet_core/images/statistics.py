"""Statistics of images that normalization needs: percentiles, or mean and deviation, by channel."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from unet_core.arrays import Array
from unet_core.errors import ImageError
from unet_core.images.guard import NO_STRETCH, Stretch, measure_content
from unet_core.images.preprocessing import Limits, Preprocessing, known_of
from unet_core.images.raster import IN_MEMORY, Raster, Window
from unet_core.tiling.geometry import Box

BAND_ROWS = 256
"""Largest number of rows that are read at once from an image too large for memory."""
BAND_BYTES = 64 * 2**20
"""Most bytes of such a band; wide images are read in fewer rows."""
NOTHING = Limits(0.0, 0.0)
"""Limits of a channel of which no sample is known."""
FAR = 2.0
"""Factor by which limits would have to be widened for a stretch to be far beyond the trained ones:
fields without objects need 3 and more, none of 176 images of nuclei needs 2."""
PIECE = 2**20
"""Values that are counted at once, which bounds the copies made of them."""


class Measured(NamedTuple):
    """Limits of the channels of an image, and what is known of its stretch."""

    limits: list[Limits]
    stretch: Stretch | None = None
    """Largest stretch of a channel by its own limits; None if it was not measured."""
    is_extrapolated: bool | None = None
    """True if that is far beyond those that the network was trained on; None: not known."""


@dataclass(frozen=True)
class Statistics:
    """Source of the limits of images, resolved for a run: each by itself, or by group."""

    by_group: Mapping[str, list[Limits]] = field(default_factory=dict)
    """Limits of the groups of images, or under an empty name those of the whole dataset; without
    any, each image has its own."""
    trained: Stretch | None = None
    """Largest stretch of the images that the network was trained on; None: not known."""
    is_guarded: bool = False
    """Limits are widened until the stretch is not beyond the trained one."""
    measures_stretch: bool = False
    """The stretch is measured although the trained one is not known, as by a training."""

    def measure(
        self,
        image_id: str,
        raster: Raster,
        wanted: Preprocessing,
        on_step: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Find the limits of an image. Raises ImageError (``statistics``) for an unknown group."""
        if self.by_group:
            return Measured(self._of_group("" if "" in self.by_group else group_of(image_id)))
        limits = measure_limits(raster, wanted, on_step)
        if wanted.is_fixed or not (self.trained or self.measures_stretch):
            return Measured(limits)
        contents = measure_content(raster, on_step)
        stretches = (c.stretch(own) for c, own in zip(contents, limits, strict=True))
        stretch = functools.reduce(operator.or_, stretches, NO_STRETCH)
        if self.trained is None:
            return Measured(limits, stretch)
        guarded = [
            content.guarded(own, self.trained)
            for content, own in zip(contents, limits, strict=True)
        ]
        is_far = any(g.span > FAR * own.span for g, own in zip(guarded, limits, strict=True))
        return Measured(guarded if self.is_guarded else limits, stretch, is_far)

    def _of_group(self, group: str) -> list[Limits]:
        if group not in self.by_group:
            raise ImageError(
                "statistics",
                f"input.statistics = 'group', but when the run began, folder {group!r} was not "
                "there, or had no image that can be read; begin a new run",
            )
        return self.by_group[group]


NOT_MEASURED = Measured([])
OF_IMAGES = Statistics()
"""Each image by itself."""


def group_of(image_id: str) -> str:
    """Name the group of an image: its parent folder; ``.`` is the input's own folder."""
    return str(PurePosixPath(image_id).parent)


def measure_limits(
    raster: Raster, wanted: Preprocessing, on_step: Callable[[], None] = lambda: None
) -> list[Limits]:
    """Measure the limits of each channel of an image, from the samples that are known.

    Made from integer counts, so equal on every machine. A channel that is constant, or of which
    nothing is known, has a span of 0.

    The image is read in bands of rows: once for integers and ``zscore``, twice for percentiles of
    floats. ``on_step`` is called before each read of an image that is not in memory. Where it lies
    decides nothing but ``zscore`` of floats: by bands, sums of rows are added, which round
    differently, but always in the same way.
    """
    if wanted.is_fixed:
        return wanted.fixed_limits(raster.full_scale)
    is_in_memory = raster.segment_side == IN_MEMORY
    if is_in_memory and wanted.normalization == "zscore" and raster.dtype.kind == "f":
        wide = (values.astype(np.float64) for values in known_values(raster.whole()))
        return [Limits(float(v.mean()), float(v.std())) if v.size else NOTHING for v in wide]
    height, width = raster.shape

    def read_rows(start: int, stop: int) -> Window:
        if not is_in_memory:
            on_step()
        return raster.read(Box(start, 0, stop - start, width))

    row_bytes = width * max(3, raster.channels) * raster.dtype.itemsize
    rows = max(1, min(BAND_ROWS, BAND_BYTES // row_bytes))
    rows = 2 ** (rows.bit_length() - 1)  # as the sides of tiles

    def bands() -> Iterator[Window]:
        return (read_rows(a, min(a + rows, height)) for a in range(0, height, rows))

    ends = wanted.ends(1.0, 99.8)
    if raster.dtype.kind == "u":
        counts = _total([_counts(values) for values in known_values(band)] for band in bands())
        if wanted.normalization == "percentile":
            return [_percentiles(*of_channel) for of_channel in zip(counts, ends, strict=True)]
        return [_moments(of_channel) for of_channel in counts]
    if wanted.normalization == "percentile":
        return _percentiles_by_bits(bands, ends)
    moments = np.concatenate([_row_moments(band) for band in bands()], axis=1)
    return [_mean_and_deviation(of_channel, width) for of_channel in moments]


def known_values(window: Window) -> list[Array]:
    """Collect the known values of each channel, flat."""
    known_CHW = known_of(window)
    if known_CHW is None:
        return [plane_HW.ravel() for plane_HW in window.pixels_CHW]
    return [
        plane_HW[known_HW]
        for plane_HW, known_HW in zip(
            window.pixels_CHW, np.broadcast_to(known_CHW, window.pixels_CHW.shape), strict=True
        )
    ]


def _ranks(values: int, ends: tuple[float, float]) -> list[int]:
    """Find the ranks (from 1) of two percentiles among ``values`` values."""
    return [max(1, int(np.ceil(values * q / 100))) for q in ends]


def _counts(values: Array) -> Array:
    """Count each value of the integer type."""
    counts = np.zeros(int(np.iinfo(values.dtype).max) + 1, dtype=np.int64)
    for piece in _pieces(values):
        counts += np.bincount(piece, minlength=counts.size)
    return counts


def _total(arrays: Iterable[Any]) -> Array:
    """Sum arrays, or nested lists of arrays, of one shape."""
    return sum(arrays, np.zeros((), dtype=np.int64))


def _pieces(values: Array) -> list[Array]:
    """Split values into pieces small enough for copies eight times as wide."""
    return np.split(values, range(PIECE, values.size, PIECE))


def _percentiles(counts: Array, ends: tuple[float, float]) -> Limits:
    """Find two percentiles of integers by their histogram."""
    if not (size := int(counts.sum())):
        return NOTHING
    low, high = (float(_at_rank(counts, rank)[0]) for rank in _ranks(size, ends))
    return Limits(low, high - low)


def _moments(counts: Array) -> Limits:
    """Compute mean and deviation of integers from exact sums over their histogram."""
    if not (size := int(counts.sum())):
        return NOTHING
    exact = [(int(value), int(counts[value])) for value in np.flatnonzero(counts)]
    mean = sum(value * count for value, count in exact) / size
    variance = sum(value * value * count for value, count in exact) / size - mean * mean
    return Limits(mean, float(np.sqrt(max(variance, 0.0))))


def _at_rank(counts: Array, rank: int) -> tuple[int, int]:
    """Find the value at a rank, and the rank among values equal to it."""
    cumulative = np.cumsum(counts)
    value = int(np.searchsorted(cumulative, rank))
    return value, rank - int(cumulative[value] - counts[value])


def _percentiles_by_bits(
    bands: Callable[[], Iterator[Window]], ends: list[tuple[float, float]]
) -> list[Limits]:
    """Find the value at the low rank and its distance to the high one, for each channel.

    Counts the upper 16 bits of all values first, then the lower 16 bits of those that share their
    upper bits with the value at a rank.
    """
    upper = _total([_key_counts(values) for values in known_values(band)] for band in bands())
    sizes = upper.sum(axis=1).tolist()
    found = [
        [_at_rank(counts, rank) if size else (0, 0) for rank in _ranks(size, of_channel)]
        for counts, size, of_channel in zip(upper, sizes, ends, strict=True)
    ]

    def lower_of(band: Window) -> list[list[Array]]:
        channels = zip(known_values(band), found, strict=True)
        return [[_key_counts(values, top) for top, _ in tops] for values, tops in channels]

    limits = []
    for size, tops, lower in zip(sizes, found, _total(map(lower_of, bands())), strict=True):
        if not size:
            limits.append(NOTHING)
            continue
        keys = [
            (top << 16) + _at_rank(counts, rank)[0]
            for (top, rank), counts in zip(tops, lower, strict=True)
        ]
        bits = [key ^ 0x80000000 if key >> 31 else key ^ 0xFFFFFFFF for key in keys]
        low, high = map(float, np.array(bits, dtype=np.uint32).view(np.float32))
        limits.append(Limits(low, high - low))
    return limits


def _key_counts(values: Array, top: int | None = None) -> Array:
    """Count the upper halves of keys, or the lower halves of keys whose upper half is ``top``."""
    counts = np.zeros(2**16, dtype=np.int64)
    for piece in _pieces(values):
        bits = (piece + np.float32(0)).view(np.uint32)  # both zeros become one
        keys = np.where(bits >> 31, ~bits, bits | 0x80000000)  # in the order of the values
        chosen = keys >> 16 if top is None else keys[keys >> 16 == top] & 0xFFFF
        counts += np.bincount(chosen, minlength=counts.size)
    return counts


def _row_moments(band: Window) -> Array:
    """Compute mean, sum of squared deviations and share of known values of each row: (C, H, 3)."""
    channels, height, width = band.pixels_CHW.shape
    known_CHW = known_of(band)
    is_known_CHW = np.broadcast_to(True if known_CHW is None else known_CHW, band.pixels_CHW.shape)
    rows = (
        row[is_known].astype(np.float64)
        for plane_HW, known_HW in zip(band.pixels_CHW, is_known_CHW, strict=True)
        for row, is_known in zip(plane_HW, known_HW, strict=True)
    )
    moments = [(v.mean(), v.var() * v.size, v.size / width) if v.size else (0, 0, 0) for v in rows]
    return np.array(moments).reshape(channels, height, 3)


def _mean_and_deviation(moments: Array, width: int) -> Limits:
    """Combine rows into mean and deviation, after Chan, Golub and LeVeque (1979)."""
    means, squares, shares = moments.T
    if not (total := math.fsum(shares)):
        return NOTHING
    mean = math.fsum(shares * means) / total
    between = width * math.fsum(shares * (means - mean) ** 2)
    variance = (math.fsum(squares) + between) / (total * width)
    return Limits(mean, math.sqrt(variance))
