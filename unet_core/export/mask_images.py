"""Class ids and object labels as image files, which show their palette and read back as ids."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import Image

from unet_core.arrays import Array
from unet_core.export.geotiff import Tag, geo_tags
from unet_core.export.overviews import level_shapes, read_bands, reducing
from unet_core.images.georeference import NOWHERE, Georeference
from unet_core.runs.reader import StoredMask
from unet_core.storage.spool import drop, reports_full_disk, spooled

Palette = tuple[tuple[int, int, int], ...]

TILE_SIDE = 256  # as viewers of large images expect
GDAL_NODATA = 42113
"""TIFF tag of the nodata value, as text."""


@dataclass(frozen=True)
class Appearance:
    """Palette, nodata and place of an exported image."""

    palette: Palette | None = None
    """Colors of 8-bit class ids; None for gray."""
    nodata: int | None = None
    """Class id of pixels that are not valid."""
    georeference: Georeference = NOWHERE
    has_overviews: bool = True
    """Large TIFFs have them."""

    @property
    def colors(self) -> Array:
        """256 colors, uint8 (256, 3)."""
        colors = np.zeros((256, 3), np.uint8)
        colors[: len(self.palette or ())] = self.palette or np.zeros((0, 3))
        return colors


@reports_full_disk()
def encode_png(values_HW: Array, look: Appearance) -> BinaryIO:
    """Encode 8 bits with a palette, whose nodata is transparent, or else 16-bit gray; values read
    back as they are.
    """
    file = spooled()
    if look.palette is None or values_HW.dtype != np.uint8:
        Image.fromarray(values_HW.astype(np.uint16, copy=False)).save(file, format="PNG")
    elif look.nodata is None:
        image = Image.fromarray(values_HW)
        image.putpalette([value for rgb in look.palette for value in rgb])  # makes it of mode P
        image.save(file, format="PNG", bits=8)
    else:
        image = Image.fromarray(values_HW)
        image.putpalette(look.colors.tobytes())
        image.save(file, format="PNG", bits=8, transparency=look.nodata)
    return file


@reports_full_disk()
def encode_tiff(shape: tuple[int, int], bands: Iterable[Array], look: Appearance) -> BinaryIO:
    """Encode tiles, deflate; uint8 with a palette, or gray of the type of the bands. Large images
    have a pyramid of overviews.

    ``bands``: rows of full width from above, each a multiple of ``TILE_SIDE`` but the last.
    """
    bands = iter(bands)
    first_HW = next(bands)
    dtype = first_HW.dtype
    how: dict[str, Any] = {
        "dtype": dtype,
        "tile": (TILE_SIDE, TILE_SIDE),
        "compression": "zlib",
        "compressionargs": {"level": 6},  # the default of zlib
        "maxworkers": 1,
        "metadata": None,
        "photometric": "minisblack",
    }
    if look.palette is not None and dtype == np.uint8:
        how |= {"photometric": "palette", "colormap": look.colors.T.astype(np.uint16) * 257}
    shapes = level_shapes(shape) if look.has_overviews else []
    nodata = _nodata_tag(look.nodata)
    file, levels = spooled(), [spooled() for _ in shapes]

    def tiles(bands: Iterable[Array], level: int) -> Iterator[Array]:
        """Cut bands into tiles; they make the next level."""
        return _tiles(reducing(bands, levels[level], look.nodata) if levels[level:] else bands)

    try:
        # a classic TIFF has 4 GiB, of which some is left for what does not compress
        is_big = 4 / 3 * math.prod(shape) * dtype.itemsize > 2**32 - 2**25
        handle = tifffile.FileHandle(file, name="mask")  # a spooled file has none
        with tifffile.TiffWriter(handle, bigtiff=is_big) as tiff:
            tiff.write(
                tiles(chain([first_HW], bands), 0),
                shape=shape,
                extratags=nodata + geo_tags(look.georeference),
                **_resolution(look.georeference),
                **how,
            )
            for level, (of_level, small) in enumerate(zip(levels, shapes, strict=True), start=1):
                rows = tiles(read_bands(of_level, small, dtype), level)
                tiff.write(rows, shape=small, subfiletype=1, extratags=nodata, **how)
    except BaseException:
        drop(file)
        raise
    finally:
        for of_level in levels:
            drop(of_level)
    return file


def _nodata_tag(nodata: int | None) -> list[Tag]:
    return [] if nodata is None else [(GDAL_NODATA, "s", 0, str(nodata), True)]


def _resolution(where: Georeference) -> dict[str, Any]:
    """Return the size of pixels as TIFF tells it: pixels per centimetre, fractions of 32 bits."""
    height, width = where.pixel_size or (0, 0)
    if where.pixel_unit != "µm" or not 1e-5 < min(height, width) <= max(height, width) < 1e12:
        return {}
    return {"resolution": (1e4 / width, 1e4 / height), "resolutionunit": "CENTIMETER"}


def bands_of(mask: StoredMask) -> Iterator[Array]:
    """A mask's rows of windows from above, each as one array: the whole of a mask is not held."""
    for _, windows in groupby(mask.windows.items(), key=lambda window: window[0].y):
        yield np.concatenate([read() for _, read in windows], axis=1)


def _tiles(bands: Iterable[Array]) -> Iterator[Array]:
    """Tiles from left to right and from above, filled up with zeros."""
    for band_HW in bands:
        for y in range(0, band_HW.shape[0], TILE_SIDE):
            for x in range(0, band_HW.shape[1], TILE_SIDE):
                tile_HW = band_HW[y : y + TILE_SIDE, x : x + TILE_SIDE]
                yield np.pad(tile_HW, [(0, TILE_SIDE - side) for side in tile_HW.shape])
