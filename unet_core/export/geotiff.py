"""GeoTIFF tags of a georeference (OGC 19-008): what images of GIS say of their place on Earth."""

import json
from typing import Any

from unet_core.images.georeference import DEFINED, Georeference

Tag = tuple[int, str, int, Any, bool]
"""Code, type (d doubles, H 16-bit integers, s text), count, value, and whether only once."""
PIXEL_SCALE, TIE_POINT, TRANSFORMATION = 33550, 33922, 34264
KEYS, DOUBLES, TEXTS = 34735, 34736, 34737
MODEL_TYPE, RASTER_TYPE, GEOGRAPHIC_TYPE, PROJECTED_TYPE = 1024, 1025, 2048, 3072
PROJECTED, GEOGRAPHIC, PIXEL_IS_AREA = 1, 2, 1


def geo_tags(where: Georeference) -> list[Tag]:
    """Make the tags of a transform and of a coordinate reference system."""
    tags: list[Tag] = []
    if where.transform is not None:
        a, b, c, d, e, f = where.transform
        if b == d == 0 and a > 0 > e:
            tags.append((PIXEL_SCALE, "d", 3, (a, -e, 0.0), True))
            tags.append((TIE_POINT, "d", 6, (0.0, 0.0, 0.0, c, f, 0.0), True))
        else:
            matrix = (a, b, 0.0, c, d, e, 0.0, f, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
            tags.append((TRANSFORMATION, "d", 16, matrix, True))
    if (where.crs or "").startswith(DEFINED):
        return tags + _defined_tags(json.loads((where.crs or "").removeprefix(DEFINED)))
    authority, _, code = (where.crs or "").partition(":")
    if authority == "EPSG" and code.isdecimal():
        is_geographic = where.pixel_unit == "degree"
        keys = {
            MODEL_TYPE: GEOGRAPHIC if is_geographic else PROJECTED,
            RASTER_TYPE: PIXEL_IS_AREA,
            GEOGRAPHIC_TYPE if is_geographic else PROJECTED_TYPE: int(code),
        }
        values = [1, 1, 0, len(keys)]
        for key, value in keys.items():
            values += [key, 0, 1, value]
        tags.append((KEYS, "H", len(values), values, True))
    return tags


def _defined_tags(crs: dict[str, Any]) -> list[Tag]:
    """Make the tags of a system that its input defined."""
    tags: list[Tag] = [(KEYS, "H", len(crs["keys"]), crs["keys"], True)]
    if crs["doubles"]:
        tags.append((DOUBLES, "d", len(crs["doubles"]), crs["doubles"], True))
    texts = crs["texts"].encode()  # names of systems need not be ASCII
    return [*tags, (TEXTS, "s", 0, texts, True)] if texts else tags
