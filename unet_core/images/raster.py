"""Rasters: images in memory or read by window. What uses one does not ask which it is.

C channels · H W rows and columns of a window, which is a ``Box`` inside the image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from unet_core.arrays import Array
from unet_core.images.georeference import Georeference
from unet_core.tiling.geometry import Box

IN_MEMORY = (1, 1)
"""``segment_side`` of images in memory: reading a window takes no more than the window."""


class Window(NamedTuple):
    """The content of a window of an image."""

    pixels_CHW: Array
    valid_HW: Array | None = None
    """False where the image has no pixel; None if all pixels are valid."""
    known_CHW: Array | None = None
    """False where a channel of a pixel is nodata; None if that is where pixels are not valid."""

    def cut(self, cut: Callable[[Array], Array]) -> "Window":
        """Cut rows and columns, the last two axes of each array."""
        pixels_CHW, *others = self
        return Window(cut(pixels_CHW), *(None if array is None else cut(array) for array in others))


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
    full_scale: float
    """Largest value of the type that the file stores; 1 for floats."""
    georeference: Georeference | None

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
    full_scale: float = 1.0
    georeference: Georeference | None = None


class ArrayRaster(WindowRaster):
    """An image in memory; its windows are views."""

    def __init__(
        self,
        pixels_CHW: Array,
        valid_HW: Array | None = None,
        known_CHW: Array | None = None,
        full_scale: float | None = None,
        georeference: Georeference | None = None,
    ) -> None:
        whole = Window(pixels_CHW, valid_HW, known_CHW)

        def read(window: Box) -> Window:
            return whole.cut(lambda array: array[..., *window.slices])

        channels, height, width = pixels_CHW.shape
        held_bytes = sum(array.nbytes for array in whole if array is not None)
        super().__init__(
            (height, width), channels, pixels_CHW.dtype, IN_MEMORY, held_bytes, read,
            full_scale_of(pixels_CHW.dtype) if full_scale is None else full_scale, georeference,
        )  # fmt: skip


def full_scale_of(stored: np.dtype[Any]) -> float:
    """Return the largest value of a stored type; 1 for floats."""
    return float(np.iinfo(stored).max) if stored.kind in "ui" else 1.0


def converted(
    raster: Raster, convert: Callable[[Window], Window], channels: int | None = None
) -> Raster:
    """Convert the content of an image, whose type stays: at once if it is in memory, else that of
    each window. ``channels``: their number, if it changes.
    """
    by_window = WindowRaster(
        raster.shape,
        raster.channels if channels is None else channels,
        raster.dtype,
        raster.segment_side,
        raster.held_bytes,
        lambda window: convert(raster.read(window)),
        raster.full_scale,
        raster.georeference,
    )
    if not isinstance(raster, ArrayRaster):
        return by_window
    return ArrayRaster(*by_window.whole(), raster.full_scale, raster.georeference)
