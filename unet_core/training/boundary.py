"""Boundary term of the U-Net paper's weight map: large between objects that are close together."""

import numpy as np
from scipy import ndimage

from unet_core.arrays import Array

REACH = 6
"""Distance in units of σ beyond which the term, then below exp(−18) = 2e-8, is taken as 0."""


def boundary_term(objects_HW: Array, sigma: float) -> Array:
    """exp(−(d1 + d2)² / (2 σ²)) of each pixel, float32 HW (Ronneberger et al. 2015, eq. 2, without
    w0 and w_c): d1 and d2 are its distances in pixels to the border of the nearest object and to
    that of the second nearest. 0 where there are fewer than two.

    ``objects_HW``: object ids, 0 is background. An object's border consists of its pixels with a
    4-neighbour outside the object; the image's edge is not a border.
    """
    near_HW = np.full(objects_HW.shape, np.inf, dtype=np.float32)
    second_HW = near_HW.copy()
    reach = int(np.ceil(REACH * sigma))
    for number, box in enumerate(ndimage.find_objects(objects_HW.astype(np.int32)), start=1):
        if box is None:
            continue
        around = tuple(
            slice(max(0, side.start - reach), min(length, side.stop + reach))
            for side, length in zip(box, objects_HW.shape, strict=True)
        )
        distance = _to_border(objects_HW[around] == number)
        near, second = near_HW[around], second_HW[around]
        np.minimum(second, np.maximum(near, distance), out=second)
        np.minimum(near, distance, out=near)
    return np.exp(-((near_HW + second_HW) ** 2) / (2 * sigma**2))


def objects_of(labels_HW: Array, ignore_index: int) -> Array:
    """Number the connected components (4 neighbours) of each foreground class, from 1; int32 HW."""
    objects_HW = np.zeros(labels_HW.shape, dtype=np.int32)
    for label in np.unique(labels_HW):
        if label not in (0, ignore_index):
            components_HW, _ = ndimage.label(labels_HW == label)
            objects_HW[components_HW > 0] = components_HW[components_HW > 0] + objects_HW.max()
    return objects_HW


def _to_border(is_object: Array) -> Array:
    """Compute the distance of each pixel to an object's border; infinite if it has no border."""
    border = is_object & ~ndimage.binary_erosion(is_object, border_value=1)
    if not border.any():
        return np.full(is_object.shape, np.inf, dtype=np.float32)
    return ndimage.distance_transform_edt(~border).astype(np.float32)
