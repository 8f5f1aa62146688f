"""A picture for people: image, truth and the mask's outline side by side, a row an image."""

import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unet_core.arrays import Array

PANEL = 288
CAPTION = 20
GAP = 8
COLUMNS = 2
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)

Palette = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Entry:
    """One image to show."""

    caption: str
    image_HW: Array
    """Gray, already stretched to 0–255."""
    truth_HW: Array | None
    mask_HW: Array


def contact_sheet(entries: Iterable[Entry], palette: Palette) -> bytes:
    """PNG bytes of a sheet with two entries to a row."""
    strips = [_strip(entry, palette) for entry in entries]
    width, height = strips[0].size
    rows = -(-len(strips) // COLUMNS)
    sheet = Image.new(
        "RGB", (COLUMNS * (width + GAP) + GAP, rows * (height + GAP) + GAP), BACKGROUND
    )
    for number, strip in enumerate(strips):
        row, column = divmod(number, COLUMNS)
        sheet.paste(strip, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def stretch(pixels_HW: Array) -> Array:
    """Gray values from the 0.5th to the 99.8th percentile as 0–255."""
    low, high = np.percentile(pixels_HW, (0.5, 99.8))
    scaled = (pixels_HW.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    return np.clip(scaled, 0, 255).astype(np.uint8)


def outline(mask_HW: Array) -> Array:
    """Pixels of a class that touch another class."""
    edge = np.zeros(mask_HW.shape, dtype=bool)
    down, right = mask_HW[1:] != mask_HW[:-1], mask_HW[:, 1:] != mask_HW[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge & (mask_HW > 0)


def _strip(entry: Entry, palette: Palette) -> Image.Image:
    colors = np.array(palette, dtype=np.uint8)
    gray_HWC = np.repeat(entry.image_HW[..., None], 3, axis=2)
    drawn_HWC = gray_HWC.copy()
    edge = outline(entry.mask_HW)
    drawn_HWC[edge] = colors[entry.mask_HW[edge]]
    panels = [(gray_HWC, "image"), (drawn_HWC, "mask outline")]
    if entry.truth_HW is not None:
        known = np.minimum(entry.truth_HW, len(colors) - 1)
        panels.insert(1, (colors[known], "truth"))
    strip = Image.new("RGB", (len(panels) * (PANEL + GAP) - GAP, PANEL + 2 * CAPTION), BACKGROUND)
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(13)
    draw.text((0, 2), entry.caption, fill=INK, font=font)
    for number, (panel_HWC, title) in enumerate(panels):
        x = number * (PANEL + GAP)
        strip.paste(_fit(panel_HWC), (x, CAPTION))
        draw.text((x, CAPTION + PANEL + 2), title, fill=INK, font=font)
    return strip


def _fit(panel_HWC: Array) -> Image.Image:
    """The panel in a square, enlarged or shrunk by nearest so that outlines stay sharp."""
    picture = Image.fromarray(panel_HWC)
    factor = PANEL / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    square = Image.new("RGB", (PANEL, PANEL), (225, 225, 225))
    square.paste(picture.resize(size, Image.Resampling.NEAREST))
    return square
