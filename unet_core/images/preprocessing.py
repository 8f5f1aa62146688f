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
from unet_core.images.raster import IN_MEMORY, Raster, Window
from unet_core.tiling.geometry import Box

BAND_ROWS = 256
"""Largest number of rows that are read at once from an image too large for memory."""
BAND_BYTES = 64 * 2**20
"""Most bytes of such a band; wide images are read in fewer rows."""
NOTHING = (0.0, 0.0)
"""Offset and span of a channel of which no sample is known."""
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


def in_color(window: Window, color: str | int) -> Window:
    """Convert a window to the colors that a network takes; luma is known where all of RGB is."""
    pixels_CHW, known_CHW = to_color(window.pixels_CHW, color), window.known_CHW
    if known_CHW is not None and len(known_CHW) != len(pixels_CHW):
        known_CHW = np.broadcast_to(known_CHW.all(axis=0), pixels_CHW.shape)
    return Window(pixels_CHW, window.valid_HW, known_CHW)


def fill(window: Window, offset: Array) -> Window:
    """Replace what is not known by the value that the network receives as 0, or the next one that
    the type has; so no nodata value of a file reaches a mask.
    """
    known_CHW = known_of(window)
    if known_CHW is None:
        return window
    dtype = window.pixels_CHW.dtype
    values = offset
    if dtype.kind == "u":
        values = np.rint(offset.clip(0, np.iinfo(dtype).max)).astype(dtype)
    filled_CHW = np.where(known_CHW, window.pixels_CHW, values[:, None, None])
    return Window(filled_CHW, window.valid_HW)


def known_of(window: Window) -> Array | None:
    """Find the samples that count, CHW or 1HW; None for all."""
    if window.known_CHW is not None:
        return window.known_CHW
    return None if window.valid_HW is None else window.valid_HW[None]


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
    """Compute the offset and the scale of each channel, float32 (C,), from the samples that are
    known.

    Made from integer counts, so equal on every machine. A channel that is constant, or of which
    nothing is known, becomes all zeros.

    The image is read in bands of rows: once for integers and ``zscore``, twice for percentiles of
    floats; ``range`` reads the first row only. ``on_step`` is called before each read of an image
    that is not in memory. Where it lies decides nothing but ``zscore`` of floats: by bands, sums
    of rows are added, which round differently, but always in the same way.
    """
    is_in_memory = raster.segment_side == IN_MEMORY
    if is_in_memory and wanted.normalization == "zscore" and raster.dtype.kind == "f":
        wide = (values.astype(np.float64) for values in known_values(raster.whole()))
        return _as_arrays([(float(v.mean()), float(v.std())) if v.size else NOTHING for v in wide])
    height, width = raster.shape

    def read_rows(start: int, stop: int) -> Window:
        if not is_in_memory:
            on_step()
        return raster.read(Box(start, 0, stop - start, width))

    first_CHW = read_rows(0, 1).pixels_CHW
    row_bytes = width * max(3, len(first_CHW)) * first_CHW.itemsize
    rows = max(1, min(BAND_ROWS, BAND_BYTES // row_bytes))
    rows = 2 ** (rows.bit_length() - 1)  # as the sides of tiles

    def bands() -> Iterator[Window]:
        return (read_rows(a, min(a + rows, height)) for a in range(0, height, rows))

    if wanted.normalization == "range":
        low, high = wanted.limits(0.0, raster.full_scale)
        pairs = [(low, high - low)] * len(first_CHW)
    elif first_CHW.dtype.kind == "u":
        counts = _total([_counts(values) for values in known_values(band)] for band in bands())
        pairs = [_offset_and_span(of_channel, wanted) for of_channel in counts]
    elif wanted.normalization == "percentile":
        pairs = _percentiles_by_bits(bands, wanted)
    else:
        moments = np.concatenate([_row_moments(band) for band in bands()], axis=1)
        pairs = [_mean_and_deviation(of_channel, width) for of_channel in moments]
    return _as_arrays(pairs)


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


def _as_arrays(pairs: list[tuple[float, float]]) -> tuple[Array, Array]:
    """Convert offset and span of each channel to arrays of offsets and scales."""
    offset = np.array([offset for offset, _ in pairs], dtype=np.float32)
    with np.errstate(over="ignore"):  # the network's output then tells that this is no image
        scale = np.array([1 / span if span > 0 else 0.0 for _, span in pairs], dtype=np.float32)
    return offset, scale


def _ranks(values: int, wanted: Preprocessing) -> list[int]:
    """Find the ranks (from 1) of the low and the high percentile among ``values`` values."""
    return [max(1, int(np.ceil(values * q / 100))) for q in wanted.limits(1.0, 99.8)]


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


def _offset_and_span(counts: Array, wanted: Preprocessing) -> tuple[float, float]:
    """Compute offset and span of integers from exact sums over their histogram."""
    size = int(counts.sum())
    if not size:
        return NOTHING
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
    bands: Callable[[], Iterator[Window]], wanted: Preprocessing
) -> list[tuple[float, float]]:
    """Find the value at the low rank and its distance to the high one, for each channel.

    Counts the upper 16 bits of all values first, then the lower 16 bits of those that share their
    upper bits with the value at a rank.
    """
    upper = _total([_key_counts(values) for values in known_values(band)] for band in bands())
    sizes = upper.sum(axis=1).tolist()
    found = [
        [_at_rank(counts, rank) if size else (0, 0) for rank in _ranks(size, wanted)]
        for counts, size in zip(upper, sizes, strict=True)
    ]

    def lower_of(band: Window) -> list[list[Array]]:
        channels = zip(known_values(band), found, strict=True)
        return [[_key_counts(values, top) for top, _ in tops] for values, tops in channels]

    pairs = []
    for size, tops, lower in zip(sizes, found, _total(map(lower_of, bands())), strict=True):
        if not size:
            pairs.append(NOTHING)
            continue
        keys = [
            (top << 16) + _at_rank(counts, rank)[0]
            for (top, rank), counts in zip(tops, lower, strict=True)
        ]
        bits = [key ^ 0x80000000 if key >> 31 else key ^ 0xFFFFFFFF for key in keys]
        low, high = map(float, np.array(bits, dtype=np.uint32).view(np.float32))
        pairs.append((low, high - low))
    return pairs


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


def _mean_and_deviation(moments: Array, width: int) -> tuple[float, float]:
    """Combine rows into mean and deviation, after Chan, Golub and LeVeque (1979)."""
    means, squares, shares = moments.T
    if not (total := math.fsum(shares)):
        return NOTHING
    mean = math.fsum(shares * means) / total
    between = width * math.fsum(shares * (means - mean) ** 2)
    variance = (math.fsum(squares) + between) / (total * width)
    return mean, math.sqrt(variance)
