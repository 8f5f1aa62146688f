"""Decodes images: from the bytes of a sample to pixels in the network's colors, with their truth.

Large TIFFs are not decoded whole: their pixels and their truth are read by window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unet_core.arrays import Array
from unet_core.config.sections import InputConfig
from unet_core.errors import ImageError
from unet_core.images import sample as sample_module
from unet_core.images.codec import class_ids, decode_images, decode_labels
from unet_core.images.large_tiff import LargeTiff, open_large
from unet_core.images.preprocessing import (
    Preprocessing,
    offset_and_scale,
    offset_and_scale_by_rows,
    to_color,
)
from unet_core.images.sample import Sample
from unet_core.images.tiff import check_size, decoding
from unet_core.storage.ranges import Ranged


@dataclass(frozen=True)
class Pixels:
    """The pixels of an image in the network's colors, in memory or not."""

    channels: int
    shape: tuple[int, int]
    """Height and width."""
    dtype: np.dtype[Any]
    """Type of the stored image: uint8, uint16 or float32."""
    read: Callable[[int, int, int, int], Array]
    """CHW of a window (y, x, height, width) inside the image; raises ImageError."""
    held_bytes: int = 0
    """Bytes of memory held while the pixels are in use."""

    @classmethod
    def of(cls, pixels_CHW: Array) -> "Pixels":
        """Pixels in memory."""
        channels, height, width = pixels_CHW.shape
        return cls(
            channels,
            (height, width),
            pixels_CHW.dtype,
            lambda y, x, height, width: pixels_CHW[:, y : y + height, x : x + width],
            pixels_CHW.nbytes,
        )

    def whole(self) -> Array:
        """Read the whole image, CHW."""
        return self.read(0, 0, *self.shape)


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image."""

    sample: Sample
    pixels: Pixels
    offset: Array
    """Float32 (C,); the network receives ``(pixels - offset) * scale``."""
    scale: Array
    truth: Pixels | ImageError | None = None
    """Class ids and ``ignore_index`` (1HW), or why they cannot be used; None if there are none."""


@dataclass(frozen=True)
class Rejected:
    """An image that cannot be segmented, and why."""

    sample: Sample
    failure: ImageError


@dataclass(frozen=True)
class TruthDecoder:
    """Turns the label images of samples into class ids; their images are not touched."""

    classes: int
    config: InputConfig

    def decode(
        self, sample: Sample, pages: Sequence[int], is_large: bool
    ) -> list[Pixels | ImageError | None]:
        """Decode the truth of each page of an image; an ImageError where it cannot be used.

        ``is_large``: the image is large, so a label file of its own is not read whole.
        """
        if sample.read_mask is None:
            return [None] * len(pages)
        try:
            found = _opened(
                sample.read_mask,
                sample.open_mask if is_large else None,
                self.config,
                as_labels=True,
            )
            there = self._whole(found) if isinstance(found, bytes) else [self._by_window(found)]
        except ImageError as failure:
            return [unusable(failure)] * len(pages)
        others = unusable(f"it has {len(there)} pages, the image more")
        return [there[page] if page < len(there) else others for page in pages]

    def _whole(self, data: bytes) -> list[Pixels | ImageError]:
        return [
            unusable(page) if isinstance(page, ImageError) else Pixels.of(page[None])
            for page in decode_labels(data, self.config, self.classes)
        ]

    def _by_window(self, large: LargeTiff) -> Pixels:
        def read(y: int, x: int, height: int, width: int) -> Array:
            try:
                stored = large.read(y, x, height, width)
                with decoding():
                    return class_ids(stored, self.config, self.classes)[None]
            except ImageError as failure:
                raise unusable(failure) from failure

        return Pixels(1, large.shape, np.dtype(np.uint16), read, large.held_bytes)


@dataclass(frozen=True)
class Decoder:
    """Decodes samples for one network and one input."""

    wanted: Preprocessing
    classes: int
    config: InputConfig

    def decode(
        self, sample: Sample, on_step: Callable[[], None] = lambda: None
    ) -> list[DecodedImage | Rejected]:
        """Decode a file and its truth: one image, or one for each page that is expanded.

        A truth that cannot be used does not spoil the image. ``on_step`` is called for every few
        rows of an image that is not decoded whole. Raises StoreError if the bytes cannot be read.
        """
        try:
            if sample.failure is not None:
                raise sample.failure
            found = _opened(sample.read, sample.open, self.config, as_labels=False)
            images: Sequence[Array | ImageError | LargeTiff] = (
                decode_images(found, self.config) if isinstance(found, bytes) else [found]
            )
        except ImageError as failure:
            return [Rejected(sample.bare, failure)]
        bare = sample.bare  # many small images wait for a batch, and not their files
        ends = [f"#{page}" for page in range(len(images))] if len(images) > 1 else [""]
        samples = [replace(bare, image_id=bare.image_id + end, key=bare.key + end) for end in ends]
        truths = TruthDecoder(self.classes, self.config).decode(
            sample, range(len(images)), not isinstance(found, bytes)
        )
        return [self._decoded(*one, on_step) for one in zip(samples, images, truths, strict=True)]

    def _decoded(
        self,
        sample: Sample,
        image: Array | ImageError | LargeTiff,
        truth: Pixels | ImageError | None,
        on_step: Callable[[], None],
    ) -> DecodedImage | Rejected:
        try:
            if isinstance(image, ImageError):
                raise image
            with decoding():
                if isinstance(image, LargeTiff):
                    pixels, offset, scale = self._by_window(image, on_step)
                else:
                    pixels = Pixels.of(to_color(image, self.wanted.color))
                    offset, scale = offset_and_scale(pixels.whole(), self.wanted)
        except ImageError as failure:
            return Rejected(sample, failure)
        return DecodedImage(sample, pixels, offset, scale, check_truth_shape(truth, pixels.shape))

    def _by_window(
        self, image: LargeTiff, on_step: Callable[[], None]
    ) -> tuple[Pixels, Array, Array]:
        rows, columns = image.shape
        check_size(columns, rows, 256 * self.config.max_pixels)

        def read(y: int, x: int, height: int, width: int) -> Array:
            return to_color(image.read(y, x, height, width), self.wanted.color)

        def read_rows(start: int, stop: int) -> Array:
            on_step()
            return read(start, 0, stop - start, columns)

        offset, scale = offset_and_scale_by_rows(read_rows, rows, columns, self.wanted)
        pixels = Pixels(self.wanted.channels, image.shape, image.dtype, read, image.held_bytes)
        return pixels, offset, scale


def unusable(why: object) -> ImageError:
    """Make the error of a truth that cannot be used; the image itself is still segmented."""
    return ImageError("truth", f"the mask cannot be used: {why}")


def check_truth_shape(
    truth: Pixels | ImageError | None, shape: tuple[int, int]
) -> Pixels | ImageError | None:
    """Return the truth, or an ImageError if its shape is not that of the image."""
    if isinstance(truth, Pixels) and truth.shape != shape:
        return unusable(f"it has shape {truth.shape}, the image {shape}")
    return truth


def _opened(
    read: Callable[[], bytes], open_ranged: Callable[[], Ranged] | None, config: InputConfig,
    as_labels: bool,
) -> LargeTiff | bytes:  # fmt: skip
    """Open a file to be read by window, or read all its bytes."""
    ranged = open_ranged() if open_ranged else None
    is_large = ranged and ranged.size > sample_module.LARGE_FILE_BYTES
    if ranged and is_large and (large := open_large(ranged, config, as_labels)):
        return large
    data = read()
    in_memory = Ranged(len(data), lambda start, stop: data[start:stop])
    if large := open_large(in_memory, config, as_labels):
        large.held_bytes += len(data)
    return large or data
