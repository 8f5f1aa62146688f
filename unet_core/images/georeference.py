"""Coordinates and size of pixels: on Earth, or on a slide."""

import math
from typing import NamedTuple

from unet_core.errors import ImageError

DEFINED = "GEOTIFF:"
"""Begin of a ``crs`` without a code: then come the GeoTIFF keys that define it, as JSON with
``keys``, ``doubles`` and ``texts``, the values of tags 34735 to 34737."""
Transform = tuple[float, float, float, float, float, float]


class Georeference(NamedTuple):
    """Coordinates and pixel size of an image, as far as its file tells them."""

    crs: str | None = None
    """Coordinate reference system: its authority and code (``EPSG:32633``), or ``DEFINED`` …"""
    transform: Transform | None = None
    """(a, b, c, d, e, f) of x = a · column + b · row + c and y = d · column + e · row + f, for
    corners of pixels, in the units of ``crs``."""
    pixel_size: tuple[float, float] | None = None
    """Height and width of a pixel in ``pixel_unit``."""
    pixel_unit: str | None = None
    """``µm``, ``m``, ``degree`` …"""


NOWHERE = Georeference()


def from_world_file(text: bytes) -> Georeference:
    """Read the transform of a world file: six numbers a line, for the centre of the first pixel.

    Raises ImageError (``decode``).
    """
    try:
        a, d, b, e, c, f = map(float, text.decode().replace(",", ".").split())
    except ValueError as error:
        raise ImageError("decode", "its world file does not hold six numbers") from error
    corner = (a, b, c - (a + b) / 2, d, e, f - (d + e) / 2)
    return Georeference(None, corner, (math.hypot(b, e), math.hypot(a, d)), None)
