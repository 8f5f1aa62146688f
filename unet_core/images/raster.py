"""Rasters: images in memory or read by window. What uses one does not ask which it is.

C channels · H W rows and columns of a window, which is a ``Box`` inside the image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from unet_core.arrays import Array
from unet_core.tiling.geometry import Box

IN_MEMORY = (1, 1)
"""``segment_side`` of images in memory: reading a window takes no more than the window."""


class Window(NamedTuple):
    """The content of a window of an image."""

    pixels_CHW: Array
    valid_HW: Array | None = None
    """False where the image has no pixel; None if all pixels are valid."""


@runtime_checkable
class Raster(Protocol):
    """An image, or class ids as an image of one channel; threads may share it."""

    shape: tuple[int, int]
    """Height and width in pixels."""
    channels: int
    dtype: np.dtype[Any]
    """Type of the pixels: uint8, uint16 or float32. Class ids may be read in a narrower one."""
    segment_side: tuple[int, int]
    """Rows and columns that are fetched and decoded at least, however small a window is."""
    held_bytes: int
    """Bytes of memory held while the image is in use."""

    def read(self, window: Box, /) -> Window:
        """Read a window inside the image; raises ImageError."""
        raise NotImplementedError

    def whole(self) -> Window:
        """Read the whole image; raises ImageError."""
        return self.read(Box(0, 0, *self.shape))


@dataclass(frozen=True)
class WindowRaster(Raster):
    """An image whose windows are made by a function."""

    shape: tuple[int, int]
    channels: int
    dtype: np.dtype[Any]
    segment_side: tuple[int, int]
    held_bytes: int
    read: Callable[[Box], Window]


class ArrayRaster(WindowRaster):
    """An image in memory; its windows are views."""

    def __init__(self, pixels_CHW: Array, valid_HW: Array | None = None) -> None:
        def read(window: Box) -> Window:
            here = window.slices
            return Window(pixels_CHW[:, *here], None if valid_HW is None else valid_HW[here])

        channels, height, width = pixels_CHW.shape
        held_bytes = pixels_CHW.nbytes + (0 if valid_HW is None else valid_HW.nbytes)
        super().__init__((height, width), channels, pixels_CHW.dtype, IN_MEMORY, held_bytes, read)


def converted(raster: Raster, channels: int, convert: Callable[[Array], Array]) -> Raster:
    """Convert the pixels CHW of an image, whose type stays: at once if it is in memory, else those
    of each window.
    """

    def read(window: Box) -> Window:
        found = raster.read(window)
        return found._replace(pixels_CHW=convert(found.pixels_CHW))

    by_window = WindowRaster(
        raster.shape, channels, raster.dtype, raster.segment_side, raster.held_bytes, read
    )
    return ArrayRaster(*by_window.whole()) if isinstance(raster, ArrayRaster) else by_window
