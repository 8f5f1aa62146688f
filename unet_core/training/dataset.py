"""Labelled images: listing, splitting, decoding and caching.

Every shard is scanned once before the first step (``scan.py``): unusable images are reported then,
and the order of an epoch (``sampler.py``) follows from the image counts of shards alone. Decoded
images stay in memory up to a limit.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from unet_core.arrays import Array
from unet_core.config.train import LabelledConfig, TrainConfig
from unet_core.errors import ConfigError, ImageError, StoreError
from unet_core.images.decoder import DecodedImage, Decoder, Rejected
from unet_core.images.guard import NO_STRETCH, Stretch
from unet_core.images.raster import ArrayRaster, Raster
from unet_core.images.sample import Sample
from unet_core.images.statistics import Statistics
from unet_core.inputs.formats import list_shards, open_source, read_shard
from unet_core.networks.header import Header

TRAIN, VAL = "train", "val"

Key = tuple[str, int, int]
"""Split, shard, and index among the images of the split in the shard."""


@dataclass(frozen=True)
class LabelledImage:
    """A decoded image in memory with its labels and boundary term."""

    decoded: DecodedImage
    labels_HW: Array
    """Class ids and ``ignore_index``, uint8 or uint16."""
    boundary_HW: Array | None = None
    """Boundary term (see ``boundary.py``), float16; None if the loss does not use it."""

    @property
    def image_id(self) -> str:
        """Id of the image, as in the tables of a run."""
        return self.decoded.sample.image_id

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        arrays = (self.labels_HW, self.boundary_HW)
        return self.decoded.pixels.held_bytes + sum(a.nbytes for a in arrays if a is not None)


class LabelledInput:
    """The images of ``data.train`` or ``data.val``: listed when created, decoded on demand.

    Creation raises ConfigError or StoreError, with the full key, for an input that cannot be used.
    """

    def __init__(
        self, name: str, config: LabelledConfig, whole: TrainConfig, header: Header
    ) -> None:
        self.name = f"data.{name}"
        self.config = config
        # loose images are shuffled singly; the scan tells of missing masks, with all that is wrong
        single = config.model_copy(update={"shard_images": 1, "on_missing_mask": "skip"})
        try:
            self.source = open_source(single, whole.storage)
            self.shards = list(list_shards(self.source))
            if not config.instances:
                config.require_free_ignore_index(len(header.class_names))
        except (ConfigError, StoreError) as error:
            raise type(error)(str(error).replace("input.", f"{self.name}.")) from error
        classes = 2**16 if config.instances else len(header.class_names)
        measuring = Statistics(measures_stretch=True)
        self._decoder = Decoder(header.preprocessing, classes, config, measuring)
        self._sigma = whole.loss.boundary_sigma if whole.loss.boundary else None

    def decode(self, sample: Sample) -> list[LabelledImage]:
        """Decode a sample to one image, or to one for each page if pages are expanded.

        Raises ConfigError for an image or mask that cannot be used: skipping it would hide it.
        """
        images = []
        for image in self._decoder.decode(sample):
            try:
                if isinstance(image, Rejected):
                    raise image.failure
                if isinstance(image.truth, ImageError):
                    raise image.truth
                images.append(self._in_memory(image))
            except ImageError as error:  # also from pixels that are only read now
                text = str(error).replace("input.", f"{self.name}.")
                raise ConfigError(f"{self.name}: {image.sample.image_id}: {text}") from error
        return images

    def _in_memory(self, image: DecodedImage) -> LabelledImage:
        """Read all pixels and labels; raises ConfigError for more than ``max_pixels``."""
        config, (height, width) = self.config, image.pixels.shape
        if height * width > config.max_pixels:
            raise ConfigError(
                f"{self.name}: {image.sample.image_id} has {height} × {width} pixels, too large to "
                f"train on; cut it, or raise {self.name}.max_pixels"
            )
        assert isinstance(image.truth, Raster)  # without a mask it is skipped, or all class 0
        stored_HW = image.truth.whole().pixels_CHW[0]
        pixels = image.pixels.whole()
        labels_HW = self._classes_of(stored_HW, pixels.valid_HW)
        boundary_HW = None
        if self._sigma is not None:
            from unet_core.training.boundary import boundary_term, objects_of  # SciPy: 0.3 s

            objects_HW = (
                np.where(labels_HW == 1, stored_HW, 0)
                if config.instances
                else objects_of(labels_HW, config.ignore_index)
            )
            boundary_HW = boundary_term(objects_HW, self._sigma).astype(np.float16)
        decoded = replace(image, sample=image.sample.bare, pixels=ArrayRaster(*pixels), truth=None)
        return LabelledImage(decoded, labels_HW, boundary_HW)

    def _classes_of(self, stored_HW: Array, valid_HW: Array | None) -> Array:
        """Convert mask values to class ids, uint8 if they fit, else uint16.

        Object ids become class 1, except an ``ignore_index`` that the config names explicitly.
        Pixels that are not valid get the ``ignore_index``.
        """
        if self.config.instances:
            is_explicit = "ignore_index" in self.config.model_fields_set
            is_ignored = (stored_HW == self.config.ignore_index) & is_explicit
            stored_HW = np.where(
                is_ignored, np.uint16(self.config.ignore_index), (stored_HW > 0).astype(np.uint16)
            )
        if valid_HW is not None:
            stored_HW = np.where(valid_HW, stored_HW, np.uint16(self.config.ignore_index))
        return stored_HW.astype(np.uint8) if int(stored_HW.max(initial=0)) < 256 else stored_HW


@dataclass
class ImageCache:
    """Decoded images in memory, added until the room is used up and never evicted."""

    room: int
    """Bytes that are left."""
    images: dict[Key, LabelledImage] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, key: Key, image: LabelledImage) -> None:
        """Add an image if it fits; thread-safe."""
        with self._lock:
            if key not in self.images and image.nbytes <= self.room:
                self.room -= image.nbytes
                self.images[key] = image


@dataclass(frozen=True)
class Item:
    """An image of a split, not decoded yet (Sample) or decoded (LabelledImage)."""

    key: Key
    image: Sample | LabelledImage


@dataclass
class Split:
    """The images of an input that are used for training, or for validation."""

    name: str
    """``train`` or ``val``."""
    input: LabelledInput
    cache: ImageCache
    low: float = 0.0
    """The split holds the images whose ``split_hash`` is in [low, high)."""
    high: float = 1.0
    counts: list[int] = field(default_factory=list)
    """Images in each shard; empty before the scan."""

    @property
    def images(self) -> int:
        """Number of images in all shards."""
        return sum(self.counts)

    def items(self, shard: int, positions: Iterable[int]) -> Iterator[Item]:
        """Yield the images of a shard at the given positions, in ascending order.

        The shard is not read if all of them are in the cache.
        """
        keys = [(self.name, shard, position) for position in sorted(map(int, positions))]
        cached = [Item(key, self.cache.images[key]) for key in keys if key in self.cache.images]
        wanted = set(keys)
        for item in cached if len(cached) == len(keys) else read_items([self], shard):
            if item.key in wanted:
                yield item
            if item.key == keys[-1]:
                return

    def load(self, item: Item) -> LabelledImage:
        """Return the decoded image and cache it; raises ConfigError if it cannot be used."""
        image = self.cache.images.get(item.key, item.image)
        if isinstance(image, Sample):
            image = self.input.decode(image)[0]
        self.cache.add(item.key, image)
        return image


@dataclass
class DatasetScan:
    """Counts and problems of some or all images; ``a += b`` merges two scans."""

    images: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Number of images by split and shard."""
    label_pixels: Counter[int] = field(default_factory=Counter)
    """Training pixels of each class id, and of ``ignore_index``."""
    without_mask: list[str] = field(default_factory=list)
    """Images without a mask in inputs with ``on_missing_mask = "refuse"``."""
    unusable: list[str] = field(default_factory=list)
    """Error messages of images that cannot be used."""
    lowest_hash: float = 1.0
    """Lowest ``split_hash`` of all images."""
    stretch: Stretch = NO_STRETCH
    """Largest stretch of the training images."""

    def of(self, split: str) -> int:
        """Count the images of a split."""
        return sum(count for (name, _), count in self.images.items() if name == split)

    def __iadd__(self, other: "DatasetScan") -> "DatasetScan":
        self.images.update(other.images)
        self.label_pixels.update(other.label_pixels)
        self.without_mask += other.without_mask
        self.unusable += other.unusable
        self.lowest_hash = min(self.lowest_hash, other.lowest_hash)
        self.stretch |= other.stretch
        return self


Splits = tuple[Split, Split]
"""The training split and the validation split."""


def split_hash(image_id: str) -> float:
    """Hash an image id to a number in [0, 1), which decides its split."""
    return int.from_bytes(digest_of(image_id)[:6], "big") / 2**48


def digest_of(image_id: str) -> bytes:
    """Return the SHA-256 of an image id; its split and the seed of its crops derive from it."""
    return hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).digest()


def split_at(splits: Splits, at: float) -> None:
    """Divide one input anew: ids with a ``split_hash`` below ``at`` validate, the others train.

    Empties the cache, because keys depend on the division.
    """
    train, val = splits
    train.low = val.high = at
    cache = train.cache  # of both splits
    cache.room += sum(image.nbytes for image in cache.images.values())
    cache.images = {}


def read_items(
    splits: list[Split], shard: int, problems: DatasetScan | None = None
) -> Iterator[Item]:
    """Read a shard and yield its images that belong to any of the splits, all of one input.

    Images without a mask, and files of pages that cannot be used, are added to ``problems``;
    without it, the latter raise ConfigError.
    """
    source = splits[0].input
    positions = Counter[str]()
    for sample in read_shard(source.source, source.shards[shard]):
        lacks_mask = sample.read_mask is None and sample.failure is None
        if lacks_mask and source.config.on_missing_mask != "background":
            if problems is not None and source.config.on_missing_mask == "refuse":
                problems.without_mask.append(f"{source.name}: {sample.image_id}")
            continue
        try:
            images = source.decode(sample) if source.config.pages == "expand" else [sample]
        except ConfigError as error:
            if problems is None:
                raise
            problems.unusable.append(str(error))
            continue
        for image in images:
            hashed = split_hash(image.image_id)
            for split in splits:
                if split.low <= hashed < split.high:
                    yield Item((split.name, shard, positions[split.name]), image)
                    positions[split.name] += 1


def open_splits(config: TrainConfig, header: Header, cache: ImageCache) -> Splits:
    """List the training and validation images, without reading them.

    Without ``data.val``, ``val_fraction`` of the training images, chosen by ``split_hash``,
    validate.
    """
    inputs = {
        name: LabelledInput(name, part, config, header) for name, part in config.data.parts.items()
    }
    train, val = inputs[TRAIN], inputs.get(VAL)
    low, high = (0.0, 1.0) if val is not None else (config.data.val_fraction,) * 2
    return Split(TRAIN, train, cache, low=low), Split(VAL, val or train, cache, high=high)
