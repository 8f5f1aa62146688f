"""Objects of a mask: connected components of each class, optionally cut where objects touch, and
their measurements.

Components are of 4 neighbours, so that two that meet at a corner only are two objects. Class 0 is
background.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.morphology import local_maxima, reconstruction
from skimage.segmentation import watershed

from unet_core.arrays import Array
from unet_core.images.raster import Raster
from unet_core.metrics import bands, class_pixels
from unet_core.tiling.geometry import Box, Slices

SADDLE = 0.9
"""Two summits of the distance to an object's border are two objects if the way from one to the
other goes below this share of the lower one. Relative, so it holds for objects of any size."""
SMOOTHING = 0.1
"""σ of the distances, as a share of their largest: a border of pixels has summits of its own."""
FINE = 32
"""Pixels from summit to border that are enough to find the summits."""
EVERYWHERE = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Objects:
    """The objects of one image."""

    labels_HW: Array
    """int32; 1 to the number of objects by class, then from above, 0 elsewhere."""
    classes: list[int]
    """Class id of each object."""

    @classmethod
    def of_classes(cls, mask_HW: Array) -> "Objects":
        """Take each class but background as one object; absent classes have no region."""
        return cls(mask_HW, list(range(1, int(mask_HW.max()) + 1)))

    def regions(self) -> Iterator[tuple[int, Slices, Array]]:
        """Class, box and pixels (HW, of the box) of each object."""
        for label, box in enumerate(ndimage.find_objects(self.labels_HW), start=1):
            if box is not None:
                yield self.classes[label - 1], box, self.labels_HW[box] == label


def find_objects(mask_HW: Array, splits: bool) -> Objects:
    """Find the objects of class ids HW; ``splits`` cuts those apart that touch."""
    labels_HW = np.zeros(mask_HW.shape, np.int32)
    classes: list[int] = []
    counts = class_pixels(mask_HW, int(mask_HW.max()) + 1)
    for class_id in (1 + np.flatnonzero(counts[1:])).tolist():
        found_HW = np.empty(mask_HW.shape, np.int32)
        ndimage.label(mask_HW == class_id, output=found_HW)
        for number, box in enumerate(ndimage.find_objects(found_HW), start=1):
            is_object = found_HW[box] == number
            parts_HW = split(is_object) if splits else is_object.astype(np.int32)
            labels_HW[box][is_object] = parts_HW[is_object] + len(classes)
            classes += [class_id] * int(parts_HW.max())
    return Objects(labels_HW, classes)


def split(is_object: Array) -> Array:
    """Cut one connected object into parts, numbered from 1 (int32 HW, 0 outside).

    Seeded watershed on the distance to the border, as it is in the paper of Vincent and Soille
    (1991); seeds are the h-maxima of the distance's logarithm, which makes h a ratio.
    """
    distance_HW = ndimage.distance_transform_edt(np.pad(is_object, 1))[1:-1, 1:-1]
    step = max(1, int(distance_HW.max() / FINE))  # a ratio needs no more of what is large
    seeds_HW = np.zeros(is_object.shape, np.int32)
    seeds_HW[::step, ::step] = _seeds(distance_HW[::step, ::step] / step)
    if seeds_HW.max() < 2:
        return is_object.astype(np.int32)
    return watershed(-distance_HW, seeds_HW, mask=is_object).astype(np.int32)


def _seeds(distance_HW: Array) -> Array:
    """Label the summits of an object's distances."""
    is_object = distance_HW > 0
    smooth_HW = ndimage.gaussian_filter(distance_HW, SMOOTHING * distance_HW.max())
    bottom = math.log(smooth_HW[is_object].min()) - 1
    height_HW = np.log(smooth_HW, where=is_object, out=np.full(smooth_HW.shape, bottom))
    height_HW = np.pad(height_HW, 1, constant_values=bottom)  # no summit is at the edge
    lowered_HW = np.maximum(height_HW + math.log(SADDLE), bottom)
    flooded_HW = reconstruction(lowered_HW, height_HW)
    summits_HW = local_maxima(flooded_HW, connectivity=2)
    seeds_HW: Array = ndimage.label(summits_HW[1:-1, 1:-1] & is_object, EVERYWHERE)[0]
    return seeds_HW


def place(box: Slices) -> Box:
    """Convert slices to the columns of a box."""
    rows, columns = box
    return Box(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)


def measure_instances(objects: Objects, pixels: Raster | None) -> dict[str, list[Any]]:
    """Measure objects: columns of ``schema.OBJECTS`` but the image's id; intensities need pixels.

    Image and objects are walked in bands of rows; sums of integers are exact.
    """
    places, count = [*map(place, ndimage.find_objects(objects.labels_HW))], len(objects.classes)
    sums = _sums(objects.labels_HW, count, pixels)
    area = sums[0].astype(np.int64)
    centroids, means = sums[1:3] / area, (sums[3:] / area).T.tolist()
    return {
        "label": list(range(1, count + 1)),
        "class": objects.classes,
        "area": area.tolist(),
        **{side: [getattr(found, side) for found in places] for side in Box._fields},
        "centroid_y": centroids[0].tolist(),
        "centroid_x": centroids[1].tolist(),
        "mean_intensity": means if pixels is not None else [None] * count,
    }


def _sums(labels_HW: Array, count: int, pixels: Raster | None) -> Array:
    """Sum pixels, y, x and the values of each channel by object: float64 (3 + C, objects)."""
    channels = pixels.channels if pixels is not None else 0
    total = np.zeros((3 + channels, count))
    for rows in bands(labels_HW):
        band_HW, start = labels_HW[rows], rows.start
        ys, xs = np.nonzero(band_HW)
        at = band_HW[ys, xs] - 1
        sum_of = functools.partial(np.bincount, at, minlength=count)
        total[0] += sum_of()
        total[1] += sum_of(ys + start)
        total[2] += sum_of(xs)
        if pixels is not None and at.size:
            band = Box(start, 0, *band_HW.shape)
            for channel, plane_HW in enumerate(pixels.read(band).pixels_CHW):
                total[3 + channel] += sum_of(plane_HW[ys, xs])
    return total
