"""The interface of input containers: each is a module of this room and a row of ``FORMATS``."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from unet_core.images.sample import Sample
from unet_core.inputs.shards import Known, Shard, Source


@dataclass(frozen=True)
class LabelFiles:
    """Truth in files of its own: how they are found, and matched with images."""

    list: Callable[[Source], dict[str, tuple[str, str | None]]]
    """Names (for a list, URIs) and etags of the label images that are there now, by their key."""
    keys: Callable[[Shard, str], Iterable[str]]
    """Keys that the label image of an image id may have, the best one first."""
    open: Callable[[Source, str, str | None], Sample]
    """A label image by its name and etag, as a sample that has nothing but truth."""


@dataclass(frozen=True)
class Container:
    """Everything that the rest of the program asks of an input format.

    What is wrong with an image is a sample with a ``failure``; a file that is not the one listed,
    or cannot be read, raises ObjectError.
    """

    list_shards: Callable[[Source, Known], Iterator[Shard]]
    """Shards that are not known yet, by name."""
    read: Callable[[Source, Shard], Iterator[Sample]]
    """Samples of a shard, always in the same order."""
    extensions: tuple[str, ...] = ()
    """Endings, in lower case, of the files that ``format = "auto"`` finds; none: never found."""
    is_loose: bool = False
    """Shards are groups of loose images, which the manifest names."""
    labels: LabelFiles | None = None
    """None: ``read`` gives the truth with each image."""
    recount: Callable[[Source, Shard], Iterable[str]] | None = None
    """Image ids of a shard, counted apart from ``read``; None: only the manifest knows them."""
