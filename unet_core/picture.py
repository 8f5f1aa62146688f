"""One image between its bytes and its tiles: decoded, in the network's colours, with its truth."""

from collections.abc import Callable
from dataclasses import dataclass

from unet_core.arrays import Array
from unet_core.codec import decode_image, decode_labels
from unet_core.config import InputConfig
from unet_core.errors import ImageError, NotFoundError
from unet_core.preprocessing import Preprocessing, offset_and_scale, to_color
from unet_core.shards import Sample


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
) -> Picture | Rejected:
    """Decode an image and its truth. A truth that cannot be used does not spoil the image.

    Raises StoreError if the bytes cannot be read.
    """
    try:
        if sample.failure is not None:
            raise sample.failure
        raster = decode_image(_present(sample.read), config.max_pixels)
        pixels_CHW = to_color(raster, wanted.color)
    except ImageError as failure:
        return Rejected(sample, failure)
    offset, scale = offset_and_scale(pixels_CHW, wanted)
    truth_HW, truth_failure = None, None
    if sample.read_mask is not None:
        try:
            truth_HW = _decode_truth(
                _present(sample.read_mask), pixels_CHW.shape[1:], classes, config
            )
        except ImageError as failure:
            truth_failure = ImageError("truth", f"the mask cannot be used: {failure}")
    return Picture(sample, pixels_CHW, offset, scale, truth_HW, truth_failure)


def _present(read: Callable[[], bytes]) -> bytes:
    """The bytes; an object that the manifest names and that is gone is a matter of this image."""
    try:
        return read()
    except NotFoundError as error:
        raise ImageError("missing", f"{error}; it was there when the run began") from error


def _decode_truth(data: bytes, shape: tuple[int, ...], classes: int, config: InputConfig) -> Array:
    labels_HW = decode_labels(
        data, config.max_pixels, config.label_map, classes, config.ignore_index
    )
    if labels_HW.shape != shape:
        raise ImageError("labels", f"it has shape {labels_HW.shape}, the image {shape}")
    return labels_HW
