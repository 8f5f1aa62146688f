"""Preprocessing: color conversion and normalization, as the checkpoint requires them.

The checkpoint says what it wants. Nothing here rounds or clips the pixels: a network receives
``(pixels - offset) * scale`` in float32, computed on the device from the image's own integers.
"""

from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from unet_core.arrays import Array
from unet_core.config.normalization import NormalizationSection, spread
from unet_core.config.presets import channels_of
from unet_core.errors import ImageError
from unet_core.images.raster import Window


class Limits(NamedTuple):
    """Value that becomes 0 in a channel, and the distance from there to what becomes 1, or the
    standard deviation. A span of 0 makes the channel all zeros.
    """

    offset: float
    span: float


class Preprocessing(NormalizationSection):
    """Preprocessing of a checkpoint; part of its metadata and of the fingerprint."""

    color: Literal["gray", "rgb"] | Annotated[int, Field(ge=1)]
    """``gray``: RGB becomes luma (0.299 R + 0.587 G + 0.114 B, ITU-R 601); ``rgb``: gray is
    repeated three times; a number: that many channels as they are. Alpha is dropped before."""

    @model_serializer(mode="wrap")
    def _without_new_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``mean`` and ``std`` out where they are not given, as before they existed."""
        keys: dict[str, Any] = serialize(self)
        return {k: v for k, v in keys.items() if v is not None or k not in ("mean", "std")}

    @property
    def channels(self) -> int:
        """Input channels of the network."""
        return channels_of(self.color)

    @property
    def is_fixed(self) -> bool:
        """True if the same limits hold for every image, whatever it shows."""
        return self.normalization in ("range", "standard")

    def fixed_limits(self, full_scale: float) -> list[Limits]:
        """Return the limits of each channel, for images with this largest value."""
        if self.normalization == "standard":
            assert self.mean is not None
            assert self.std is not None
            values = (spread(value, self.channels) for value in (self.mean, self.std))
            return [Limits(m * full_scale, s * full_scale) for m, s in zip(*values, strict=True)]
        return [Limits(low, high - low) for low, high in self.ends(0.0, full_scale)]

    def ends(self, low: float, high: float) -> list[tuple[float, float]]:
        """``low`` and ``high`` of each channel, or these where the checkpoint gives none."""
        ends = (low if self.low is None else self.low, high if self.high is None else self.high)
        return [*zip(*(spread(end, self.channels) for end in ends), strict=True)]


def offset_and_scale(limits: list[Limits]) -> tuple[Array, Array]:
    """Convert limits to the offset and the scale of each channel, float32 (C,)."""
    offset = np.array([offset for offset, _ in limits], dtype=np.float32)
    with np.errstate(over="ignore"):  # the network's output then tells that this is no image
        scale = np.array([1 / span if span > 0 else 0.0 for _, span in limits], dtype=np.float32)
    return offset, scale


def to_color(pixels_CHW: Array, color: str | int) -> Array:
    """Convert pixels to the colors that a network takes; the dtype stays."""
    channels = len(pixels_CHW)
    if channels == channels_of(color):
        return np.ascontiguousarray(pixels_CHW)
    if channels == 1 and color == "rgb":
        return np.repeat(pixels_CHW, 3, axis=0)
    if channels == 3 and color == "gray":
        return _luma(pixels_CHW)[None]
    raise ImageError(
        "channels",
        f"the image has {channels} channels, but the model wants {color}; choose some with "
        "input.channels",
    )


def in_color(window: Window, color: str | int) -> Window:
    """Convert a window to the colors that a network takes; luma is known where all of RGB is."""
    pixels_CHW, known_CHW = to_color(window.pixels_CHW, color), window.known_CHW
    if known_CHW is not None and len(known_CHW) != len(pixels_CHW):
        known_CHW = np.broadcast_to(known_CHW.all(axis=0), pixels_CHW.shape)
    return Window(pixels_CHW, window.valid_HW, known_CHW)


def fill(window: Window, offset: Array) -> Window:
    """Replace what is not known by the value that the network receives as 0, or the next one that
    the type has; so no nodata value of a file reaches a mask.
    """
    known_CHW = known_of(window)
    if known_CHW is None:
        return window
    dtype = window.pixels_CHW.dtype
    values = offset
    if dtype.kind == "u":
        values = np.rint(offset.clip(0, np.iinfo(dtype).max)).astype(dtype)
    filled_CHW = np.where(known_CHW, window.pixels_CHW, values[:, None, None])
    return window._replace(pixels_CHW=filled_CHW)


def known_of(window: Window) -> Array | None:
    """Find the samples that count, CHW or 1HW; None for all."""
    if window.known_CHW is not None:
        return window.known_CHW
    return None if window.valid_HW is None else window.valid_HW[None]


def _luma(pixels_CHW: Array) -> Array:
    """ITU-R 601 luma, rounded to nearest for integers (weights in 1/65536, which sum to one)."""
    red, green, blue = pixels_CHW
    if pixels_CHW.dtype.kind == "f":
        return red * np.float32(0.299) + green * np.float32(0.587) + blue * np.float32(0.114)
    total: Array = red * np.uint32(19595) + green * np.uint32(38470) + blue * np.uint32(7471)
    return ((total + 0x8000) >> 16).astype(pixels_CHW.dtype)
