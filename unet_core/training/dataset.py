"""Images with truth: what there is of them, and where each is found again.

Every shard is looked at once before training begins: what cannot be used is told by name then,
and the order of an epoch follows from counts alone. Decoded images stay in memory while there is
room.
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
from unet_core.images.decoder import DecodedImage, Decoder, Pixels, Rejected
from unet_core.images.sample import Sample
from unet_core.inputs.formats import list_shards, open_source, read_shard
from unet_core.networks.header import Header

TRAIN, VAL = "train", "val"

Key = tuple[str, int, int]


@dataclass(frozen=True)
class Labelled:
    """A decoded image in memory with its truth, and what its boundaries weigh."""

    decoded: DecodedImage
    labels_HW: Array
    """Class ids and ``ignore_index``."""
    boundary_HW: Array | None = None
    """float16; None where the loss has no use for it."""

    @property
    def image_id(self) -> str:
        """Whose image it is."""
        return self.decoded.sample.image_id

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        boundary = 0 if self.boundary_HW is None else self.boundary_HW.nbytes
        return self.decoded.pixels.held_bytes + self.labels_HW.nbytes + boundary


class LabelledInput:
    """One input of ``[data]``."""

    def __init__(
        self, name: str, config: LabelledConfig, whole: TrainConfig, header: Header
    ) -> None:
        self.name = f"data.{name}"
        self.config = config
        alone = config.model_copy(update={"shard_images": 1})  # loose images are shuffled singly
        try:
            self.source = open_source(alone, whole.storage)
            self.shards = list(list_shards(self.source))
            if not config.instances:
                config.require_free_ignore_index(len(header.class_names))
        except (ConfigError, StoreError) as error:
            raise type(error)(str(error).replace("input.", f"{self.name}.")) from error
        classes = 2**16 if config.instances else len(header.class_names)
        self._decoder = Decoder(header.preprocessing, classes, config)
        self._sigma = whole.loss.boundary_sigma if whole.loss.boundary else None

    def decode(self, sample: Sample) -> list[Labelled]:
        """One image, or one for each page that is expanded.

        Raises ConfigError that names what cannot be used: training on what is left would hide it.
        """
        images = []
        for image in self._decoder.decode(sample):
            try:
                if isinstance(image, Rejected):
                    raise image.failure
                if isinstance(image.truth, ImageError):
                    raise image.truth
                images.append(self._in_memory(image))
            except ImageError as error:  # also of a window that is only read now
                text = str(error).replace("input.", f"{self.name}.")
                raise ConfigError(f"{self.name}: {image.sample.image_id}: {text}") from error
        return images

    def _in_memory(self, image: DecodedImage) -> Labelled:
        """The image without windows; raises ConfigError for one that is too large to be held."""
        config, (height, width) = self.config, image.pixels.shape
        if height * width > config.max_pixels:
            raise ConfigError(
                f"{self.name}: {image.sample.image_id} has {height} × {width} pixels, too large to "
                f"train on; cut it, or raise {self.name}.max_pixels"
            )
        background_HW = np.zeros((height, width), dtype=np.uint8)
        stored_HW = image.truth.whole()[0] if isinstance(image.truth, Pixels) else background_HW
        labels_HW = self._classes_of(stored_HW)
        boundary_HW = None
        if self._sigma is not None:
            from unet_core.training.boundary import boundary_term, objects_of  # SciPy: 0.3 s

            if config.instances:
                objects_HW = np.where(labels_HW == 1, stored_HW, 0)
            else:
                objects_HW = objects_of(labels_HW, config.ignore_index)
            boundary_HW = boundary_term(objects_HW, self._sigma).astype(np.float16)
        pixels = Pixels.of(image.pixels.whole())
        kept = replace(image, sample=image.sample.bare, pixels=pixels, truth=None)
        return Labelled(kept, labels_HW, boundary_HW)

    def _classes_of(self, stored_HW: Array) -> Array:
        """Class ids, as small as they go; of objects, one class and what was said to be ignored."""
        if self.config.instances:
            ignored = "ignore_index" in self.config.model_fields_set
            is_ignored = (stored_HW == self.config.ignore_index) & ignored
            ignore_index = np.uint16(self.config.ignore_index)
            stored_HW = np.where(is_ignored, ignore_index, (stored_HW > 0).astype(np.uint16))
        fits = int(stored_HW.max(initial=0)) < 256
        return stored_HW.astype(np.uint8) if fits else stored_HW


@dataclass
class Memory:
    """Decoded images that are kept until the room is used up."""

    room: int
    kept: dict[Key, Labelled] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, key: Key, image: Labelled) -> None:
        """Keep an image if it fits."""
        with self._lock:
            if key not in self.kept and image.nbytes <= self.room:
                self.room -= image.nbytes
                self.kept[key] = image


@dataclass(frozen=True)
class Item:
    """An image that is there to be had: decoded already, or to be decoded."""

    key: Key
    """Split, shard, and position among the images of the split in the shard."""
    found: Sample | Labelled


@dataclass
class Split:
    """The images of an input that serve one purpose."""

    name: str
    input: LabelledInput
    memory: Memory
    low: float = 0.0
    high: float = 1.0
    """Those whose ids have a share in [low, high)."""
    counts: list[int] = field(default_factory=list)
    """Images in each shard; known once all were looked at."""

    @property
    def images(self) -> int:
        """Images of all shards."""
        return sum(self.counts)

    def items(self, shard: int, positions: Iterable[int]) -> Iterator[Item]:
        """The images of a shard at some positions, in its order."""
        keys = [(self.name, shard, position) for position in sorted(map(int, positions))]
        kept = [self.memory.kept[key] for key in keys if key in self.memory.kept]
        if len(kept) == len(keys):
            yield from map(Item, keys, kept)
            return
        wanted = set(keys)
        for item in read_items([self], shard):
            if item.key in wanted:
                yield item
            if item.key == keys[-1]:
                return

    def load(self, item: Item) -> Labelled:
        """The decoded image; raises ConfigError if it cannot be used."""
        image = self.memory.kept.get(item.key)
        if image is None:
            found = item.found
            image = found if isinstance(found, Labelled) else self.input.decode(found)[0]
            self.memory.keep(item.key, image)
        return image


@dataclass
class DatasetScan:
    """What was found when all were looked at; ``a += b`` adds what another found."""

    images: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By split and shard."""
    label_pixels: Counter[int] = field(default_factory=Counter)
    """Training pixels of each class id, and of ``ignore_index``."""
    without_mask: list[str] = field(default_factory=list)
    """Where that is refused."""
    unusable: list[str] = field(default_factory=list)
    lowest_share: float = 1.0
    """Of all images."""

    def of(self, split: str) -> int:
        """Images of a split."""
        return sum(count for (name, _), count in self.images.items() if name == split)

    def __iadd__(self, other: "DatasetScan") -> "DatasetScan":
        self.images.update(other.images)
        self.label_pixels.update(other.label_pixels)
        self.without_mask += other.without_mask
        self.unusable += other.unusable
        self.lowest_share = min(self.lowest_share, other.lowest_share)
        return self


Splits = tuple[Split, Split]
"""For training and for validation."""


def share_of(image_id: str) -> float:
    """A number in [0, 1) that an id has for ever."""
    return int.from_bytes(digest_of(image_id)[:6], "big") / 2**48


def digest_of(image_id: str) -> bytes:
    """What an image's fate is drawn from."""
    return hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).digest()


def split_at(splits: Splits, at: float) -> None:
    """Let the images of one input whose ids have a smaller share validate, the others train."""
    train, val = splits
    train.low = val.high = at
    memory = train.memory  # of both; positions in a split are others now
    memory.room += sum(image.nbytes for image in memory.kept.values())
    memory.kept = {}


def read_items(splits: list[Split], shard: int, found: DatasetScan | None = None) -> Iterator[Item]:
    """The images of a shard, each for the one of the splits (of one input) that holds it.

    Raises ConfigError for a file of pages that cannot be used, unless it is noted in ``found``.
    """
    source = splits[0].input
    expands = source.config.pages == "expand"
    positions = Counter[str]()
    for sample in read_shard(source.source, source.shards[shard]):
        has_none = sample.read_mask is None and sample.failure is None
        if has_none and source.config.on_missing_mask != "background":
            if found is not None and source.config.on_missing_mask == "refuse":
                found.without_mask.append(f"{source.name}: {sample.image_id}")
            continue
        try:
            images = source.decode(sample) if expands else [sample]
        except ConfigError as error:
            if found is None:
                raise
            found.unusable.append(str(error))
            continue
        for image in images:
            share = share_of(image.image_id)
            for split in splits:
                if split.low <= share < split.high:
                    yield Item((split.name, shard, positions[split.name]), image)
                    positions[split.name] += 1


def open_splits(config: TrainConfig, header: Header, memory: Memory) -> Splits:
    """Training and validation images, listed but not yet looked at.

    Without ``data.val`` a share of the training images, by a hash of the id, is for validation.
    """
    inputs = {
        name: LabelledInput(name, part, config, header) for name, part in config.data.parts.items()
    }
    train, val = inputs[TRAIN], inputs.get(VAL)
    low, high = (0.0, 1.0) if val is not None else (config.data.val_fraction,) * 2
    return Split(TRAIN, train, memory, low=low), Split(VAL, val or train, memory, high=high)
