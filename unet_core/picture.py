"""One image between its bytes and its tiles: decoded, in the network's colours, with its truth."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from unet_core.arrays import Array
from unet_core.codec import Raster, decode_images, decode_labels
from unet_core.config import InputConfig
from unet_core.errors import ImageError, NotFoundError
from unet_core.preprocessing import Preprocessing, offset_and_scale, to_color
from unet_core.shards import Sample
from unet_core.tiff import Rules


@dataclass(frozen=True)
class Picture:
    """A decoded image."""

    sample: Sample
    pixels_CHW: Array
    """Of the image's own dtype: uint8, uint16 or float32."""
    offset: Array
    """Float32 (C,); the network receives ``(pixels - offset) * scale``."""
    scale: Array
    truth_HW: Array | None = None
    """Class ids and ``ignore_index``; None if there is no truth or it cannot be used."""
    truth_failure: ImageError | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels_CHW.shape[1], self.pixels_CHW.shape[2]


@dataclass(frozen=True)
class Rejected:
    """An image that cannot be segmented, and why."""

    sample: Sample
    failure: ImageError


def decode(
    sample: Sample, wanted: Preprocessing, classes: int, config: InputConfig
) -> list[Picture | Rejected]:
    """Decode a file and its truth: one image, or one for each page that is expanded.

    A truth that cannot be used does not spoil the image. Raises StoreError if the bytes cannot be
    read.
    """
    rules = Rules(config.max_pixels, tuple(config.channels), config.pages, config.axes)
    try:
        if sample.failure is not None:
            raise sample.failure
        rasters = decode_images(_present(sample.read), rules)
    except ImageError as failure:
        return [Rejected(sample, failure)]
    truth = _truth_of(sample)
    if len(rasters) == 1:
        return [_picture(sample, rasters[0], truth, 0, wanted, classes, config, rules)]
    return [
        _picture(_page_of(sample, page), raster, truth, page, wanted, classes, config, rules)
        for page, raster in enumerate(rasters)
    ]


def _page_of(sample: Sample, page: int) -> Sample:
    image_id, key = f"{sample.image_id}#{page}", f"{sample.key}#{page}"
    return dataclasses.replace(sample, image_id=image_id, key=key)


def _truth_of(sample: Sample) -> bytes | ImageError | None:
    try:
        return _present(sample.read_mask) if sample.read_mask is not None else None
    except ImageError as failure:
        return failure


def _picture(
    sample: Sample,
    raster: Raster,
    truth: bytes | ImageError | None,
    page: int,
    wanted: Preprocessing,
    classes: int,
    config: InputConfig,
    rules: Rules,
) -> Picture | Rejected:
    try:
        pixels_CHW = to_color(raster, wanted.color)
    except ImageError as failure:
        return Rejected(sample, failure)
    offset, scale = offset_and_scale(pixels_CHW, wanted)
    truth_HW, truth_failure = None, None
    try:
        if isinstance(truth, ImageError):
            raise truth
        if truth is not None:
            truth_HW = decode_labels(
                truth, rules, config.label_map, classes, config.ignore_index, page
            )
            if truth_HW.shape != pixels_CHW.shape[1:]:
                shape = pixels_CHW.shape[1:]
                raise ImageError("labels", f"it has shape {truth_HW.shape}, the image {shape}")
    except ImageError as failure:
        truth_HW = None
        truth_failure = ImageError("truth", f"the mask cannot be used: {failure}")
    return Picture(sample, pixels_CHW, offset, scale, truth_HW, truth_failure)


def _present(read: Callable[[], bytes]) -> bytes:
    """The bytes; an object that the manifest names and that is gone is a matter of this image."""
    try:
        return read()
    except NotFoundError as error:
        raise ImageError("missing", f"{error}; it was there when the run began") from error
