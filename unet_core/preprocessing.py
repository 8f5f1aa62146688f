"""From decoded pixels to what a network was trained on: colour conversion and normalisation.

The checkpoint says what it wants. Nothing here rounds or clips the pixels: a network receives
``(pixels - offset) * scale`` in float32, computed on the device from the image's own integers.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from unet_core.arrays import Array
from unet_core.codec import Raster
from unet_core.errors import ImageError


class Preprocessing(BaseModel):
    """What a checkpoint wants from an image; part of its metadata and of the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    color: Literal["gray", "rgb"] | Annotated[int, Field(ge=1)]
    """``gray``: RGB becomes luma (0.299 R + 0.587 G + 0.114 B, ITU-R 601); ``rgb``: gray is
    repeated three times; a number: that many channels as they are. Alpha is dropped before."""
    normalisation: Literal["percentile", "range", "zscore"]
    low: float | None = None
    """What becomes 0: a percentile (1), or a pixel value (0)."""
    high: float | None = None
    """What becomes 1: a percentile (99.8), or a pixel value (the type's largest; 1 for floats)."""

    @property
    def channels(self) -> int:
        """Input channels of the network."""
        return self.color if isinstance(self.color, int) else {"gray": 1, "rgb": 3}[self.color]


def to_color(raster: Raster, color: str | int) -> Array:
    """Pixels CHW in the colours that a network wants, of the image's own dtype."""
    pixels_HWC = raster.pixels_HWC
    channels = pixels_HWC.shape[2]
    if channels == (color if isinstance(color, int) else {"gray": 1, "rgb": 3}[color]):
        return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))
    if channels == 1 and color == "rgb":
        return np.repeat(pixels_HWC.transpose(2, 0, 1), 3, axis=0)
    if channels == 3 and color == "gray":
        return _luma(pixels_HWC)[None]
    raise ImageError(
        "channels",
        f"the image has {channels} channels, but the model wants {color}; choose some with "
        "input.channels",
    )


def _luma(pixels_HWC: Array) -> Array:
    """ITU-R 601 luma, rounded to nearest for integers (weights in 1/65536, which sum to one)."""
    red, green, blue = (pixels_HWC[..., channel] for channel in range(3))
    if pixels_HWC.dtype.kind == "f":
        return red * np.float32(0.299) + green * np.float32(0.587) + blue * np.float32(0.114)
    total = red.astype(np.uint32) * 19595
    total += green.astype(np.uint32) * 38470
    total += blue.astype(np.uint32) * 7471
    total += 0x8000
    total >>= 16
    return total.astype(pixels_HWC.dtype)


def offset_and_scale(pixels_CHW: Array, wanted: Preprocessing) -> tuple[Array, Array]:
    """Per channel: what to subtract from the pixels, then what to multiply with; float32 (C,).

    From integer counts, so the same on every machine. A constant channel becomes all zeros.
    """
    if wanted.normalisation == "range":
        is_integer = pixels_CHW.dtype.kind == "u"
        full = float(np.iinfo(pixels_CHW.dtype).max) if is_integer else 1.0
        low = 0.0 if wanted.low is None else wanted.low
        high = full if wanted.high is None else wanted.high
        pairs = [(low, high - low)] * len(pixels_CHW)
    elif wanted.normalisation == "percentile":
        low = 1.0 if wanted.low is None else wanted.low
        high = 99.8 if wanted.high is None else wanted.high
        pairs = [_percentiles(plane, low, high) for plane in pixels_CHW]
    else:
        pairs = [_mean_and_deviation(plane) for plane in pixels_CHW]
    offset = np.array([offset for offset, _ in pairs], dtype=np.float32)
    with np.errstate(over="ignore"):  # the network's output then tells that this is no image
        scale = np.array([1 / span if span > 0 else 0.0 for _, span in pairs], dtype=np.float32)
    return offset, scale


def _percentiles(plane_HW: Array, low: float, high: float) -> tuple[float, float]:
    """The value at the low percentile, and the distance from there to the high one."""
    ranks = [max(1, int(np.ceil(plane_HW.size * q / 100))) for q in (low, high)]
    if plane_HW.dtype.kind == "u":
        cumulative = np.cumsum(np.bincount(plane_HW.ravel()))
        bottom, top = (float(np.searchsorted(cumulative, rank)) for rank in ranks)
    else:
        ordered = np.partition(plane_HW.ravel(), [rank - 1 for rank in ranks])
        bottom, top = (float(ordered[rank - 1]) for rank in ranks)
    return bottom, top - bottom


def _mean_and_deviation(plane_HW: Array) -> tuple[float, float]:
    """Mean and standard deviation; integers are summed exactly."""
    if plane_HW.dtype.kind == "u":
        wide = plane_HW.ravel().astype(np.uint64)
        mean = int(wide.sum()) / wide.size
        variance = int((wide * wide).sum()) / wide.size - mean * mean
    else:
        wide = plane_HW.ravel().astype(np.float64)
        mean, variance = float(wide.mean()), float(wide.var())
    return mean, float(np.sqrt(max(variance, 0.0)))
