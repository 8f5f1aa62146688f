"""TIFF in its many shapes: pages, channels, axes and colors, through tifffile."""

import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from unet_core.arrays import Array
from unet_core.config.sections import InputConfig
from unet_core.errors import ImageError, UnetJobsError, one_line
from unet_core.images.raster import full_scale_of
from unet_core.images.tiff_codecs import JPEG_2000, decode_to_rgb
from unet_core.images.tiff_georeference import georeference_of
from unet_core.images.tiff_pages import images_of, name_of, require_allowed, stack_axes
from unet_core.images.validity import Stored, known_samples, nodata_value, opaque, split_alpha

ResultT = TypeVar("ResultT")

VALUES_PER_PIXEL = 8
"""Largest number of values in all pages and channels, as a multiple of ``max_pixels``."""
STRETCH = {2: 85, 4: 17}
"""Factors by bits that stretch gray to 8 bits, as PNG gray is."""
MIXED = ("PALETTE", "SEPARATED")
"""Photometric interpretations whose channels are each made of all samples."""
SNIFFED = ("JPEG", "JPEG2000", "PNG", "WEBP")
"""Codecs that take sizes from their own stream, which Pillow can read without decoding."""
GDAL_NODATA = 42113
"""Tag that holds a nodata value as text."""


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
    """Decode each image to a ``Stored``, or an ImageError; raises it for refused files."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        images = images_of(tiff, config)
        has_validity = not as_labels and config.nodata != "none"
        checked = images.pages + [*chain(*images.masks.values())] * has_validity
        for page in checked:
            check_size(page.imagewidth, page.imagelength * page.imagedepth, config.max_pixels)
            _check_segments(page, data, config)
        by_pages = sum(p.imagewidth * p.imagelength * p.samplesperpixel for p in checked)
        values = max(by_pages, sum(math.prod(s.shape) for s in images.series))
        if values > (allowed := VALUES_PER_PIXEL * config.max_pixels):
            raise ImageError(
                "too_large", f"{values} values in all pages and channels, allowed: {allowed}"
            )

        def finished(number: int, stored: Stored) -> Stored:
            page = images.pages[0 if images.is_stack else number]
            if not as_labels:
                stored = stored._replace(georeference=georeference_of(tiff, page))
            mask = images.mask_of(page, number)
            return with_mask(stored, _samples(mask)) if mask and has_validity else stored

        if not images.is_stack:
            require_allowed(len(images.pages), config)
            return of_each(
                enumerate(images.pages),
                lambda one: finished(one[0], _page(one[1], config, as_labels)),
            )
        stacks = [_stack(one, len(images.series), config, as_labels) for one in images.series]
        require_allowed(sum(map(len, stacks)), config)
        return of_each(enumerate(chain(*stacks)), lambda one: finished(*one))


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


def _stack(
    series: Any, number_of_series: int, config: InputConfig, as_labels: bool
) -> list[Stored]:
    """Decode planes whose axes are declared: channels are joined, every other axis is pages."""
    axes, shape = stack_axes(series, number_of_series, config), series.shape
    others = [i for i, axis in enumerate(axes) if axis not in "YXCS"]
    channels = [i for i, axis in enumerate(axes) if axis in "CS"]
    y, x = axes.index("Y"), axes.index("X")
    prepare(series.keyframe, config, as_labels)
    pixels = np.transpose(series.asarray(), [*others, y, x, *channels])
    depth = math.prod(shape[i] for i in channels)
    pages_NHWC = pixels.reshape(-1, shape[y], shape[x], depth)
    alpha = alpha_of(series.keyframe) if "S" in axes and "C" not in axes else []
    return [
        stored_page(series.keyframe, page_HWC, config, as_labels, alpha, is_stack=True)
        for page_HWC in pages_NHWC
    ]


def _page(page: Any, config: InputConfig, as_labels: bool) -> Stored:
    """Decode a page that is one image, in the colors that it declares."""
    prepare(page, config, as_labels)
    return stored_page(page, _samples(page), config, as_labels, alpha_of(page))


def _samples(page: Any) -> Any:
    """Decode the stored values of a page, HW or HWC."""
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ImageError("axes", f"the TIFF has axes {page.axes}, allowed: one image of Y and X")
    stored = page.asarray()
    return np.moveaxis(stored, 0, -1) if page.axes == "SYX" else stored


def with_mask(stored: Stored, mask: Array) -> Stored:
    """Add a mask, HW or HWC, to what is known of an image: nonzero is valid, in any sample."""
    is_valid_HW = np.asarray(np.atleast_3d(mask).any(axis=2))
    if is_valid_HW.all():
        return stored
    if stored.valid_HW is not None:
        is_valid_HW = is_valid_HW & stored.valid_HW
    return stored._replace(valid_HW=is_valid_HW)


def prepare(page: Any, config: InputConfig, as_labels: bool) -> None:
    """Correct what the decoder takes from the tags of a page: its colors, and what segments hold
    that the file does not hold.
    """
    decode_to_rgb(page)
    _fill_unwritten(page, config, as_labels)


def _fill_unwritten(page: Any, config: InputConfig, as_labels: bool) -> None:
    """Make segments that the file does not hold nodata, or 0 where there is no such value."""
    page.keyframe.nodata = 0
    declared = _declared_nodata(page)
    for value in (None if as_labels else nodata_value(declared, config), declared):
        if value is not None:
            with np.errstate(invalid="ignore", over="ignore"):
                stored = np.array([value]).astype(page.keyframe.dtype)
            if known_samples(stored, value) is not None:
                page.keyframe.nodata = stored[0]
                break


def _declared_nodata(page: Any) -> float | None:
    """Read the nodata value of a file, after GDAL's convention; None for texts without a number."""
    try:
        return float(str(page.keyframe.tags.valueof(GDAL_NODATA, "")).strip("\0 "))
    except ValueError:
        return None


def alpha_of(page: Any) -> list[int]:
    """List the samples of a page that are declared as alpha."""
    page = page.keyframe
    extras = enumerate(page.extrasamples, start=page.samplesperpixel - len(page.extrasamples))
    return [at for at, kind in extras if at > 0 and name_of(kind) in ("ASSOCALPHA", "UNASSALPHA")]


def stored_page(
    page: Any, pixels: Any, config: InputConfig, as_labels: bool, alpha: list[int],
    is_stack: bool = False, find_opaque: Callable[[Array | None], Array | None] = opaque,
) -> Stored:  # fmt: skip
    """Convert stored values of a page, HW or HWC, all or a window, to the colors it declares, with
    what alpha and nodata say. The samples of a stack are channels as they are.

    ``find_opaque``: finds the pixels that alpha does not hide.
    """
    page = page.keyframe
    known = None
    if not as_labels:
        samples = pixels.view(np.uint8) if pixels.dtype == bool else pixels
        known = known_samples(samples, nodata_value(_declared_nodata(page), config))
    valid_HW: Array | None = None
    if alpha:
        if known is not None and not config.channels:
            known = np.delete(known, alpha, axis=-1)
        pixels, alpha_HW = split_alpha(pixels, alpha, config)
        if not as_labels and config.nodata != "none":
            valid_HW = find_opaque(alpha_HW)
    name = name_of(page.photometric)
    colors = from_bits(pixels, as_labels or name == "PALETTE")
    if not (as_labels or is_stack):
        colors = _colors(page, colors)
        if known is not None and known.ndim == 3 and name in MIXED:
            known = np.asarray(known.any(axis=2, keepdims=True))
    return Stored(colors, valid_HW, known, _full_scale(page))


def _colors(page: Any, pixels: Any) -> Any:
    """Convert stored values without alpha to gray, RGB or channels as they are."""
    bits, is_whole = page.bitspersample, page.planarconfig == 1 and not page.extrasamples
    match name_of(page.photometric):
        case "MINISBLACK" | "RGB" | "0":
            pass
        case "MINISWHITE" if pixels.dtype.kind == "u":
            pixels = (2**bits - 1 if bits > 1 else 255) - pixels
        case "PALETTE":
            indices_HW = pixels[..., 0] if pixels.ndim == 3 else pixels
            return (np.moveaxis(page.colormap, 0, -1)[indices_HW] >> 8).astype(np.uint8)
        case "YCBCR" if is_whole and name_of(page.compression) in ("JPEG", *JPEG_2000):
            pass  # its segments are decoded to RGB
        case "SEPARATED" if pixels.dtype == np.uint8 and pixels.shape[2] == 4:
            return np.asarray(Image.fromarray(pixels, "CMYK").convert("RGB"))
        case other:
            raise ImageError("mode", f"TIFF colours {other} at {bits} bits are not supported")
    return pixels * STRETCH[bits] if bits in STRETCH else pixels


def _full_scale(page: Any) -> float:
    """Return the largest value that the bits of a sample can have, as they are decoded.

    MaxSampleValue and the like describe the content, and are not used.
    """
    bits, dtype = page.bitspersample, page.dtype
    if dtype.kind == "b" or name_of(page.photometric) == "PALETTE":
        return 255.0
    if dtype.kind not in "ui" or not isinstance(bits, int):
        return full_scale_of(dtype)
    return float(2 ** (bits - (dtype.kind == "i")) - 1) * STRETCH.get(bits, 1)


def from_bits(pixels: Any, as_labels: bool) -> Any:
    """Convert 1-bit pixels to 0 and 1, or 0 and 255; others are returned unchanged."""
    return pixels.astype(np.uint8) * (1 if as_labels else 255) if pixels.dtype == bool else pixels
