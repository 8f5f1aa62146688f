"""Validity: which stored values are pixels, by nodata values, alpha channels and mask pages.

A *valid* pixel is a pixel; a *known* sample has a value. A pixel with one band that is nodata stays
valid while another band is known.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unet_core.arrays import Array
from unet_core.config.sections import InputConfig
from unet_core.images.georeference import Georeference


class Stored(NamedTuple):
    """An image as its file stores it, or a window of it, before channels are chosen."""

    pixels: Any
    """HW or HWC without alpha; with it if the config chooses channels."""
    valid_HW: Array | None = None
    """False where alpha or a mask page says that there is no pixel; None if all are pixels."""
    known: Array | None = None
    """False where a sample is nodata; the shape of ``pixels``, or HW1 if that is of all samples.
    None if all are known."""
    full_scale: float | None = None
    """Largest value that the file can store; None if it is that of the type of ``pixels``."""
    georeference: Georeference | None = None


def nodata_value(declared: float | None, config: InputConfig) -> float | None:
    """Choose the nodata value of a file: the one that it declares, or ``input.nodata``."""
    if config.nodata == "auto":
        return declared
    return None if config.nodata == "none" else float(config.nodata)


def known_samples(stored: Any, nodata: float | None) -> Array | None:
    """Find the samples that are not nodata; None if all are known.

    Like in GDAL, integers have no nodata where the value is not one of their type, and floats are
    compared in their own precision.
    """
    if nodata is None or stored.dtype.kind not in "uif":
        return None
    if stored.dtype.kind == "f":
        with np.errstate(over="ignore"):
            value = stored.dtype.type(nodata)
        is_there = math.isfinite(value) or not math.isfinite(nodata)
        known = ~np.isnan(stored) if math.isnan(nodata) else stored != value
    else:
        limits = np.iinfo(stored.dtype)
        is_there = nodata.is_integer() and limits.min <= nodata <= limits.max
        known = stored != (int(nodata) if is_there else 0)
    return None if not is_there or known.all() else known


def split_alpha(
    pixels_HWC: Any, alpha: Sequence[int], config: InputConfig
) -> tuple[Any, Array | None]:
    """Separate pixels from alpha (HW). Chosen channels count as stored: pixels then keep the alpha
    channels, and one that is chosen itself is no alpha.
    """
    kept = [at for at in alpha if at not in config.channels]
    alpha_HW = pixels_HWC[..., kept[0]] if kept else None
    return (pixels_HWC if config.channels else np.delete(pixels_HWC, alpha, axis=-1)), alpha_HW


def opaque(alpha_HW: Array | None) -> Array | None:
    """Find the pixels of a whole image that alpha does not hide; None for all of them, also where
    alpha is constant, which says nothing.
    """
    if alpha_HW is None or alpha_HW.min() > 0 or not alpha_HW.any():
        return None
    return alpha_HW > 0
