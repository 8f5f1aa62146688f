"""Coordinates and pixel size as TIFFs tell them: GeoTIFF (OGC 19-008), OME, ImageJ, Aperio, TIFF 6.

What is not understood is left out, never guessed.
"""

import json
import math
import re
from itertools import chain
from typing import Any

from unet_core.images.georeference import DEFINED, Georeference, Transform
from unet_core.images.tiff_pages import name_of

PIXEL_SCALE, TIE_POINT, TRANSFORMATION = 33550, 33922, 34264
KEYS, DOUBLES, TEXTS = 34735, 34736, 34737
MODEL_TYPE, RASTER_TYPE, GEOGRAPHIC_TYPE, PROJECTED_TYPE, LINEAR_UNIT = 1024, 1025, 2048, 3072, 3076
GEOGRAPHIC, PIXEL_IS_AREA, PIXEL_IS_POINT = 2, 1, 2
USER_DEFINED = 32767  # a code of GeoTIFF for systems that have none
LINEAR_UNITS = {9001: "m", 9002: "ft", 9003: "US survey foot"}
"""Units of projected systems by EPSG code."""
MICROMETERS = {
    "nm": 1e-3, "µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "mm": 1e3, "cm": 1e4,
    "m": 1e6, "inch": 25400.0,
}  # fmt: skip
"""Micrometres of a unit, by the names of OME and ImageJ."""
MEANINGLESS = (72.0, 96.0, 300.0)
"""Dots per inch that software writes where it knows nothing."""

Size = tuple[float, float]


def georeference_of(tiff: Any, page: Any) -> Georeference | None:
    """Read where the pixels of an image lie; None if its file does not tell."""
    tags = page.keyframe.tags
    keys = _geo_keys(tags)
    if transform := _transform(tags, keys.get(RASTER_TYPE) == PIXEL_IS_POINT):
        a, b, _, d, e, _ = transform
        projected, geographic = (
            code if 0 < (code := keys.get(key, 0)) < USER_DEFINED else 0
            for key in (PROJECTED_TYPE, GEOGRAPHIC_TYPE)
        )
        is_projected = PROJECTED_TYPE in keys
        code = projected if is_projected else geographic
        unit = LINEAR_UNITS.get(keys.get(LINEAR_UNIT, 9001)) if is_projected else None
        if keys and not is_projected and keys.get(MODEL_TYPE, GEOGRAPHIC) == GEOGRAPHIC:
            unit = "degree"  # other models are of projections without keys, or geocentric
        size = math.hypot(b, e), math.hypot(a, d)
        crs = f"EPSG:{code}" if code else _defined_crs(tags)
        return Georeference(crs, transform, size, unit)
    size_um = _ome_size(tiff) or _aperio_size(tags) or _resolution_size(tiff, tags)
    if size_um is None or not all(0 < side < math.inf for side in size_um):
        return None
    return Georeference(None, None, size_um, "µm")


def _geo_keys(tags: Any) -> dict[int, int]:
    """Read the geo keys whose values are codes."""
    directory = tags.valueof(KEYS, ())
    if not isinstance(directory, tuple) or len(directory) < 4:
        return {}
    entries = zip(*(directory[4 + n :: 4] for n in range(4)), strict=False)
    return {key: value for key, place, _, value in entries if place == 0}


def _defined_crs(tags: Any) -> str | None:
    """Keep the keys of a system that has no code as they are: WKT would need a library of them."""
    keys = tags.valueof(KEYS, ())
    if len(keys) < 8:
        return None
    entries = [[*keys[at : at + 4]] for at in range(4, len(keys) - 3, 4)]
    for entry in entries:
        if entry[0] == RASTER_TYPE:
            entry[3] = PIXEL_IS_AREA  # as transforms are given here
    doubles = tags.valueof(DOUBLES, ())
    found = {
        "keys": [*keys[:4], *chain(*entries)],
        "doubles": [*doubles] if isinstance(doubles, tuple) else [doubles],
        "texts": str(tags.valueof(TEXTS, "")),
    }
    return DEFINED + json.dumps(found, separators=(",", ":"))


def _transform(tags: Any, is_of_points: bool) -> Transform | None:
    """Read the transform of corners of pixels, as GDAL does; None if there is none."""
    matrix, scale, tie = (
        tags.valueof(code, ()) for code in (TRANSFORMATION, PIXEL_SCALE, TIE_POINT)
    )
    try:
        if len(matrix) == 16:
            a, b, _, c, d, e, _, f = map(float, matrix[:8])
        elif len(scale) >= 2 and len(tie) == 6:
            (a, e), b, d = (float(scale[0]), -float(scale[1])), 0.0, 0.0
            c, f = float(tie[3]) - tie[0] * a, float(tie[4]) - tie[1] * e
        else:
            return None
    except (TypeError, ValueError):
        return None
    if is_of_points:  # the coordinates of a pixel are those of its centre
        c, f = c - (a + b) / 2, f - (d + e) / 2
    found = (a, b, c, d, e, f)
    return found if all(map(math.isfinite, found)) and a * e != b * d else None


def _ome_size(tiff: Any) -> Size | None:
    if not tiff.is_ome or not (pixels := re.search(r"<(?:\w+:)?Pixels\b[^>]*>", tiff.ome_metadata)):
        return None
    found = dict(re.findall(r"(PhysicalSize[XY](?:Unit)?)\s*=\s*[\"']([^\"']*)", pixels[0]))
    units = (found.get(f"PhysicalSize{axis}Unit", "µm") for axis in "YX")
    return _in_micrometers((found.get(f"PhysicalSize{axis}") for axis in "YX"), units)


def _aperio_size(tags: Any) -> Size | None:
    text = str(tags.valueof("ImageDescription", ""))
    found = re.search(r"\|\s*MPP\s*=\s*([\d.]+)", text) if text.startswith("Aperio") else None
    return _in_micrometers([found[1]] * 2, ["µm"] * 2) if found else None


def _resolution_size(tiff: Any, tags: Any) -> Size | None:
    """Read pixels per unit of TIFF's own tags, or of ImageJ, which has a unit in its text."""
    per_unit = [_quotient(tags.valueof(f"{axis}Resolution")) for axis in "YX"]
    if None in per_unit:
        return None
    unit = name_of(tags.valueof("ResolutionUnit")).lower().replace("centimeter", "cm")
    if tiff.is_imagej:
        text = str((tiff.imagej_metadata or {}).get("unit", ""))
        unit = text.encode().decode("unicode_escape") if text.isascii() else text
    if unit == "inch" and any(value in MEANINGLESS for value in per_unit):
        return None
    return _in_micrometers([1 / value if value else 0 for value in per_unit], [unit] * 2)


def _quotient(value: Any) -> float | None:
    try:
        return float(value[0] / value[1])
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return None


def _in_micrometers(values: Any, units: Any) -> Size | None:
    """Convert lengths; None if one is no number, or its unit is not known."""
    try:
        height, width = (
            float(value) * MICROMETERS[unit.replace("μ", "µ")]  # Greek mu or micro sign
            for value, unit in zip(values, units, strict=True)
        )
    except (KeyError, TypeError, ValueError):
        return None
    return height, width
