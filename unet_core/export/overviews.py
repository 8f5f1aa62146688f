"""Overviews of an image of ids: each level has half of the sides of the one before."""

from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from unet_core.arrays import Array

LARGE_SIDE = 4096
"""Images with a longer side have overviews."""
SMALL_SIDE = 512
"""Longest side of the last overview: it fits on a screen."""
BAND_ROWS = 1024
"""Rows of a level that are in memory at once; even, so that no block of pixels is cut."""

Shape = tuple[int, int]


def level_shapes(shape: Shape) -> list[Shape]:
    """List the shapes of the overviews of an image, largest first."""
    shapes = list[Shape]()
    while max(shape) > (SMALL_SIDE if shapes else LARGE_SIDE):
        shape = -(-shape[0] // 2), -(-shape[1] // 2)
        shapes.append(shape)
    return shapes


def reducing(bands: Iterable[Array], into: BinaryIO, nodata: int | None) -> Iterator[Array]:
    """Pass on bands of rows, of an even number each but the last, and append their overview to a
    file.
    """
    for band_HW in bands:
        for y in range(0, len(band_HW), BAND_ROWS):
            into.write(most_frequent(band_HW[y : y + BAND_ROWS], nodata).tobytes())
        yield band_HW


def read_bands(file: BinaryIO, shape: Shape, dtype: np.dtype[Any]) -> Iterator[Array]:
    """Read a level from a file, in bands of rows."""
    file.seek(0)
    for y in range(0, shape[0], BAND_ROWS):
        rows = min(BAND_ROWS, shape[0] - y)
        data = file.read(rows * shape[1] * dtype.itemsize)
        yield np.frombuffer(data, dtype).reshape(rows, shape[1])


def most_frequent(ids_HW: Array, nodata: int | None) -> Array:
    """Reduce each block of 2 × 2 pixels to the id that most of them have; of two, to the smaller.

    Nodata is the largest id, and remains only where all four are nodata. A last odd row or column
    counts twice.
    """
    height, width = ids_HW.shape
    even_HW = np.pad(ids_HW, ((0, height % 2), (0, width % 2)), mode="edge")
    a, b, c, d = (even_HW[y::2, x::2] for y in (0, 1) for x in (0, 1))
    ends, middles = zip(_in_order(a, b), _in_order(c, d), strict=True)  # a sorting network
    lowest, one = _in_order(*ends)
    other, highest = _in_order(*middles)
    low, high = _in_order(one, other)
    for pair, is_pair in ((high, (high == highest) & (lowest != low)), (low, low == high)):
        np.copyto(lowest, pair, where=is_pair if nodata is None else is_pair & (pair != nodata))
    return lowest


def _in_order(a: Array, b: Array) -> tuple[Array, Array]:
    return np.minimum(a, b), np.maximum(a, b)
