"""Panels for the page, and overlays at full size: image, truth, outlines, errors."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unet_core.arrays import Array
from unet_core.report.images import Fetched

PANEL = 256
MOST_PANEL_BYTES = 28_000
"""So that four panels of two dozen images stay below 4 MB, whatever they show."""
OVERLAY = 4096
OPACITY = 0.35
QUALITIES = (85, 70, 50, 30, 10)
HOPELESS = 2
"""Packed in haste, a PNG that large beside its JPEG is the larger one however well it is packed."""

RIGHT, RIGHT_OBJECT, EXTRA, MISSED, CONFUSED, IGNORED = range(6)
ERROR_COLORS = (
    (24, 26, 29), (150, 154, 160), (230, 97, 1), (72, 160, 240), (240, 228, 66), (70, 60, 80),
)  # fmt: skip
ERROR_NAMES = (
    "right, background", "right, an object", "false positive", "false negative", "other class",
    "ignored",
)  # fmt: skip

Palette = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class View:
    """An image as people see it, with ids of the same size."""

    image_HWC: Array
    """RGB, uint8."""
    mask_HW: Array
    truth_HW: Array | None


@dataclass(frozen=True)
class Panel:
    """One picture of the page."""

    title: str
    uri: str
    """``data:``."""
    height: int
    width: int


def view(fetched: Fetched, side: int) -> View:
    """An image no longer than ``side``; ids are taken from the nearest pixel."""
    picture, truth_HW = fetched.picture, fetched.truth
    height, width = picture.pixels.shape
    factor = min(1.0, side / max(height, width))
    shape = max(1, round(height * factor)), max(1, round(width * factor))
    near = np.ix_(_nearest(height, shape[0]), _nearest(width, shape[1]))
    image_HWC = visible(picture.pixels.whole(), 2 * side)
    if image_HWC.shape[:2] != shape:
        small = Image.fromarray(image_HWC).resize(shape[::-1], Image.Resampling.BOX)
        image_HWC = np.asarray(small)
    return View(image_HWC, fetched.mask_HW[near], None if truth_HW is None else truth_HW[near])


def visible(pixels_CHW: Array, most: int) -> Array:
    """RGB uint8 of every so many-th pixel, so that no side is much longer than ``most``: 8-bit RGB
    as it is, all else from the 0.5th to the 99.8th percentile; the first channel or three.
    """
    every = max(1, max(pixels_CHW.shape[1:]) // most)
    few_CHW = pixels_CHW[: 3 if len(pixels_CHW) >= 3 else 1, ::every, ::every]
    if len(few_CHW) == 1 or few_CHW.dtype != np.uint8:
        few_CHW = np.stack([_stretched(plane_HW) for plane_HW in few_CHW])
    return np.ascontiguousarray(
        np.broadcast_to(few_CHW, (3, *few_CHW.shape[1:])).transpose(1, 2, 0)
    )


def outline(mask_HW: Array) -> Array:
    """Pixels of a class other than 0 that touch another class."""
    edge = np.zeros(mask_HW.shape, dtype=bool)
    down, right = mask_HW[1:] != mask_HW[:-1], mask_HW[:, 1:] != mask_HW[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge & (mask_HW > 0)


def panels(seen: View, palette: Palette, ignore_index: int) -> tuple[Panel, ...]:
    """Image, truth, the mask's outline and errors; without truth image, mask and outline."""
    colors = np.array(palette, np.uint8)
    image = _panel("image", Image.fromarray(seen.image_HWC))
    outlined = _panel("mask outline", Image.fromarray(_outlined(seen, _lit(colors))))
    if seen.truth_HW is None:
        return image, _flat("mask", seen.mask_HW, colors), outlined
    known_HW = np.where(seen.truth_HW == ignore_index, len(colors), seen.truth_HW)
    shown = np.concatenate([colors, np.array([ERROR_COLORS[IGNORED]], np.uint8)])
    truth = _flat("truth", np.minimum(known_HW, len(colors)), shown)
    errors = _flat("errors", errors_of(seen, ignore_index), np.array(ERROR_COLORS, np.uint8))
    return image, truth, outlined, errors


def _outlined(seen: View, colors: Array) -> Array:
    """The image with outlines, each in a darker rim so that it is seen on any ground."""
    drawn_HWC = seen.image_HWC.copy()
    edge = outline(seen.mask_HW)
    rim = edge.copy()
    rim[1:] |= edge[:-1]
    rim[:-1] |= edge[1:]
    rim[:, 1:] |= edge[:, :-1]
    rim[:, :-1] |= edge[:, 1:]
    drawn_HWC[rim] //= 3
    drawn_HWC[edge] = colors[seen.mask_HW[edge]]
    return drawn_HWC


def errors_of(seen: View, ignore_index: int) -> Array:
    """Which of ``ERROR_NAMES`` each pixel is."""
    truth_HW, mask_HW = seen.truth_HW, seen.mask_HW
    assert truth_HW is not None
    kinds_HW = np.where(truth_HW > 0, RIGHT_OBJECT, RIGHT).astype(np.uint8)
    wrong = truth_HW != mask_HW
    kinds_HW[wrong] = CONFUSED
    kinds_HW[wrong & (truth_HW == 0)] = EXTRA
    kinds_HW[wrong & (mask_HW == 0)] = MISSED
    kinds_HW[truth_HW == ignore_index] = IGNORED
    return kinds_HW


def overlay(fetched: Fetched, palette: Palette) -> bytes:
    """PNG of an image with its classes blended in and outlined."""
    seen = view(fetched, OVERLAY)
    colors = _lit(np.array(palette, np.uint8))
    inside, edge = seen.mask_HW > 0, outline(seen.mask_HW)
    drawn_HWC = seen.image_HWC.copy()
    mixed = (1 - OPACITY) * drawn_HWC[inside] + OPACITY * colors[seen.mask_HW[inside]]
    drawn_HWC[inside] = mixed.round().astype(np.uint8)
    drawn_HWC[edge] = colors[seen.mask_HW[edge]]
    return _png(Image.fromarray(drawn_HWC))


def _nearest(old: int, new: int) -> Array:
    return ((np.arange(new) + 0.5) * old / new).astype(np.intp)


def _stretched(plane_HW: Array) -> Array:
    low, high = np.percentile(plane_HW, (0.5, 99.8))
    scaled = (plane_HW.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    return np.clip(scaled, 0, 255).astype(np.uint8)


def _lit(colors: Array) -> Array:
    """Colours to draw on images: those that are nearly black would not be seen."""
    lit = colors.copy()
    lit[1:][colors[1:].max(axis=1) < 64] = (255, 255, 255)
    return lit


def _flat(title: str, ids_HW: Array, colors: Array) -> Panel:
    """Ids in their colours; a palette image where there are few enough."""
    if len(colors) > 256:
        return _panel(title, Image.fromarray(colors[ids_HW]))
    image = Image.fromarray(ids_HW.astype(np.uint8))
    image.putpalette(colors.tobytes())
    return _panel(title, image)


def _panel(title: str, image: Image.Image) -> Panel:
    """As PNG if it is flat or that is smaller, else as JPEG; below the limit by its quality."""
    is_flat = image.mode == "P"
    data, kind = _png(image, -1 if is_flat else 1), "png"
    if not is_flat and len(data) < HOPELESS * len(_jpeg(image, QUALITIES[0])):
        data = _png(image)
    if len(data) > (MOST_PANEL_BYTES if is_flat else 0):
        for quality in QUALITIES:
            jpeg = _jpeg(image, quality)
            if len(jpeg) < len(data):
                data, kind = jpeg, "jpeg"
            if len(data) <= MOST_PANEL_BYTES:
                break
    text = base64.b64encode(data).decode()
    return Panel(title, f"data:image/{kind};base64,{text}", image.height, image.width)


def _png(image: Image.Image, level: int = -1) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=image.mode == "P", compress_level=level)
    return buffer.getvalue()


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
