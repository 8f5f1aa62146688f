"""Bytes to pixels and masks to bytes: right, or an ImageError that says why; never silent garbage.

Pillow opens (its lazy header gives the size before anything is decoded) and decodes what it
keeps faithfully; imagecodecs decodes PNG with several channels (Pillow cuts 16-bit RGB to 8 bits),
tifffile decodes TIFF. EXIF orientation is never applied: image and mask stay in the stored frame.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from unet_core.arrays import Array
from unet_core.errors import ImageError

PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
MAX_ENCODED_BYTES = 2**31 - 1
MAX_LABEL = 2**16 - 1

Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, against the config's own limit


@dataclass(frozen=True)
class Raster:
    """One decoded image: HWC; uint8, uint16 or float32 in native byte order; 1 or 3 channels
    (gray or RGB, alpha dropped).
    """

    pixels_HWC: Array

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.pixels_HWC.shape[0])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.pixels_HWC.shape[1])


def is_image(name: str) -> bool:
    """Whether a file's extension is one that is decoded."""
    return name.lower().endswith(EXTENSIONS)


def decode_image(data: bytes, max_pixels: int) -> Raster:
    """Decode one encoded image by its content, whatever its name says.

    Raises ImageError with code ``empty``, ``decode``, ``too_large``, ``frames``, ``mode`` or
    ``not_finite``.
    """
    pixels = _decode(data, max_pixels, as_labels=False)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]  # alpha
    if pixels.shape[2] not in (1, 3):
        raise ImageError("channels", f"the image has {pixels.shape[2]} channels, allowed: 1 to 4")
    pixels = _native(pixels)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        bad = int(np.size(pixels) - np.isfinite(pixels).sum())
        raise ImageError("not_finite", f"{bad} pixel values are NaN or infinite")
    return Raster(pixels)


def decode_labels(
    data: bytes, max_pixels: int, label_map: Mapping[int, int], classes: int, ignore_index: int
) -> Array:
    """Decode a label mask into class ids HW; palette masks are indices, ids are never scaled.

    Raises ImageError with code ``labels`` for values that are neither a class nor ignored.
    """
    labels = _decode(data, max_pixels, as_labels=True)
    if labels.ndim == 3 and labels.shape[2] in (1, 2):
        labels = labels[..., 0]  # the rest is alpha
    if labels.ndim == 3:
        if not (labels[..., :1] == labels[..., :3]).all():
            raise ImageError("labels", "the mask is coloured; a mask holds one class id per pixel")
        labels = labels[..., 0]
    if labels.dtype.kind not in "uib":
        raise ImageError("labels", f"the mask holds {labels.dtype} values, not class ids")
    if labels.min() < 0 or labels.max() > MAX_LABEL:
        raise ImageError(
            "labels", f"the mask holds {labels.min()} to {labels.max()}, not class ids"
        )
    present = np.flatnonzero(np.bincount(labels.ravel()))
    mapped = {int(value): label_map.get(int(value), int(value)) for value in present}
    unknown = [v for v, to in mapped.items() if not 0 <= to < classes and to != ignore_index]
    if unknown:
        shown = ", ".join(map(str, unknown[:5]))
        raise ImageError(
            "labels",
            f"the mask holds {shown}, but classes are 0 to {classes - 1} and ignore_index is "
            f"{ignore_index}; map the values with input.label_map",
        )
    table = np.zeros(int(present[-1]) + 1, dtype=np.uint16)
    for value, to in mapped.items():
        table[value] = to
    return table[labels]


def encode_mask(mask_HW: Array, encoding: str) -> bytes:
    """Bytes of a mask: ``raw`` C-order, little endian, or ``png``."""
    if encoding == "raw":
        return np.ascontiguousarray(mask_HW, dtype=mask_HW.dtype.newbyteorder("<")).tobytes()
    buffer = io.BytesIO()
    Image.fromarray(mask_HW).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _decode(data: bytes, max_pixels: int, as_labels: bool) -> Any:
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > MAX_ENCODED_BYTES:
        raise ImageError("too_large", f"{len(data)} encoded bytes, allowed: {MAX_ENCODED_BYTES}")
    try:
        if data.startswith(TIFF_MAGICS):
            return _decode_tiff(data, max_pixels, as_labels)
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            _check_size(image.width, image.height, max_pixels)
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # phones add previews to a JPEG
                raise ImageError("frames", f"the file holds {frames} frames; give them one by one")
            if _is_plain_colour_png(image, data):
                return imagecodecs.png_decode(data)
            return _labels_of(image, data) if as_labels else _pixels_of(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("decode", f"not a TIFF, {', '.join(PILLOW_FORMATS)}") from error
    except MemoryError:
        raise  # of this moment, not of the image: another attempt may have more
    except Exception as error:  # decoders share no base class, and a bad file is only a failed row
        raise ImageError("decode", _one_line(error)) from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            "too_large",
            f"{height} × {width} pixels, allowed: {max_pixels} in all; raise input.max_pixels",
        )
    if not width or not height:
        raise ImageError("decode", f"an image of {height} × {width} pixels has nothing to segment")


def _is_plain_colour_png(image: Image.Image, data: bytes) -> bool:
    """RGB or RGBA, not interlaced 8-bit: what imagecodecs decodes faster, or alone faithfully."""
    depth, interlaced = data[24], data[28]
    is_colour = image.format == "PNG" and image.mode in ("RGB", "RGBA")
    return is_colour and (depth == 16 or not interlaced)


def _pixels_of(image: Image.Image) -> Any:
    match image.mode:
        case "L" | "LA" | "RGB" | "RGBA":
            return np.asarray(image)
        case "1":
            return np.asarray(image).astype(np.uint8) * 255
        case "P" | "PA":
            return np.asarray(image.convert("RGBA"))
        case "CMYK" | "YCbCr":
            return np.asarray(image.convert("RGB"))
        case "I;16" | "I;16B" | "I;16L":
            return np.asarray(image)
        case _:
            raise ImageError("mode", f"colour mode {image.mode} is not supported")


def _labels_of(image: Image.Image, data: bytes) -> Any:
    """Stored values: Pillow stretches 2- and 4-bit gray to 8 bits, so shrink them again."""
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    if image.mode in ("LA", "PA"):
        return np.asarray(image)[..., 0]
    if image.mode not in ("L", "P", "RGB", "RGBA", "I;16", "I;16B", "I;16L"):
        raise ImageError("labels", f"a mask cannot have colour mode {image.mode}")
    labels = np.asarray(image)
    depth = data[24] if image.format == "PNG" else 8
    if image.mode == "L" and depth in (2, 4):
        return labels // (85 if depth == 2 else 17)
    return labels


def _decode_tiff(data: bytes, max_pixels: int, as_labels: bool) -> Any:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        pages = [page for page in tiff.pages if not getattr(page, "is_reduced", False)]
        if len(pages) > 1:
            raise ImageError("frames", f"the TIFF holds {len(pages)} pages; give them one by one")
        page: Any = pages[0] if pages else tiff.pages.first
        _check_size(page.imagewidth, page.imagelength * page.imagedepth, max_pixels)
        alpha = _alpha_samples(page)
        pixels = page.asarray()
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    if alpha:
        pixels = pixels[..., :-alpha]
    is_palette = _name(page.photometric) == "PALETTE"
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * (1 if as_labels or is_palette else 255)
    return pixels if as_labels else _tiff_colors(page, pixels)


def _alpha_samples(page: Any) -> int:
    """How many of the page's last samples are declared as alpha.

    Raises ImageError for axes and channels that are not gray, RGB or CMYK, with or without alpha.
    """
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ImageError("frames", f"the TIFF has axes {page.axes}, allowed: one image of Y and X")
    alpha = sum(_name(kind) in ("ASSOCALPHA", "UNASSALPHA") for kind in page.extrasamples)
    colors = page.samplesperpixel - alpha
    wanted = {"RGB": 3, "YCBCR": 3, "CIELAB": 3, "SEPARATED": 4}.get(_name(page.photometric), 1)
    if colors != wanted or alpha > 1:
        raise ImageError(
            "channels",
            f"the TIFF has {page.samplesperpixel} channels that it calls "
            f"{_name(page.photometric)} with {alpha} alpha, allowed: gray, RGB, CMYK, one alpha",
        )
    return alpha


def _tiff_colors(page: Any, pixels: Any) -> Any:
    """Gray or RGB, with or without alpha, from the colours that the TIFF declares."""
    bits = page.bitspersample
    match _name(page.photometric):
        case "MINISBLACK" | "RGB" | "0":
            pass
        case "MINISWHITE" if pixels.dtype.kind == "u":
            pixels = (2**bits - 1 if bits > 1 else 255) - pixels
        case "PALETTE":
            return (np.moveaxis(page.colormap, 0, -1)[pixels] >> 8).astype(np.uint8)
        case "YCBCR" if _name(page.compression) == "JPEG":
            pass  # the JPEG decoder has already made RGB of it
        case "SEPARATED" if pixels.dtype == np.uint8:
            return np.asarray(Image.fromarray(pixels, "CMYK").convert("RGB"))
        case other:
            raise ImageError("mode", f"TIFF colours {other} at {bits} bits are not supported")
    if bits in (2, 4):
        pixels = pixels * (85 if bits == 2 else 17)  # stretched to 8 bits, as PNG gray is
    return pixels


def _name(tag: Any) -> str:
    """Name of a TIFF tag's value; tifffile leaves a number where the tag is absent or unknown."""
    return str(getattr(tag, "name", tag))


def _native(pixels: Any) -> Array:
    """uint8, uint16 or float32 in native byte order; wider types become float32."""
    if pixels.dtype.kind not in "uif":
        raise ImageError("mode", f"pixels of type {pixels.dtype} are not supported")
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))
    return np.ascontiguousarray(pixels, dtype=np.float32)


def _one_line(error: Exception) -> str:
    """A decoder's words without what changes from run to run: rows must be repeatable."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:300]
