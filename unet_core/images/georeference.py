"""Where the pixels of an image lie: on Earth, or on a slide."""

from typing import NamedTuple

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
