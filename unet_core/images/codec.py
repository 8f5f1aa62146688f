"""Bytes to pixels and masks to bytes: right, or an ImageError that says why; never silent garbage.

Pillow opens (its lazy header gives the size before anything is decoded) and decodes what it keeps
faithfully. imagecodecs decodes PNG with several channels and AVIF, of which Pillow keeps 8 bits,
tifffile decodes TIFF, and ``stills`` decodes JPEG 2000, JPEG XL and PNM. EXIF orientation is never
applied: image and mask stay in the stored frame.
"""

import io
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image, UnidentifiedImageError

from unet_core.arrays import Array
from unet_core.config.sections import InputConfig
from unet_core.errors import ImageError
from unet_core.images import unsupported
from unet_core.images.raster import ArrayRaster, Raster, Window, full_scale_of
from unet_core.images.stills import decode_still
from unet_core.images.tiff import check_size, decode_tiff, decoding, of_each
from unet_core.images.validity import Stored, known_samples, nodata_value, opaque, split_alpha

PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF")
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".btf", ".tf2", ".tf8", ".svs",
    ".webp", ".bmp", ".gif", ".avif", ".jp2", ".j2k", ".j2c", ".jpf", ".jpx", ".jph", ".jxl",
    ".pbm", ".pgm", ".ppm", ".pnm",
)  # fmt: skip
"""File extensions of images that are decoded; those of ``unsupported`` become failed rows."""
MAX_ENCODED_BYTES = 2**31 - 1

Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, against the config's own limit


def is_image(name: str) -> bool:
    """Whether a file's extension is one of an image, decoded or not."""
    return name.lower().endswith((*EXTENSIONS, *unsupported.ENDINGS))


def decode_images(data: bytes, config: InputConfig) -> list[Raster | ImageError]:
    """Decode one encoded file by its content, whatever its name says; one image unless it has
    pages that are expanded, of which each may fail alone.

    uint8, uint16 or float32 in native byte order; gray, RGB or more channels. Alpha is dropped, and
    says which pixels are valid.

    Raises ImageError with code ``empty``, ``decode``, ``too_large``, ``frames``, ``axes``,
    ``mode``, ``channels`` or ``not_finite``.
    """
    return of_each(_decode(data, config, as_labels=False), lambda page: _in_memory(page, config))


def _in_memory(page: Stored, config: InputConfig) -> Raster:
    full_scale = page.full_scale or full_scale_of(page.pixels.dtype)
    return ArrayRaster(*image_of(page, config), full_scale, page.georeference)


def image_of(stored: Stored, config: InputConfig) -> Window:
    """Convert stored pixels to the channels that count, in native byte order; types wider than
    uint16 become float32.

    Raises ImageError with code ``channels``, ``mode`` or ``not_finite``.
    """
    pixels, valid_HW, known_HWC = (
        array[..., None] if array is not None and array.ndim < n else array
        for array, n in zip(stored[:3], (3, 2, 3), strict=True)
    )
    if config.channels:
        wanted, there = max(config.channels), pixels.shape[2]
        if wanted >= there:
            raise ImageError(
                "channels",
                f"the image has {there} channels, input.channels asks for number {wanted} (they "
                "count from 0)",
            )
        pixels = pixels[..., config.channels]
        if known_HWC is not None and known_HWC.shape[2] == there:
            known_HWC = known_HWC[..., config.channels]
    if known_HWC is not None:
        is_pixel_HW = known_HWC.any(axis=2)
        valid_HW = is_pixel_HW if valid_HW is None else valid_HW & is_pixel_HW
        known_HWC = known_HWC & valid_HW[..., None]
        if (known_HWC == valid_HW[..., None]).all():
            known_HWC = None
    if pixels.dtype.kind not in "uif":
        raise ImageError("mode", f"pixels of type {pixels.dtype} are not supported")
    is_narrow = pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2
    dtype = pixels.dtype.newbyteorder("=") if is_narrow else np.float32
    window = Window(
        np.ascontiguousarray(pixels, dtype=dtype).transpose(2, 0, 1),
        valid_HW,
        None if known_HWC is None else known_HWC.transpose(2, 0, 1),
    )
    if not is_narrow:
        _require_finite(window)
    return window


def _require_finite(window: Window) -> None:
    """Raise ImageError for NaN and infinity among values that count."""
    is_finite_CHW = np.isfinite(window.pixels_CHW)
    counts = window.valid_HW if window.known_CHW is None else window.known_CHW
    if bad := np.count_nonzero(~(is_finite_CHW if counts is None else is_finite_CHW | ~counts)):
        raise ImageError(
            "not_finite",
            f"{bad} pixel values are NaN or infinite; if NaN means that there is no pixel, set "
            "input.nodata = 'nan'",
        )


def decode_labels(data: bytes, config: InputConfig, classes: int) -> list[Raster | ImageError]:
    """Decode a label mask into class ids, or each of its pages; palette masks are indices, ids are
    never scaled.

    Raises ImageError with code ``labels`` for values that are neither a class nor ignored.
    """
    return of_each(
        _decode(data, config, as_labels=True),
        lambda page: ArrayRaster(class_ids(page.pixels, config, classes)[None]),
    )


def class_ids(labels: Array, config: InputConfig, classes: int) -> Array:
    """Class ids HW of stored values, HW or HWC; raises ImageError (``labels``) for unknown ones."""
    if labels.ndim == 3:
        colors = labels[..., :3] if labels.shape[2] > 2 else labels[..., :1]  # the rest is alpha
        if not (colors[..., :1] == colors).all():
            raise ImageError("labels", "the mask is coloured; a mask holds one class id per pixel")
        labels = labels[..., 0]
    if labels.dtype.kind not in "bui":
        raise ImageError("labels", f"the mask holds {labels.dtype} values, not class ids")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= 2**16:
        raise ImageError("labels", f"the mask holds {low} to {high}, not class ids")
    labels = labels.astype(np.uint16, copy=False)  # NumPy 2.0 counts no uint64
    present = np.flatnonzero(np.bincount(labels.ravel())).tolist()
    mapped = {value: config.label_map.get(value, value) for value in present}
    ignored = config.ignore_index
    unknown = [v for v, to in mapped.items() if not 0 <= to < classes and to != ignored]
    if unknown:
        shown = ", ".join(map(str, unknown[:5]))
        raise ImageError(
            "labels",
            f"the mask holds {shown}, but classes are 0 to {classes - 1} and ignore_index is "
            f"{ignored}; map the values with input.label_map",
        )
    table = np.zeros(present[-1] + 1, dtype=np.uint16)
    table[present] = list(mapped.values())
    return table[labels]


def encode_mask(mask_HW: Array, encoding: str) -> bytes:
    """Bytes of a mask: ``raw`` C-order, little endian, or ``png``."""
    if encoding == "raw":
        return np.ascontiguousarray(mask_HW, dtype=mask_HW.dtype.newbyteorder("<")).tobytes()
    buffer = io.BytesIO()
    Image.fromarray(mask_HW).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode_mask(payload: bytes, encoding: str, height: int, width: int) -> Array:
    """Class ids HW, as ``encode_mask`` wrote them."""
    if encoding == "png":
        return np.asarray(Image.open(io.BytesIO(payload)))
    dtype = np.uint8 if len(payload) == height * width else np.dtype("<u2")
    return np.frombuffer(payload, dtype).reshape(height, width)


def _decode(data: bytes, config: InputConfig, as_labels: bool) -> list[Any]:
    """Decode each page to a ``Stored``, or an ImageError."""
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > MAX_ENCODED_BYTES:
        raise ImageError("too_large", f"{len(data)} encoded bytes, allowed: {MAX_ENCODED_BYTES}")
    with decoding():
        if data.startswith(TIFF_MAGICS):
            return decode_tiff(data, config, as_labels)
        pixels, full_scale = _decode_single(data, config, as_labels)
    known = known_samples(pixels, None if as_labels else nodata_value(None, config))
    has_alpha = pixels.ndim == 3 and pixels.shape[2] in (2, 4)
    if not has_alpha:
        return [Stored(pixels, None, known, full_scale)]
    alpha = [pixels.shape[2] - 1]
    samples, alpha_HW = split_alpha(pixels, alpha, config)
    known = known if known is None or config.channels else np.delete(known, alpha, axis=-1)
    is_opaque_HW = None if config.nodata == "none" else opaque(alpha_HW)
    return [Stored(samples, is_opaque_HW, known, full_scale)]


def _decode_single(data: bytes, config: InputConfig, as_labels: bool) -> tuple[Any, float | None]:
    """Decode what is no TIFF, alpha included, and find the largest value that it can store; None if
    that is the one of its type. Raises ImageError that names what else it is.
    """
    if (found := decode_still(data, config.max_pixels, as_labels)) is not None:
        return found
    if (refusal := unsupported.by_content(data)) is not None:
        raise refusal
    try:
        opened = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(
            "decode",
            f"not a TIFF, {', '.join(PILLOW_FORMATS)}, JPEG 2000, JPEG XL or PNM, or a damaged one",
        ) from error
    with opened as image:
        check_size(image.width, image.height, config.max_pixels)
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # phones add previews to a JPEG
            raise ImageError("frames", f"the file holds {frames} frames; give them one by one")
        if image.format == "AVIF":  # of which Pillow keeps 8 bits of 10 or 12
            flags = data[data.find(b"av1C") + 6]
            bits = 12 if flags & 0x20 else 10 if flags & 0x40 else 8
            return imagecodecs.avif_decode(data, numthreads=1), 2.0**bits - 1
        is_colour_png = image.format == "PNG" and image.mode in ("RGB", "RGBA")
        if is_colour_png and (data[24] == 16 or not data[28]):  # Pillow keeps 8 of 16 bits
            return imagecodecs.png_decode(data), None  # faster, but not for what is interlaced
        return _labels_of(image, data) if as_labels else _pixels_of(image), None


def _pixels_of(image: Image.Image) -> Any:
    match image.mode:
        case "L" | "LA" | "RGB" | "RGBA" | "I;16" | "I;16B" | "I;16L":
            return np.asarray(image)
        case "1":
            return np.asarray(image).astype(np.uint8) * 255
        case "P" | "PA":
            return np.asarray(image.convert("RGBA"))
        case "CMYK" | "YCbCr":
            return np.asarray(image.convert("RGB"))
        case _:
            raise ImageError("mode", f"colour mode {image.mode} is not supported")


def _labels_of(image: Image.Image, data: bytes) -> Any:
    """Stored values: Pillow stretches 2- and 4-bit gray to 8 bits, so shrink them again."""
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16B", "I;16L"):
        raise ImageError("labels", f"a mask cannot have colour mode {image.mode}")
    labels = np.asarray(image)
    depth = data[24] if image.format == "PNG" else 8
    if image.mode == "L" and depth in (2, 4):
        return labels // (85 if depth == 2 else 17)
    return labels
