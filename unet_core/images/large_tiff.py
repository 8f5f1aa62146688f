"""Windows of TIFFs that are too large to decode whole.

The header is read once. Reading a window then fetches only the strips and tiles that it touches,
and returns what decoding the whole image gives there. Images may be of any size: the caller limits
their pixels.

P planes (pages, or separate samples of one) · H W a window · S samples of a plane.
"""

import io
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tifffile

from unet_core.arrays import Array
from unet_core.config.sections import InputConfig
from unet_core.errors import ImageError
from unet_core.images import tiff
from unet_core.images.codec import TIFF_MAGICS, image_of
from unet_core.images.georeference import Georeference
from unet_core.images.raster import Raster, Window, full_scale_of
from unet_core.images.tiff_georeference import georeference_of
from unet_core.images.tiff_pages import (
    TiffImages,
    count_planes,
    images_of,
    is_full_size,
    is_plain,
    is_slide,
    require_allowed,
    require_numbers,
    stack_axes,
)
from unet_core.images.tiff_segments import Planes, segments_of
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


class TiffRaster(Raster):
    """An image that is read by window; threads may share it.

    Keeps ``cache_bytes`` of decoded segments, and as much of its mask. Strips are as wide as the
    image: read windows row by row, with a cache that holds the rows of a window at that width, or
    strips are decoded again.
    """

    def __init__(
        self, planes: Planes, mask: Planes | None, page: Any, is_stack: bool,
        config: InputConfig, as_labels: bool, held_bytes: int, georeference: Georeference | None,
    ) -> None:  # fmt: skip
        self.shape, self.segment_side, self.held_bytes = planes.shape, planes.side, held_bytes
        self._planes, self._mask, self._page, self._is_stack = planes, mask, page, is_stack
        self._config, self._as_labels = config, as_labels
        self._alpha = [] if is_stack else tiff.alpha_of(page)
        self._wanted: Sequence[int] = range(planes.count)
        if config.channels and not as_labels and is_plain(page.keyframe):  # planes as they are
            used = {*config.channels, *self._alpha}
            self._wanted = sorted({channel // planes.samples for channel in used})
        pixel = self._stored(planes.blank(1, 1), find_opaque=lambda _: None)
        pixel_CHW = self._finished(pixel).pixels_CHW
        self.channels, self.dtype = len(pixel_CHW), pixel_CHW.dtype
        self.full_scale = pixel.full_scale or full_scale_of(pixel.pixels.dtype)
        self.georeference = georeference

    def read(self, window: Box, /) -> Window:
        """Read a window inside the image: pixels like those of decoded images, or stored labels.

        Raises ImageError with code ``decode`` for segments that are damaged or missing and values
        that have no color, and ``not_finite`` for NaN and infinity in this window.
        """
        y, x, height, width = window
        if not (0 <= y < y + height <= self.shape[0] and 0 <= x < x + width <= self.shape[1]):
            raise ValueError(f"no window of {self.shape}: {y=} {x=} {height=} {width=}")
        stored_PHWS = self._planes.read(window, self._wanted)
        mask_PHWS = self._mask.read(window, range(self._mask.count)) if self._mask else None
        with tiff.decoding(f"the window at row {y}, column {x}: "):
            stored = self._stored(stored_PHWS, self._opaque)
            if mask_PHWS is not None:
                stored = tiff.with_mask(stored, _side_by_side(mask_PHWS))
            return self._finished(stored)

    def _stored(
        self, stored_PHWS: Array, find_opaque: Callable[[Array | None], Array | None]
    ) -> Stored:
        """Convert stored values as decoding the whole image does: planes and their samples side by
        side, in the colors that the page declares.
        """
        pixels = _side_by_side(stored_PHWS)
        if not self._is_stack and self._page.axes == "YX":
            pixels = pixels[..., 0]
        return tiff.stored_page(
            self._page, pixels, self._config, self._as_labels, self._alpha, self._is_stack,
            find_opaque,
        )  # fmt: skip

    def _finished(self, stored: Stored) -> Window:
        if self._as_labels:
            return Window(np.atleast_3d(stored.pixels).transpose(2, 0, 1))
        return image_of(stored, self._config)

    def _opaque(self, alpha_HW: Array | None) -> Array | None:
        """Find the pixels of a window that alpha does not hide, unless it hides the whole image."""
        if alpha_HW is None or alpha_HW.min() > 0:
            return None
        return alpha_HW > 0 if alpha_HW.any() or self._is_seen else None

    @cached_property
    def _is_seen(self) -> bool:
        """True if alpha is not 0 everywhere; reads segments until one says so."""
        at = next(at for at in self._alpha if at not in self._config.channels)
        return self._planes.has_nonzero(*divmod(at, self._planes.samples))


def _side_by_side(stored_PHWS: Array) -> Array:
    planes, height, width, samples = stored_PHWS.shape
    return stored_PHWS.transpose(1, 2, 0, 3).reshape(height, width, planes * samples)


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
            first = opened.pages.first
            require_numbers(first)
            if _is_small(first) and is_full_size(first) and not is_slide(opened):
                return None
            images = images_of(opened, config)
            pages = [] if _is_small(images.pages[0]) else _planes_of(images, config)
            if not pages:
                return None
            tiff.prepare(pages[0], config, as_labels)
            has_validity = not as_labels and config.nodata != "none"
            mask = images.mask_of(pages[0]) if has_validity else None
            planes = _opened(pages, file, cache_bytes)
            mask_planes = _opened([mask], file, cache_bytes) if mask else None
            if planes is None or (mask and mask_planes is None):
                return None
            held_bytes = cache_bytes * (2 if mask else 1)
            return TiffRaster(
                planes, mask_planes, pages[0], images.is_stack, config, as_labels, held_bytes,
                None if as_labels else georeference_of(opened, pages[0]),
            )  # fmt: skip


def _is_small(page: Any) -> bool:
    return page.keyframe.imagewidth * page.keyframe.imagelength <= SMALL_PIXELS


def _opened(pages: list[Any], file: Ranged, cache_bytes: int) -> Planes | None:
    """Open planes of one layout; None if they cannot be read by window."""
    is_image = pages[0].keyframe.axes in ("YX", "YXS", "SYX")
    segments = segments_of(pages, file, cache_bytes) if is_image else None
    return Planes(segments, cache_bytes) if segments else None


def _planes_of(images: TiffImages, config: InputConfig) -> list[Any]:
    """List the page of an image, or the pages of a stack that is one image; else none."""
    if images.is_stack:
        return _channels_of(images.series, config)
    require_allowed(len(images.pages), config)
    return images.pages if len(images.pages) == 1 else []


def _channels_of(series: list[Any], config: InputConfig) -> list[Any]:
    """Return the pages of a stack if each is a channel of the same image."""
    axes = [stack_axes(one, len(series), config) for one in series]
    count = sum(count_planes(one.shape, a, "YXCS") for one, a in zip(series, axes, strict=True))
    require_allowed(count, config)
    first, pages = series[0], list(series[0])
    is_channels = axes[0] == f"C{first.keyframe.axes}" and len(pages) == first.shape[0]
    return pages if count == 1 and is_channels and first.transform is None else []


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
