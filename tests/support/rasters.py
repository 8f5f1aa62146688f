"""What holds for every raster, and decoded files as arrays."""

from typing import Any

import numpy as np

from unet_core.config.sections import InputConfig
from unet_core.errors import ImageError
from unet_core.images.codec import decode_images, decode_labels
from unet_core.images.preprocessing import Preprocessing, offset_and_scale
from unet_core.images.raster import Raster
from unet_core.images.statistics import measure_limits
from unet_core.tiling.geometry import Box


def assert_windows_are_cuts(raster: Raster, pixels_CHW: np.ndarray, count: int = 20) -> None:
    """Windows of a raster are slices of the whole, of the type and channels that it tells."""
    channels, height, width = pixels_CHW.shape
    assert (raster.channels, raster.shape) == (channels, (height, width))
    assert raster.dtype == pixels_CHW.dtype
    assert min(raster.segment_side) >= 1
    assert raster.held_bytes >= 0
    np.testing.assert_array_equal(raster.whole().pixels_CHW, pixels_CHW)
    random = np.random.default_rng(0)
    ends = [
        [sorted(random.choice(side + 1, 2, replace=False).tolist()) for side in (height, width)]
        for _ in range(count)
    ]
    for (y, bottom), (x, right) in [*ends, ((0, 1), (0, 1)), ((height - 1, height), (0, width))]:
        window = raster.read(Box(y, x, bottom - y, right - x))
        np.testing.assert_array_equal(window.pixels_CHW, pixels_CHW[:, y:bottom, x:right])
        assert window.pixels_CHW.dtype == raster.dtype
        assert window.valid_HW is None or window.valid_HW.shape == window.pixels_CHW.shape[1:]


def measured(raster: Raster, wanted: Preprocessing, *on_step: Any) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale of each channel of an image, by its own statistics."""
    return offset_and_scale(measure_limits(raster, wanted, *on_step))


def pixels_of(data: bytes, rules: InputConfig) -> list[np.ndarray | ImageError]:
    """Pixels HWC of each image of an encoded file."""
    found = decode_images(data, rules)
    return [
        image if isinstance(image, ImageError) else image.whole().pixels_CHW.transpose(1, 2, 0)
        for image in found
    ]


def labels_of(data: bytes, rules: InputConfig, classes: int) -> list[np.ndarray | ImageError]:
    """Class ids HW of each page of an encoded label image."""
    found = decode_labels(data, rules, classes)
    return [page if isinstance(page, ImageError) else page.whole().pixels_CHW[0] for page in found]
