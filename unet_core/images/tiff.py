"""TIFF in its many shapes: pages, channels, axes and colors, through tifffile.

Axes by tifffile's letters: Y rows, X columns, S samples, C channels; all others are pages.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from unet_core.config.sections import InputConfig
from unet_core.errors import ImageError, UnetJobsError, one_line

ResultT = TypeVar("ResultT")

VALUES_PER_PIXEL = 8
"""Largest number of values in all pages and channels, as a multiple of ``max_pixels``."""
MAX_PLANES = 2**20
"""Largest number of planes that OME metadata may claim: their list alone takes memory."""
MAX_PAGES = 2**15
"""Largest number of pages; a page takes about 16 kB as soon as it is listed."""
NUMBERS = (
    "imagewidth", "imagelength", "imagedepth", "tilewidth", "tilelength", "tiledepth",
    "rowsperstrip", "samplesperpixel",
)  # fmt: skip
"""Properties of a page that tifffile multiplies, and that must be integers."""
SNIFFED = ("JPEG", "JPEG2000", "PNG", "WEBP")
"""Codecs that take sizes from their own stream, which Pillow can read without decoding."""


@contextmanager
def decoding(what: str = "") -> Iterator[None]:
    """Turn errors of decoders into an ImageError (``decode``): they share no base class.

    A MemoryError passes, because it says nothing of the image: another attempt may have more.
    """
    try:
        yield
    except (UnetJobsError, MemoryError):
        raise
    except Exception as error:
        raise ImageError("decode", what + one_line(error)) from error


def of_each(pages: Iterable[Any], finish: Callable[[Any], ResultT]) -> list[ResultT | ImageError]:
    """Apply a function to each page; failures become ImageErrors, raised if there is one page."""
    found: list[ResultT | ImageError] = []
    for page in pages:
        try:
            if isinstance(page, ImageError):
                raise page
            with decoding():
                found.append(finish(page))
        except ImageError as failure:
            found.append(failure)
    if len(found) == 1 and isinstance(found[0], ImageError):
        raise found[0]
    return found


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageError for images without pixels, or with too many."""
    if width * height > max_pixels:
        raise ImageError(
            "too_large",
            f"{height} × {width} pixels, allowed: {max_pixels} in all; raise input.max_pixels",
        )
    if not width or not height:
        raise ImageError("decode", f"an image of {height} × {width} pixels has nothing to segment")


def decode_tiff(data: bytes, config: InputConfig, as_labels: bool) -> list[Any]:
    """Decode each page to an array HW or HWC, or an ImageError; raises it for refused files."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        tiff.pages._offsets = Chain(tiff.pages._offsets)
        full_size = [p for p in tiff.pages if not getattr(p, "is_reduced", False)]
        pages: list[Any] = full_size or [tiff.pages.first]
        for page in pages:
            require_numbers(page)
            check_size(page.imagewidth, page.imagelength * page.imagedepth, config.max_pixels)
            _check_segments(page, data, config)
        series = full_series(tiff)
        by_pages = sum(p.imagewidth * p.imagelength * p.samplesperpixel for p in pages)
        values = max(by_pages, sum(math.prod(s.shape) for s in series))
        if values > (allowed := VALUES_PER_PIXEL * config.max_pixels):
            raise ImageError(
                "too_large", f"{values} values in all pages and channels, allowed: {allowed}"
            )
        if is_stack(tiff, len(pages), series, config):
            stacks = [_stack(one, len(series), config, as_labels) for one in series]
            require_allowed(sum(map(len, stacks)), config)
            return [page for stack in stacks for page in stack]
        require_allowed(len(pages), config)
        return of_each(pages, lambda page: _page(page, config, as_labels))


class Chain(list[int]):
    """Offsets of the pages of a file; refuses a page chain that runs in a circle."""

    def __init__(self, offsets: list[int]) -> None:
        super().__init__(offsets)
        self._seen = set(offsets)

    def append(self, offset: int) -> None:
        """Raises ImageError for a page that was there before, and for too many."""
        if offset in self._seen:
            raise ImageError("decode", f"its pages go in a circle at byte {offset}")
        if len(self) >= MAX_PAGES:
            raise ImageError("too_large", f"more than {MAX_PAGES} pages")
        self._seen.add(offset)
        super().append(offset)


def require_numbers(page: Any) -> None:
    """Raise ImageError for sizes that are texts or lists: times a number, they fill memory."""
    for name in NUMBERS:
        value = getattr(page.keyframe, name)
        if not isinstance(value, int):
            raise ImageError("decode", f"{name} is {str(value)[:50]}, not a number")
    for kind in {*map(type, page.dataoffsets), *map(type, page.databytecounts)}:
        if not issubclass(kind, int | np.integer):
            raise ImageError("decode", "where its strips or tiles lie is no number")


def _check_segments(page: Any, data: bytes, config: InputConfig) -> None:
    """Raise ImageError for pixels of no type, and strips or tiles far larger than their image."""
    if page.dtype is None:
        raise ImageError("mode", f"pixels of {page.bitspersample} bits are not supported")
    side = side_of(page)
    if math.prod(side) > config.max_pixels:
        raise ImageError("too_large", f"segments of {side[0]} × {side[1]} pixels")
    if page.compression in tifffile.TIFF.IMAGE_COMPRESSIONS:
        for start, count in zip(page.dataoffsets, page.databytecounts, strict=False):
            check_sniffed(data[start : start + count], side)


def side_of(page: Any) -> tuple[int, int]:
    """Return rows and columns of the strips or tiles of a page."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return page.rowsperstrip, page.imagewidth


def check_sniffed(data: bytes, side: tuple[int, int]) -> None:
    """Raise ImageError for an image in a strip or tile that is far larger than that."""
    try:
        with Image.open(io.BytesIO(data), formats=SNIFFED) as image:
            width, height = image.size
    except UnidentifiedImageError:
        return
    if width * height > 4 * math.prod(side):
        raise ImageError("decode", f"{height} × {width} pixels in a segment of {side}")


def full_series(tiff: Any) -> list[Any]:
    """List the series of a file, without those that repeat another one at a smaller size.

    Raises ImageError for metadata that claims more planes than memory has room to list.
    """
    ome_xml = (tiff.is_ome and tiff.ome_metadata) or ""
    sizes = [
        math.prod(int(size) for size in re.findall(r"Size[CZT]\s*=\s*[\"'](\d+)", pixels))
        for pixels in re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", ome_xml)
    ]
    sizes += map(int, re.findall(r"(?:PlaneCount|NumPlanes)\s*=\s*[\"'](\d+)", ome_xml))
    most = max(sizes, default=0)
    if most > MAX_PLANES:
        raise ImageError("too_large", f"{most} planes by its metadata, allowed: {MAX_PLANES}")
    return [s for s in tiff.series if s.pages and not getattr(s.keyframe, "is_reduced", False)]


def is_stack(tiff: Any, number_of_pages: int, series: list[Any], config: InputConfig) -> bool:
    """Whether pages are planes of something whose axes are declared, or lie behind one page."""
    if number_of_pages > 1 and (config.axes or tiff.is_ome or tiff.is_imagej):
        return True
    return sum(planes(s.shape, s.axes, "YXS") for s in series) > number_of_pages


def planes(shape: tuple[int, ...], axes: str, axes_of_a_plane: str) -> int:
    """Count the planes of an image with these axes."""
    return math.prod(n for n, axis in zip(shape, axes, strict=True) if axis not in axes_of_a_plane)


def require_allowed(pages: int, config: InputConfig) -> None:
    """Raise ImageError for several pages, unless each may be an image."""
    if pages > 1 and config.pages == "refuse":
        raise ImageError(
            "frames",
            f"the TIFF holds {pages} pages; input.pages = 'expand' makes each an image, "
            "input.axes = 'CYX' makes them channels",
        )


def _stack(series: Any, number_of_series: int, config: InputConfig, as_labels: bool) -> list[Any]:
    """Decode planes whose axes are declared: channels are joined, every other axis is pages."""
    axes, shape = stack_axes(series, number_of_series, config), series.shape
    others = [i for i, axis in enumerate(axes) if axis not in "YXCS"]
    channels = [i for i, axis in enumerate(axes) if axis in "CS"]
    y, x = axes.index("Y"), axes.index("X")
    pixels = np.transpose(series.asarray(), [*others, y, x, *channels])
    depth = math.prod(shape[i] for i in channels)
    pages_NHWC = pixels.reshape(-1, shape[y], shape[x], depth)
    if "S" in axes and "C" not in axes:
        pages_NHWC = _without_alpha(series.keyframe, pages_NHWC, config)
    return list(from_bits(pages_NHWC, as_labels))


def stack_axes(series: Any, number_of_series: int, config: InputConfig) -> str:
    """Return the axes of a stack; raises ImageError for impossible ones, odd colors and gaps."""
    axes, shape = config.axes or series.axes, series.shape
    is_wrong = len(axes) != len(shape) or "Y" not in axes or "X" not in axes
    if is_wrong or (config.axes and number_of_series > 1):
        found = series.axes if number_of_series == 1 else f"{number_of_series} sizes of pages"
        raise ImageError("axes", f"the TIFF has shape {shape} and {found}, which is not {axes}")
    page = series.keyframe
    if not is_plain(page) or page.bitspersample in (2, 4):  # colors that only single pages have
        raise ImageError(
            "mode",
            f"a stack of {_name(page.photometric)} at {page.bitspersample} bits is not supported",
        )
    if any(plane is None for plane in series.pages):
        raise ImageError("frames", "planes of the stack are missing; they lie in other files")
    return str(axes)


def is_plain(page: Any) -> bool:
    """Whether each sample of a page is a channel of its own, as it is."""
    return _name(page.photometric) in ("MINISBLACK", "RGB", "0")


def _without_alpha(page: Any, pixels: Any, config: InputConfig) -> Any:
    """Drop the samples that the page declares as alpha, unless channels are chosen."""
    extras = enumerate(page.extrasamples, start=page.samplesperpixel - len(page.extrasamples))
    alpha = [at for at, kind in extras if at > 0 and _name(kind) in ("ASSOCALPHA", "UNASSALPHA")]
    return pixels if config.channels or not alpha else np.delete(pixels, alpha, axis=-1)


def _page(page: Any, config: InputConfig, as_labels: bool) -> Any:
    """Decode a page that is one image, in the colors that it declares."""
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ImageError("axes", f"the TIFF has axes {page.axes}, allowed: one image of Y and X")
    stored = page.asarray()
    pixels = np.moveaxis(stored, 0, -1) if page.axes == "SYX" else stored
    return page_pixels(page, pixels, config, as_labels)


def page_pixels(page: Any, pixels: Any, config: InputConfig, as_labels: bool) -> Any:
    """Convert stored values of a page, HW or HWC, all or a window, to the colors it declares."""
    pixels = _without_alpha(page, pixels, config)
    pixels = from_bits(pixels, as_labels or _name(page.photometric) == "PALETTE")
    if as_labels:
        return pixels
    bits, is_whole = page.bitspersample, page.planarconfig == 1 and not page.extrasamples
    match _name(page.photometric):
        case "MINISBLACK" | "RGB" | "0":
            pass
        case "MINISWHITE" if pixels.dtype.kind == "u":
            pixels = (2**bits - 1 if bits > 1 else 255) - pixels
        case "PALETTE":
            indices_HW = pixels[..., 0] if pixels.ndim == 3 else pixels
            return (np.moveaxis(page.colormap, 0, -1)[indices_HW] >> 8).astype(np.uint8)
        case "YCBCR" if is_whole and _name(page.compression) == "JPEG":
            pass  # each segment says by itself that it is YCbCr, so its decoder has made RGB of it
        case "SEPARATED" if pixels.dtype == np.uint8 and pixels.shape[2] == 4:
            return np.asarray(Image.fromarray(pixels, "CMYK").convert("RGB"))
        case other:
            raise ImageError("mode", f"TIFF colours {other} at {bits} bits are not supported")
    stretch = {2: 85, 4: 17}.get(bits, 1)  # to 8 bits, as PNG gray is
    return pixels * stretch if stretch > 1 else pixels


def from_bits(pixels: Any, as_labels: bool) -> Any:
    """Convert 1-bit pixels to 0 and 1, or 0 and 255; others are returned unchanged."""
    return pixels.astype(np.uint8) * (1 if as_labels else 255) if pixels.dtype == bool else pixels


def _name(tag: Any) -> str:
    """Name the value of a TIFF tag; tifffile leaves a number where it is absent or unknown."""
    return str(getattr(tag, "name", tag))
