"""Strips and tiles of TIFFs as ranges of a file: their positions, decoding and cache.

Nothing here keeps a position in the file, so threads may load segments side by side. Header values
are checked before use: a segment is never read or decoded to more than its limit.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np
import tifffile

from unet_core.arrays import Array
from unet_core.errors import ImageError
from unet_core.images.tiff import check_sniffed, decoding, side_of
from unet_core.images.tiff_pages import require_numbers
from unet_core.storage.ranges import Ranged
from unet_core.tiling.geometry import Box

Key = tuple[int, int, int]
"""Key of a segment: plane, row and column among the segments of the plane."""

STRIP_BYTES = 64 * 2**20
"""Largest decoded size of a compressed strip; images with larger ones are decoded whole."""
SEGMENT_BYTES = 256 * 2**20
"""Largest size of a decoded tile, and of any encoded segment."""
BAND_ROWS = 4096
"""Uncompressed rows are read whole where the cache holds this many of them."""
PIECE_COLUMNS = 4096
"""Else rows are read in pieces of this many pixels, one request for each row."""
BLOCK_BYTES = 2**20
"""Size of the blocks of uncompressed rows, which makes requests few and small."""


class Segments:
    """The segments (strips or tiles) of planes of one layout, as byte ranges of a file."""

    side: tuple[int, int]
    """Rows and columns of a segment; those at the lower and right edge may be shorter."""

    def __init__(self, pages: list[Any], file: Ranged) -> None:
        layout = pages[0].keyframe
        self.shape: tuple[int, int] = (layout.imagelength, layout.imagewidth)
        self.separate, self.samples = int(layout.shaped[0]), int(layout.shaped[4])
        self.planes = len(pages) * self.separate
        self.dtype: np.dtype[Any] = layout.dtype
        self.nodata = layout.nodata
        self._pages, self._file = pages, file

    def _read(self, start: int, stop: int) -> bytes:
        """Read bytes [start, stop); raises ImageError beyond the file or if it became shorter."""
        if not 0 <= start <= stop <= self._file.size:
            raise ImageError(
                "decode",
                f"a segment lies at bytes {start} to {stop}, the file ends at {self._file.size}",
            )
        data = self._file.read(start, stop)
        if len(data) != stop - start:
            raise ImageError(
                "changed",
                f"the TIFF changed while it was read: {stop - start} bytes were asked for, "
                f"{len(data)} came",
            )
        return data


class RawSegments(Segments):
    """Uncompressed rows that follow each other, in blocks of about 1 MiB."""

    def __init__(self, pages: list[Any], file: Ranged, cache_bytes: int) -> None:
        super().__init__(pages, file)
        self._stored = self.dtype.newbyteorder(pages[0].keyframe.parent.byteorder)
        self._pixel_bytes = self.dtype.itemsize * self.samples
        self._row_bytes = self.shape[1] * self._pixel_bytes
        fits = BAND_ROWS * self._row_bytes * self.planes <= cache_bytes
        columns = self.shape[1] if fits else min(self.shape[1], PIECE_COLUMNS)
        self.side = max(1, BLOCK_BYTES // (columns * self._pixel_bytes)), columns
        for page in pages:
            stop = page.dataoffsets[0] + self.separate * self.shape[0] * self._row_bytes
            if stop > file.size:
                raise ImageError(
                    "decode", f"the pixels end at byte {stop}, the file at {file.size}"
                )

    def load(self, key: Key) -> Array:
        """Load a segment HWS by one read, or one for each row if it is narrower than the image."""
        plane, y, x = key[0], key[1] * self.side[0], key[2] * self.side[1]
        height, width = min(self.side[0], self.shape[0] - y), min(self.side[1], self.shape[1] - x)
        page, sample = divmod(plane, self.separate)
        length = width * self._pixel_bytes
        below = (sample * self.shape[0] + y) * self._row_bytes
        start = self._pages[page].dataoffsets[0] + below + x * self._pixel_bytes
        if width == self.shape[1]:
            data = self._read(start, start + height * length)
        else:
            data = b"".join(
                self._read(at, at + length)
                for at in range(start, start + height * self._row_bytes, self._row_bytes)
            )
        return np.frombuffer(data, self._stored).reshape(height, width, self.samples)


class EncodedSegments(Segments):
    """Strips or tiles as stored, decoded by tifffile."""

    def __init__(self, pages: list[Any], file: Ranged) -> None:
        super().__init__(pages, file)
        layout = pages[0].keyframe
        self.side = side_of(layout)
        self._down, self._across = (
            -(-length // side) for length, side in zip(self.shape, self.side, strict=True)
        )
        needed = self.separate * self._down * self._across
        found = min(min(len(page.dataoffsets), len(page.databytecounts)) for page in pages)
        if found < needed:
            raise ImageError("decode", f"{found} strips or tiles, but the image has {needed}")
        self._decode = layout.decode
        self._is_sniffed = layout.compression in tifffile.TIFF.IMAGE_COMPRESSIONS

    def load(self, key: Key) -> Array | None:
        """Decode a segment HWS; None where the file stores none. Raises ImageError."""
        page, sample = divmod(key[0], self.separate)
        index = (sample * self._down + key[1]) * self._across + key[2]
        start = self._pages[page].dataoffsets[index]
        count = self._pages[page].databytecounts[index]
        if not start or not count:
            return None
        if count > SEGMENT_BYTES:
            raise ImageError("too_large", f"a segment of {count} bytes, allowed: {SEGMENT_BYTES}")
        data = self._read(start, start + count)
        with decoding(
            f"the segment at row {key[1] * self.side[0]}, column {key[2] * self.side[1]}: "
        ):
            if self._is_sniffed:
                check_sniffed(data, self.side)
            segment_DHWS, *_ = self._decode(data, index, jpegtables=self._pages[page].jpegtables)
            return segment_DHWS[0]


def segments_of(
    pages: list[Any], file: Ranged, cache_bytes: int
) -> RawSegments | EncodedSegments | None:
    """Make segments of pages of one layout; None if large or odd. ImageError for lying headers."""
    for one in pages:
        require_numbers(one)
    page = pages[0].keyframe
    # restart markers of one JPEG (NDPI), planes behind a page (LSM, STK), volumes
    is_odd = page.jpegheader is not None or page.is_lsm or page.is_stk or page.tiledepth > 1
    if is_odd or page.dtype is None:
        return None
    if all(one.is_final for one in pages):
        return RawSegments(pages, file, cache_bytes)
    decoded_bytes = math.prod(side_of(page)) * int(page.shaped[4]) * page.dtype.itemsize
    if page.is_tiled and decoded_bytes > SEGMENT_BYTES:
        raise ImageError("too_large", f"tiles of {decoded_bytes} bytes, allowed: {SEGMENT_BYTES}")
    is_small = page.is_tiled or decoded_bytes <= STRIP_BYTES
    return EncodedSegments(pages, file) if is_small else None


class Cache:
    """Least-recently-used cache of segments; each is decoded by one thread while others wait."""

    def __init__(self, load: Callable[[Key], Array | None], budget_bytes: int) -> None:
        self._load, self._left = load, budget_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[Key, Future[Array | None]] = OrderedDict()

    def get(self, key: Key) -> Array | None:
        """Return a segment HWS, not to be written to; None where the file stores none."""
        mine: Future[Array | None] = Future()
        with self._lock:
            future = self._held.setdefault(key, mine)
            self._held.move_to_end(key)
        if future is mine:
            self._fulfil(key, future)
        return future.result()

    def _fulfil(self, key: Key, future: "Future[Array | None]") -> None:
        try:
            future.set_result(self._load(key))
        except BaseException as error:
            with self._lock:
                del self._held[key]
            future.set_exception(error)
        else:
            with self._lock:
                self._left -= _cost(future)
                while self._left < 0:
                    oldest = next(key for key, held in self._held.items() if held.done())
                    self._left += _cost(self._held.pop(oldest))


def _cost(held: "Future[Array | None]") -> int:
    """Count the bytes of a segment in the cache, with its entry."""
    return 512 + getattr(held.result(), "nbytes", 0)


class Planes:
    """Planes of one layout that are read by window, through a cache of decoded segments."""

    def __init__(self, segments: RawSegments | EncodedSegments, cache_bytes: int) -> None:
        self.shape, self.side = segments.shape, segments.side
        self.count, self.samples = segments.planes, segments.samples
        self._segments, self._cache = segments, Cache(segments.load, cache_bytes)

    def blank(self, height: int, width: int) -> Array:
        """Make an array PHWS of zeros; planes that are never written to take no memory."""
        return np.zeros((self.count, height, width, self.samples), self._segments.dtype)

    def read(self, window: Box, planes: Iterable[int]) -> Array:
        """Read a window of some planes: PHWS, zeros in others. Raises ImageError."""
        stored_PHWS = self.blank(window.height, window.width)
        for plane in planes:
            self._fill(stored_PHWS[plane], plane, window)
        return stored_PHWS

    def _fill(self, window_HWS: Array, plane: int, box: Box) -> None:
        rows, columns = self.side
        for i in range(box.y // rows, -(-(box.y + box.height) // rows)):
            for j in range(box.x // columns, -(-(box.x + box.width) // columns)):
                segment_HWS = self._cache.get((plane, i, j))
                segment = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                here, there = box.intersection(*segment)
                window_HWS[here] = (
                    self._segments.nodata if segment_HWS is None else segment_HWS[there]
                )

    def has_nonzero(self, plane: int, sample: int) -> bool:
        """Look for a value other than 0, until one is found. Raises ImageError."""
        (height, width), (rows, columns) = self.shape, self.side
        return any(
            self.read(Box(y, x, min(rows, height - y), min(columns, width - x)), [plane])[
                plane, ..., sample
            ].any()
            for y in range(0, height, rows)
            for x in range(0, width, columns)
        )
