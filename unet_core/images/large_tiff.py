"""Windows of TIFFs that are too large to decode whole.

The header is read once. Reading a window then fetches only the strips and tiles that it touches,
and returns what decoding the whole image gives there. Images may be of any size: the caller limits
their pixels.

P planes (pages, or separate samples of one) · H W a window · S samples of a plane.
"""

import io
import math
from typing import Any

import numpy as np
import tifffile

from unet_core.arrays import Array
from unet_core.config.sections import InputConfig
from unet_core.errors import ImageError
from unet_core.images import tiff
from unet_core.images.codec import TIFF_MAGICS, image_of
from unet_core.images.raster import Raster, Window, full_scale_of
from unet_core.images.tiff_segments import Cache, EncodedSegments, RawSegments, segments_of
from unet_core.images.validity import Stored
from unet_core.storage.ranges import Ranged, RangeFile
from unet_core.tiling.geometry import MASK_WINDOW_PIXELS, Box

SMALL_PIXELS = MASK_WINDOW_PIXELS
"""Files whose first image has at most this many are decoded whole."""
CACHE_BYTES = 192 * 2**20
"""Decoded segments kept for one image: the rows of a window at the width of a large image."""
HEADER_BYTES = 256 * 2**20
"""Most bytes that are fetched to parse the headers of a file."""
TAG_BYTES = 32 * 2**20
"""Most bytes of one header value, so that there are at most 8 million segments."""
READ_BYTES = 2**18
"""Size of the requests for a header: small, but few are needed."""
EXTRAS = {"thumbnail", "label", "macro", "map", "overview"}
"""Names of images that slide scanners store beside the slide."""


class TiffRaster(Raster):
    """An image that is read by window; threads may share it.

    Keeps ``cache_bytes`` of decoded segments. Strips are as wide as the image: read windows row by
    row, with a cache that holds the rows of a window at that width, or strips are decoded again.
    """

    def __init__(
        self, segments: RawSegments | EncodedSegments, page: Any, is_stack: bool,
        config: InputConfig, as_labels: bool, cache_bytes: int,
    ) -> None:  # fmt: skip
        self.shape, self.segment_side, self.held_bytes = segments.shape, segments.side, cache_bytes
        self._segments, self._page, self._is_stack = segments, page, is_stack
        self._config, self._as_labels = config, as_labels
        self._cache = Cache(segments.load, cache_bytes)
        self._wanted = list(range(segments.planes))
        if config.channels and not as_labels and tiff.is_plain(page.keyframe):  # planes as they are
            self._wanted = sorted({channel // segments.samples for channel in config.channels})
        pixel_CHW = self._finished(self._blank(1, 1)).pixels_CHW
        self.channels, self.dtype = len(pixel_CHW), pixel_CHW.dtype
        self.full_scale, self.georeference = full_scale_of(segments.dtype), None

    def read(self, window: Box, /) -> Window:
        """Read a window inside the image: pixels like those of decoded images, or stored labels.

        Raises ImageError with code ``decode`` for segments that are damaged or missing and values
        that have no color, and ``not_finite`` for NaN and infinity in this window.
        """
        y, x, height, width = window
        if not (0 <= y < y + height <= self.shape[0] and 0 <= x < x + width <= self.shape[1]):
            raise ValueError(f"no window of {self.shape}: {y=} {x=} {height=} {width=}")
        stored_PHWS = self._blank(height, width)
        for plane in self._wanted:
            self._fill(stored_PHWS[plane], plane, window)
        with tiff.decoding(f"the window at row {y}, column {x}: "):
            return self._finished(stored_PHWS)

    def _blank(self, height: int, width: int) -> Array:
        """Make an array of zeros; planes that are never written to take no memory."""
        segments = self._segments
        return np.zeros((segments.planes, height, width, segments.samples), segments.dtype)

    def _fill(self, window_HWS: Array, plane: int, box: Box) -> None:
        rows, columns = self._segments.side
        for i in range(box.y // rows, -(-(box.y + box.height) // rows)):
            for j in range(box.x // columns, -(-(box.x + box.width) // columns)):
                segment_HWS = self._cache.get((plane, i, j))
                segment = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                here, there = box.intersection(*segment)
                window_HWS[here] = (
                    self._segments.nodata if segment_HWS is None else segment_HWS[there]
                )

    def _finished(self, stored_PHWS: Array) -> Window:
        """Convert stored values to the pixels or labels that decoding the whole image gives: planes
        and their samples side by side, in the colors that the page declares.
        """
        height, width = stored_PHWS.shape[1:3]
        pixels = stored_PHWS.transpose(1, 2, 0, 3).reshape(height, width, -1)
        if self._is_stack:
            pixels = tiff.from_bits(pixels, self._as_labels)
        else:
            stored = pixels[..., 0] if self._page.axes == "YX" else pixels
            pixels = tiff.page_pixels(self._page, stored, self._config, self._as_labels)
        if self._as_labels:
            return Window(np.atleast_3d(pixels).transpose(2, 0, 1))
        return image_of(Stored(pixels), self._config)


def open_large(
    file: Ranged, config: InputConfig, as_labels: bool = False, cache_bytes: int = CACHE_BYTES
) -> TiffRaster | None:
    """Open a TIFF to be read by window; None for what is better decoded whole: small images,
    other formats, several images in a file, and layouts that have no small segments.

    Raises ImageError like decoding the whole for several pages, axes, channels and colors, and
    for lying headers.
    """
    with _Header(RangeFile(_metered(file), "the TIFF"), READ_BYTES) as header:
        if not header.read(4).startswith(TIFF_MAGICS):
            return None
        header.seek(0)
        with tiff.decoding("the TIFF's header: "), tifffile.TiffFile(header) as opened:
            opened.pages._offsets = tiff.Chain(opened.pages._offsets)
            pages, is_stacked = _pages_of(opened, config)
            is_image = pages and pages[0].keyframe.axes in ("YX", "YXS", "SYX")
            if is_image and (segments := segments_of(pages, file, cache_bytes)):
                return TiffRaster(segments, pages[0], is_stacked, config, as_labels, cache_bytes)
            return None


def _pages_of(opened: Any, config: InputConfig) -> tuple[list[Any], bool]:
    """Find the page of a large image, or those of its channels and True; else none."""
    first = opened.pages.first
    tiff.require_numbers(first)
    if first.imagewidth * first.imagelength <= SMALL_PIXELS:
        return [], False
    series = tiff.full_series(opened)
    images = series[:1] + [one for one in series[1:] if not _is_extra(one)]
    pages = [page for one in images for page in one.pages]
    if tiff.is_stack(opened, len(pages), images, config):
        return _channels_of(images, config), True
    tiff.require_allowed(len(pages), config)
    return (pages if len(pages) == 1 else []), False


def _channels_of(images: list[Any], config: InputConfig) -> list[Any]:
    """Return the pages of a stack if each is a channel of the same image."""
    axes = [tiff.stack_axes(one, len(images), config) for one in images]
    count = sum(tiff.planes(one.shape, a, "YXCS") for one, a in zip(images, axes, strict=True))
    tiff.require_allowed(count, config)
    first, pages = images[0], list(images[0].pages)
    is_channels = axes[0] == f"C{first.keyframe.axes}" and len(pages) == first.shape[0]
    return pages if count == 1 and is_channels and first.transform is None else []


def _is_extra(series: Any) -> bool:
    is_named = (series.name or "").lower().removesuffix(" image") in EXTRAS
    return is_named and math.prod(series.keyframe.shape[:2]) <= SMALL_PIXELS


def _metered(file: Ranged) -> Ranged:
    left = HEADER_BYTES

    def read(start: int, stop: int) -> bytes:
        nonlocal left
        left -= stop - start
        if left < 0:
            raise ImageError("too_large", f"the TIFF's header takes more than {HEADER_BYTES} bytes")
        return file.read(start, stop)

    return Ranged(file.size, read)


class _Header(io.BufferedReader):
    """A buffered file that refuses large reads: values of a header are small."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most ``TAG_BYTES``."""
        if size is None or not 0 <= size <= TAG_BYTES:
            raise ImageError("too_large", f"a header value of {size} bytes, allowed: {TAG_BYTES}")
        return super().read(size)
