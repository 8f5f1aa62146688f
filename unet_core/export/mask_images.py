"""Class ids and object labels as image files, which show their palette and read back as ids."""

import math
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import Image

from unet_core.arrays import Array
from unet_core.runs.reader import StoredMask
from unet_core.storage.spool import drop, reports_full_disk, spooled

Palette = tuple[tuple[int, int, int], ...]

TILE_SIDE = 256  # as viewers of large images expect


@reports_full_disk()
def encode_png(values_HW: Array, palette: Palette | None) -> BinaryIO:
    """8 bits with a palette, or else 16-bit gray; values read back as they are."""
    file = spooled()
    if palette is None or values_HW.dtype != np.uint8:
        Image.fromarray(values_HW.astype(np.uint16, copy=False)).save(file, format="PNG")
    else:
        image = Image.fromarray(values_HW)
        image.putpalette([value for rgb in palette for value in rgb])  # makes it of mode P
        image.save(file, format="PNG", bits=8)
    return file


@reports_full_disk()
def encode_tiff(
    shape: tuple[int, ...], bands: Iterable[Array], palette: Palette | None
) -> BinaryIO:
    """Tiles, deflate; uint8 with a palette, or gray of the type of the bands.

    ``bands``: rows of full width from above, each a multiple of ``TILE_SIDE`` but the last.
    """
    bands = iter(bands)
    first_HW = next(bands)
    dtype = first_HW.dtype
    colors: dict[str, Any] = {"photometric": "minisblack"}
    if palette is not None and dtype == np.uint8:
        colormap = np.zeros((3, 256), np.uint16)
        colormap[:, : len(palette)] = np.array(palette, np.uint16).T * 257
        colors = {"photometric": "palette", "colormap": colormap}
    file = spooled()
    try:
        # a classic TIFF has 4 GiB, of which some is left for what does not compress
        is_big = math.prod(shape) * dtype.itemsize > 2**32 - 2**25
        handle = tifffile.FileHandle(file, name="mask")  # a spooled file has none
        with tifffile.TiffWriter(handle, bigtiff=is_big) as tiff:
            tiff.write(
                _tiles(chain([first_HW], bands)),
                shape=shape,
                dtype=dtype,
                tile=(TILE_SIDE, TILE_SIDE),
                compression="zlib",
                compressionargs={"level": 6},  # the default of zlib
                maxworkers=1,
                metadata=None,
                **colors,
            )
    except BaseException:
        drop(file)
        raise
    return file


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
