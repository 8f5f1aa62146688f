"""Decodes images: from the bytes of a sample to pixels in the network's colors, with their truth.

Large TIFFs are not decoded whole: their pixels and their truth are read by window.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from unet_core.arrays import Array
from unet_core.config.sections import InputConfig
from unet_core.errors import ImageError
from unet_core.images import sample as sample_module
from unet_core.images.codec import class_ids, decode_images, decode_labels
from unet_core.images.georeference import NOWHERE, Georeference, from_world_file
from unet_core.images.large_tiff import TiffRaster, open_large
from unet_core.images.preprocessing import Preprocessing, fill, in_color, offset_and_scale
from unet_core.images.raster import ArrayRaster, Raster, Window, WindowRaster, converted
from unet_core.images.sample import Sample
from unet_core.images.statistics import NOT_MEASURED, OF_IMAGES, Measured, Statistics
from unet_core.images.tiff import check_size, decoding
from unet_core.storage.ranges import Ranged
from unet_core.tiling.geometry import Box

NO_MASK = (
    "it has no mask, which input.on_missing_mask refuses; add the mask, or begin a run with "
    '"skip" or "background"'
)


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image."""

    sample: Sample
    pixels: Raster
    """Pixels in the network's colors."""
    offset: Array
    """Float32 (C,); the network receives ``(pixels - offset) * scale``."""
    scale: Array
    truth: Raster | ImageError | None = None
    """Class ids and ``ignore_index`` (1HW), or why they cannot be used; None if there are none."""
    georeference: Georeference = NOWHERE
    measured: Measured = NOT_MEASURED
    """Limits of each channel, from which offset and scale are made."""

    @property
    def held_bytes(self) -> int:
        """Memory that pixels and truth take."""
        truth_bytes = self.truth.held_bytes if isinstance(self.truth, Raster) else 0
        return self.pixels.held_bytes + truth_bytes


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
    ) -> list[Raster | ImageError | None]:
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
                lambda data: decode_labels(data, self.config, self.classes),
                as_labels=True,
            )
        except ImageError as failure:
            return [unusable(failure)] * len(pages)
        there = [
            unusable(page) if isinstance(page, ImageError) else self._class_ids(page)
            for page in found
        ]
        others = unusable(f"it has {len(there)} pages, the image more")
        return [there[page] if page < len(there) else others for page in pages]

    def _class_ids(self, labels: Raster) -> Raster:
        """Map stored labels that are read by window; in memory they are class ids already."""
        if isinstance(labels, ArrayRaster):
            return labels

        def read(window: Box) -> Window:
            try:
                found = labels.read(window)
                stored = found.pixels_CHW  # HW of one channel, which is no colour
                stored = stored[0] if len(stored) == 1 else stored.transpose(1, 2, 0)
                with decoding():
                    ids_HW = class_ids(stored, self.config, self.classes)
            except ImageError as failure:
                raise unusable(failure) from failure
            return found._replace(pixels_CHW=ids_HW[None])

        dtype, side = np.dtype(np.uint16), labels.segment_side
        return WindowRaster(labels.shape, 1, dtype, side, labels.held_bytes, read)


@dataclass(frozen=True)
class Decoder:
    """Decodes samples for one network and one input."""

    wanted: Preprocessing
    classes: int
    config: InputConfig
    statistics: Statistics = OF_IMAGES

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
            if sample.read_mask is None and self.config.missing_mask == "refuse":
                raise ImageError("truth", NO_MASK)
            images = _opened(
                sample.read,
                sample.open,
                self.config,
                lambda data: decode_images(data, self.config),
                as_labels=False,
            )
            world = from_world_file(sample.read_world()) if sample.read_world else NOWHERE
        except ImageError as failure:
            return [Rejected(sample.bare, failure)]
        bare = sample.bare  # many small images wait for a batch, and not their files
        ends = [f"#{page}" for page in range(len(images))] if len(images) > 1 else [""]
        samples = [replace(bare, image_id=bare.image_id + end, key=bare.key + end) for end in ends]
        is_large = any(isinstance(image, TiffRaster) for image in images)
        truths = TruthDecoder(self.classes, self.config).decode(
            sample, range(len(images)), is_large
        )
        both = zip(samples, images, truths, strict=True)
        return [self._decoded(*one, world, on_step) for one in both]

    def _decoded(
        self,
        sample: Sample,
        image: Raster | ImageError,
        truth: Raster | ImageError | None,
        world: Georeference,
        on_step: Callable[[], None],
    ) -> DecodedImage | Rejected:
        try:
            if isinstance(image, ImageError):
                raise image
            with decoding():
                rows, columns = image.shape
                check_size(columns, rows, 256 * self.config.max_pixels)
                color = self.wanted.color
                colored = converted(
                    image, lambda window: in_color(window, color), self.wanted.channels
                )
                measured = self.statistics.measure(sample.image_id, colored, self.wanted, on_step)
                offset, scale = offset_and_scale(measured.limits)
                pixels = converted(colored, lambda window: fill(window, offset))
        except ImageError as failure:
            return Rejected(sample, failure)
        if truth is None and self.config.missing_mask == "background":
            truth = all_background(pixels.shape)
        truth = check_truth_shape(truth, pixels.shape)
        where = image.georeference or NOWHERE
        where = where if where.transform else world if world.transform else where
        return DecodedImage(sample, pixels, offset, scale, truth, where, measured)


def all_background(shape: tuple[int, int]) -> Raster:
    """Make the truth of an image without a mask that is all class 0; it takes no memory."""
    dtype = np.dtype(np.uint8)
    return WindowRaster(
        shape, 1, dtype, shape, 0, lambda window: Window(np.zeros((1, *window.shape), dtype))
    )


def unusable(why: object) -> ImageError:
    """Make the error of a truth that cannot be used; the image itself is still segmented."""
    return ImageError("truth", f"the mask cannot be used: {why}")


def check_truth_shape(
    truth: Raster | ImageError | None, shape: tuple[int, int]
) -> Raster | ImageError | None:
    """Return the truth, or an ImageError if its shape is not that of the image."""
    if isinstance(truth, Raster) and truth.shape != shape:
        return unusable(f"it has shape {truth.shape}, the image {shape}")
    return truth


def _opened(
    read: Callable[[], bytes], open_ranged: Callable[[], Ranged] | None, config: InputConfig,
    decode: Callable[[bytes], Iterable[Raster | ImageError]], as_labels: bool,
) -> Sequence[Raster | ImageError]:  # fmt: skip
    """Open a file to be read by window, or read and decode all of it: each of its images."""
    ranged = open_ranged() if open_ranged else None
    is_large = ranged and ranged.size > sample_module.LARGE_FILE_BYTES
    if ranged and is_large and (large := open_large(ranged, config, as_labels)):
        return [large]
    data = read()
    in_memory = Ranged(len(data), lambda start, stop: data[start:stop])
    if large := open_large(in_memory, config, as_labels):
        large.held_bytes += len(data)
        return [large]
    return [*decode(data)]
