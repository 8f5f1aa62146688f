"""Panels for the page, and overlays at full size: image, truth, outlines, errors."""

import base64
import io
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from unet_core.arrays import Array
from unet_core.errors import ImageError
from unet_core.images.decoder import DecodedImage
from unet_core.images.raster import Raster, Window

PANEL = 256
MOST_PANEL_BYTES = 28_000
"""Limit that keeps four panels of two dozen images below 4 MB, whatever they show."""
OPACITY = 0.35

ERRORS = {
    "right, background": (24, 26, 29),
    "right, an object": (150, 154, 160),
    "false positive": (230, 97, 1),
    "false negative": (72, 160, 240),
    "other class": (240, 228, 66),
    "ignored, or no data": (70, 60, 80),
}
"""Kinds of pixels, with their colours."""
RIGHT, RIGHT_OBJECT, EXTRA, MISSED, CONFUSED, IGNORED = range(len(ERRORS))
NO_DATA = [*ERRORS.values()][IGNORED]
"""Colour of pixels that are not valid, in every panel."""
CROSS = ndimage.generate_binary_structure(2, 1)

Palette = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Panel:
    """One image of the page."""

    title: str
    uri: str
    """``data:``."""
    height: int
    width: int


def _view(
    decoded: DecodedImage, mask_HW: Array, classes: int, side: int
) -> tuple[Array, Array, Array | None, Array]:
    """Shrink an image (RGB, uint8 HWC), its mask and its truth (HW) to at most ``side``; ids are
    those of the nearest pixels. Also return where pixels are not valid: their class is then 0. A
    truth that cannot be read is left out.
    """
    factor = min(1.0, side / max(decoded.pixels.shape))
    shape = [max(1, round(old * factor)) for old in decoded.pixels.shape]
    sides = zip(decoded.pixels.shape, shape, strict=True)
    near = np.ix_(*(((np.arange(new) + 0.5) * old / new).astype(np.intp) for old, new in sides))
    image = Image.fromarray(_visible(decoded.pixels.whole(), 2 * side))
    image_HWC = np.array(image.resize(shape[::-1], Image.Resampling.BOX))
    mask_HW = mask_HW[near]
    is_invalid_HW = mask_HW >= classes
    image_HWC[is_invalid_HW] = NO_DATA
    truth_HW = None
    if isinstance(decoded.truth, Raster):
        with suppress(ImageError):
            truth_HW = decoded.truth.whole().pixels_CHW[0][near]
    return image_HWC, np.where(is_invalid_HW, 0, mask_HW), truth_HW, is_invalid_HW


def _visible(window: Window, most: int) -> Array:
    """Convert to RGB uint8 (HWC), leaving pixels out where a side is much longer than ``most``.

    8-bit RGB stays as it is, all else is stretched from the 0.5th to the 99.8th percentile of the
    valid pixels; the first channel or three are shown.
    """
    every = max(1, max(window.pixels_CHW.shape[1:]) // most)
    few_CHW, valid_HW, _ = window.cut(lambda array: array[..., ::every, ::every])
    few_CHW = few_CHW[: 3 if len(few_CHW) >= 3 else 1]
    if len(few_CHW) == 1 or few_CHW.dtype != np.uint8:
        few_CHW = np.stack([_stretched(plane_HW, valid_HW) for plane_HW in few_CHW])
    return np.ascontiguousarray(
        np.broadcast_to(few_CHW, (3, *few_CHW.shape[1:])).transpose(1, 2, 0)
    )


def _outline(mask_HW: Array) -> Array:
    """Find the pixels of a class other than 0 that touch another class."""
    return (ndimage.morphological_gradient(mask_HW, footprint=CROSS) > 0) & (mask_HW > 0)


def panels(
    decoded: DecodedImage, mask_HW: Array, palette: Palette, ignore_index: int
) -> tuple[Panel, ...]:
    """Draw image, truth, outline of the mask and errors; without truth image, mask and outline."""
    image_HWC, mask_HW, truth_HW, is_invalid_HW = _view(decoded, mask_HW, len(palette), PANEL)
    colors, of_errors = np.array(palette, np.uint8), np.array([*ERRORS.values()], np.uint8)
    image = _panel("image", Image.fromarray(image_HWC))
    edge = _outline(mask_HW)
    outlined_HWC = image_HWC.copy()
    outlined_HWC[ndimage.binary_dilation(edge, CROSS)] //= 3  # a rim, to be seen on any ground
    outlined_HWC[edge] = _lit(colors)[mask_HW[edge]]
    outlined = _panel("mask outline", Image.fromarray(outlined_HWC))
    shown = np.concatenate([colors, np.array([NO_DATA], np.uint8)])
    if truth_HW is None:
        return image, _flat("mask", np.where(is_invalid_HW, len(colors), mask_HW), shown), outlined
    is_ignored_HW = is_invalid_HW | (truth_HW == ignore_index)
    known_HW = np.where(is_ignored_HW, len(colors), truth_HW)
    truth = _flat("truth", np.minimum(known_HW, len(colors)), shown)
    errors = _flat("errors", _errors(truth_HW, mask_HW, is_ignored_HW), of_errors)
    return image, truth, outlined, errors


def _errors(truth_HW: Array, mask_HW: Array, is_ignored_HW: Array) -> Array:
    """Number each pixel as in ``ERRORS``."""
    is_right = truth_HW == mask_HW
    cases = [is_ignored_HW, is_right & (truth_HW > 0), is_right, truth_HW == 0, mask_HW == 0]
    return np.select(cases, [IGNORED, RIGHT_OBJECT, RIGHT, EXTRA, MISSED], CONFUSED)


def overlay(decoded: DecodedImage, mask_HW: Array, palette: Palette) -> bytes:
    """Draw an image with its classes blended in and outlined, as PNG."""
    drawn_HWC, mask_HW, *_ = _view(decoded, mask_HW, len(palette), side=4096)
    colors = _lit(np.array(palette, np.uint8))
    inside, edge = mask_HW > 0, _outline(mask_HW)
    mixed = (1 - OPACITY) * drawn_HWC[inside] + OPACITY * colors[mask_HW[inside]]
    drawn_HWC[inside] = mixed.round().astype(np.uint8)
    drawn_HWC[edge] = colors[mask_HW[edge]]
    return _encoded(Image.fromarray(drawn_HWC), "png")


def _stretched(plane_HW: Array, valid_HW: Array | None) -> Array:
    known = plane_HW.ravel() if valid_HW is None else plane_HW[valid_HW]
    low, high = np.percentile(known, (0.5, 99.8)) if known.size else (0, 1)
    scaled = (plane_HW.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    return np.clip(scaled, 0, 255).astype(np.uint8)


def _lit(colors: Array) -> Array:
    """Replace colours that are nearly black, which would not be seen on images, by white."""
    lit = colors.copy()
    lit[1:][colors[1:].max(axis=1) < 64] = (255, 255, 255)
    return lit


def _flat(title: str, ids_HW: Array, colors: Array) -> Panel:
    """Draw ids in their colours; a palette image where there are few enough."""
    if len(colors) > 256:
        return _panel(title, Image.fromarray(colors[ids_HW]))
    image = Image.fromarray(ids_HW.astype(np.uint8))
    image.putpalette(colors.tobytes())
    return _panel(title, image)


def _panel(title: str, image: Image.Image) -> Panel:
    """Encode as the best JPEG that is not too large; flat colours as PNG, unless that is."""
    data, kind = (_encoded(image, "png"), "png") if image.mode == "P" else (b"", "")
    for quality in (85, 70, 50, 30, 10):
        if not data or len(data) > MOST_PANEL_BYTES:
            kind = "jpeg"
            data = _encoded(image.convert("RGB"), kind, quality=quality, subsampling=0)
    text = base64.b64encode(data).decode()
    return Panel(title, f"data:image/{kind};base64,{text}", image.height, image.width)


def _encoded(image: Image.Image, kind: str, **how: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=image.mode == "P", **how)
    return buffer.getvalue()
