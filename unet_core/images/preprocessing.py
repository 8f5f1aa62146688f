"""Preprocessing: color conversion and normalization, as the checkpoint requires them.

The checkpoint says what it wants. Nothing here rounds or clips the pixels: a network receives
``(pixels - offset) * scale`` in float32, computed on the device from the image's own integers.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from unet_core.arrays import Array
from unet_core.config.presets import channels_of
from unet_core.config.sections import Section, require_span
from unet_core.errors import ImageError
from unet_core.images.raster import IN_MEMORY, Raster
from unet_core.tiling.geometry import Box

BAND_ROWS = 256
"""Largest number of rows that are read at once from an image too large for memory."""
BAND_BYTES = 64 * 2**20
"""Most bytes of such a band; wide images are read in fewer rows."""
PIECE = 2**20
"""Values that are counted at once, which bounds the copies made of them."""


class Preprocessing(Section):
    """Preprocessing of a checkpoint; part of its metadata and of the fingerprint."""

    color: Literal["gray", "rgb"] | Annotated[int, Field(ge=1)]
    """``gray``: RGB becomes luma (0.299 R + 0.587 G + 0.114 B, ITU-R 601); ``rgb``: gray is
    repeated three times; a number: that many channels as they are. Alpha is dropped before."""
    normalization: Literal["percentile", "range", "zscore"]
    low: float | None = None
    """Percentile (default 1) or pixel value (default 0) that becomes 0."""
    high: float | None = None
    """Percentile (default 99.8) or pixel value (default the type's largest; 1 for floats) that
    becomes 1."""

    _span = model_validator(mode="after")(require_span)

    @property
    def channels(self) -> int:
        """Input channels of the network."""
        return channels_of(self.color)

    def limits(self, low: float, high: float) -> tuple[float, float]:
        """``low`` and ``high``, or these defaults where the checkpoint does not give them."""
        return low if self.low is None else self.low, high if self.high is None else self.high


def to_color(pixels_CHW: Array, color: str | int) -> Array:
    """Convert pixels to the colors that a network takes; the dtype stays."""
    channels = len(pixels_CHW)
    if channels == channels_of(color):
        return np.ascontiguousarray(pixels_CHW)
    if channels == 1 and color == "rgb":
        return np.repeat(pixels_CHW, 3, axis=0)
    if channels == 3 and color == "gray":
        return _luma(pixels_CHW)[None]
    raise ImageError(
        "channels",
        f"the image has {channels} channels, but the model wants {color}; choose some with "
        "input.channels",
    )


def _luma(pixels_CHW: Array) -> Array:
    """ITU-R 601 luma, rounded to nearest for integers (weights in 1/65536, which sum to one)."""
    red, green, blue = pixels_CHW
    if pixels_CHW.dtype.kind == "f":
        return red * np.float32(0.299) + green * np.float32(0.587) + blue * np.float32(0.114)
    total: Array = red * np.uint32(19595) + green * np.uint32(38470) + blue * np.uint32(7471)
    return ((total + 0x8000) >> 16).astype(pixels_CHW.dtype)


def offset_and_scale(
    raster: Raster, wanted: Preprocessing, on_step: Callable[[], None] = lambda: None
) -> tuple[Array, Array]:
    """Compute the offset and the scale of each channel, float32 (C,).

    Made from integer counts, so equal on every machine. A constant channel becomes all zeros.

    The image is read in bands of rows: once for integers and ``zscore``, twice for percentiles of
    floats; ``range`` reads the first row only. ``on_step`` is called before each read of an image
    that is not in memory. Where it lies decides nothing but ``zscore`` of floats: by bands, sums
    of rows are added, which round differently, but always in the same way.
    """
    is_in_memory = raster.segment_side == IN_MEMORY
    if is_in_memory and wanted.normalization == "zscore" and raster.dtype.kind == "f":
        wide = (plane.ravel().astype(np.float64) for plane in raster.whole().pixels_CHW)
        return _as_arrays([(float(values.mean()), float(values.std())) for values in wide])
    height, width = raster.shape

    def read_rows(start: int, stop: int) -> Array:
        if not is_in_memory:
            on_step()
        return raster.read(Box(start, 0, stop - start, width)).pixels_CHW

    first_CHW = read_rows(0, 1)
    row_bytes = width * max(3, len(first_CHW)) * first_CHW.itemsize
    rows = max(1, min(BAND_ROWS, BAND_BYTES // row_bytes))
    rows = 2 ** (rows.bit_length() - 1)  # as the sides of tiles

    def bands() -> Iterator[Array]:
        return (read_rows(a, min(a + rows, height)) for a in range(0, height, rows))

    if wanted.normalization == "range":
        largest = float(np.iinfo(first_CHW.dtype).max) if first_CHW.dtype.kind == "u" else 1.0
        low, high = wanted.limits(0.0, largest)
        pairs = [(low, high - low)] * len(first_CHW)
    elif first_CHW.dtype.kind == "u":
        counts = _total([_counts(plane) for plane in band] for band in bands())
        pairs = [_offset_and_span(of_channel, wanted) for of_channel in counts]
    elif wanted.normalization == "percentile":
        pairs = _percentiles_by_bits(bands, _ranks(height * width, wanted))
    else:
        moments = np.concatenate([_row_moments(band) for band in bands()], axis=1)
        pairs = [_mean_and_deviation(of_channel, width) for of_channel in moments]
    return _as_arrays(pairs)


def _as_arrays(pairs: list[tuple[float, float]]) -> tuple[Array, Array]:
    """Convert offset and span of each channel to arrays of offsets and scales."""
    offset = np.array([offset for offset, _ in pairs], dtype=np.float32)
    with np.errstate(over="ignore"):  # the network's output then tells that this is no image
        scale = np.array([1 / span if span > 0 else 0.0 for _, span in pairs], dtype=np.float32)
    return offset, scale


def _ranks(values: int, wanted: Preprocessing) -> list[int]:
    """Find the ranks (from 1) of the low and the high percentile among ``values`` values."""
    return [max(1, int(np.ceil(values * q / 100))) for q in wanted.limits(1.0, 99.8)]


def _counts(plane_HW: Array) -> Array:
    """Count each value of the integer type."""
    bins = int(np.iinfo(plane_HW.dtype).max) + 1
    return _total(np.bincount(piece, minlength=bins) for piece in _pieces(plane_HW))


def _total(arrays: Iterable[Any]) -> Array:
    """Sum arrays, or nested lists of arrays, of one shape."""
    return sum(arrays, np.zeros((), dtype=np.int64))


def _pieces(plane_HW: Array) -> list[Array]:
    """Split values into pieces small enough for copies eight times as wide."""
    return np.split(plane_HW.ravel(), range(PIECE, plane_HW.size, PIECE))


def _offset_and_span(counts: Array, wanted: Preprocessing) -> tuple[float, float]:
    """Compute offset and span of integers from exact sums over their histogram."""
    size = int(counts.sum())
    if wanted.normalization == "percentile":
        bottom, top = (float(_at_rank(counts, rank)[0]) for rank in _ranks(size, wanted))
        return bottom, top - bottom
    exact = [(int(value), int(counts[value])) for value in np.flatnonzero(counts)]
    mean = sum(value * count for value, count in exact) / size
    variance = sum(value * value * count for value, count in exact) / size - mean * mean
    return mean, float(np.sqrt(max(variance, 0.0)))


def _at_rank(counts: Array, rank: int) -> tuple[int, int]:
    """Find the value at a rank, and the rank among values equal to it."""
    cumulative = np.cumsum(counts)
    value = int(np.searchsorted(cumulative, rank))
    return value, rank - int(cumulative[value] - counts[value])


def _percentiles_by_bits(
    bands: Callable[[], Iterator[Array]], ranks: list[int]
) -> list[tuple[float, float]]:
    """Find the value at the low rank and its distance to the high one, for each channel.

    Counts the upper 16 bits of all values first, then the lower 16 bits of those that share their
    upper bits with the value at a rank.
    """
    upper = _total([_key_counts(plane) for plane in band] for band in bands())
    found = [[_at_rank(counts, rank) for rank in ranks] for counts in upper]

    def lower_of(band_CHW: Array) -> list[list[Array]]:
        planes = zip(band_CHW, found, strict=True)
        return [[_key_counts(plane, top) for top, _ in tops] for plane, tops in planes]

    pairs = []
    for tops, lower in zip(found, _total(map(lower_of, bands())), strict=True):
        keys = [
            (top << 16) + _at_rank(counts, rank)[0]
            for (top, rank), counts in zip(tops, lower, strict=True)
        ]
        bits = [key ^ 0x80000000 if key >> 31 else key ^ 0xFFFFFFFF for key in keys]
        low, high = map(float, np.array(bits, dtype=np.uint32).view(np.float32))
        pairs.append((low, high - low))
    return pairs


def _key_counts(plane_HW: Array, top: int | None = None) -> Array:
    """Count the upper halves of keys, or the lower halves of keys whose upper half is ``top``."""
    counts = np.zeros(2**16, dtype=np.int64)
    for values in _pieces(plane_HW):
        bits = (values + np.float32(0)).view(np.uint32)  # both zeros become one
        keys = np.where(bits >> 31, ~bits, bits | 0x80000000)  # in the order of the values
        chosen = keys >> 16 if top is None else keys[keys >> 16 == top] & 0xFFFF
        counts += np.bincount(chosen, minlength=counts.size)
    return counts


def _row_moments(band_CHW: Array) -> Array:
    """Compute mean and sum of squared deviations of each row: (C, H, 2)."""
    rows = (row.astype(np.float64) for plane in band_CHW for row in plane)
    moments = [(row.mean(), row.var() * row.size) for row in rows]
    return np.array(moments).reshape(*band_CHW.shape[:2], 2)


def _mean_and_deviation(moments: Array, width: int) -> tuple[float, float]:
    """Combine rows of one width into mean and deviation, after Chan, Golub and LeVeque (1979)."""
    means, squares = moments.T
    mean = math.fsum(means) / means.size
    between = width * math.fsum((means - mean) ** 2)
    variance = (math.fsum(squares) + between) / (means.size * width)
    return mean, math.sqrt(variance)
