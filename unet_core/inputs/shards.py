"""Shards, their members, and the source that they come from.

A shard's id is a digest of its path below the root, size (of Parquet: of the columns read), etag,
row range and members with their masks: never of a rank, a position or an attempt.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from unet_core.config.sections import InputConfig, StorageConfig
from unet_core.storage.store import ZARR, Entry, Store, split

log = logging.getLogger(__name__)

ENDING = re.compile(r"(?<=.)\.[a-z0-9]{1,8}(\.gz)?$")


class Member(NamedTuple):
    """One loose image of a shard; a tuple, because there may be fifty million."""

    key: str
    """Path below the input root."""
    bytes: int
    etag: str
    mask: str | None = None
    """Path of its truth below the masks' root; in a list its URI."""
    mask_etag: str | None = None
    uri: str | None = None
    """Its URI, if it does not lie at ``key`` below the input root."""
    files: tuple[dict[str, Any], ...] | None = None
    """Its files by channel, if it has several: rows of ``schema.FILE``."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of reading, retry and commit."""

    shard_id: str
    uri: str
    """Path below the input root of a tar or Parquet file; empty for loose images."""
    bytes: int
    etag: str | None
    first: int | None
    """Position of the first loose image within its listing, or the first row of a range."""
    count: int | None
    """Images; None where only reading tells."""
    region: dict[str, int] | None = None
    """Rectangle (y, x, height, width) of its image, if that is cut into several shards."""
    members: tuple[Member, ...] = ()
    """Only while it is read: the driver holds shards without them."""
    generation: int = 0
    row: int = 0
    """Its row in the manifest's file of that generation; no part of its identity."""

    @property
    def name(self) -> str:
        """Name for people: its file and rows, or its id if it has loose images."""
        if self.uri and self.first is not None and self.count is not None:
            return f"{self.uri}, rows {self.first} to {self.first + self.count - 1}"
        return self.uri or self.shard_id

    @property
    def has_members(self) -> bool:
        """Whether its images are loose objects that the manifest names."""
        return not self.uri


def member_ids(source: "Source", shard: Shard) -> list[str]:
    """Image ids of a shard of loose images."""
    return [member.key for member in shard.members]


def images_in(shards: Iterable[Shard]) -> int | None:
    """Number of images; None where only reading tells."""
    counts = [shard.count for shard in shards]
    return None if None in counts else sum(count or 0 for count in counts)


@dataclass(frozen=True)
class Source:
    """An input that has been looked at: its root and what lies there."""

    config: InputConfig
    format: str
    root: Store
    names: tuple[str, ...] = ()
    """The only names of the root that count, if ``input.uri`` is itself a file."""
    listing: list[Entry] = field(default_factory=list, compare=False, repr=False)
    """Entries found while the format was detected; used once, and not pickled."""
    passed_over: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    """Files that are not of the format, by their endings, as far as the input has been listed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Source, (self.config.with_absolute_paths(), self.format, self.root, self.names)

    @property
    def mask_root(self) -> Store:
        """Below which loose label images lie."""
        folder = self.config.mask_folder
        return Store(folder, self.root.storage) if folder else self.root

    def entries(self, is_wanted: Callable[[str], bool] = bool) -> list[Entry]:
        """Files of the input with wanted names, by name; counts others. An input is listed once."""
        if self.names:
            return [self.root.entry(name) for name in self.names]
        listed = self.listing.copy() or self.root.list()
        self.listing.clear()
        if of_zarr := [entry.name for entry in listed if split(entry.name)[1] in ZARR]:
            log.warning(
                "%d folders with a file of Zarr (%s) are passed over, with all that is in them",
                len(of_zarr),
                of_zarr[0],
            )
        wanted = [entry for entry in listed if is_wanted(entry.name)]
        if len(wanted) < len(listed):
            self.passed_over.update(ending_of(e.name) for e in listed if not is_wanted(e.name))
        return wanted


def ending_of(name: str) -> str:
    """Ending of a file's name in lower case, for counting."""
    found = ENDING.search(name.rpartition("/")[2].lower())
    return found[0] if found else "without ending"


def described(endings: Mapping[str, int], shown: int = 8) -> str:
    """Numbers of files by their endings as text, the most frequent first."""
    ranked = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    more = sum(count for _, count in ranked[shown:])
    texts = [f"{count:,} {ending}" for ending, count in ranked[:shown]]
    return ", ".join(texts + [f"{more:,} others"] * (more > 0))


def masks_at(config: InputConfig, storage: StorageConfig) -> str:
    """``input.masks``, absolute if it is another folder."""
    return Store(config.masks, storage).uri() if config.mask_folder else config.masks


Known = Set[str | tuple[str, str]]
"""Objects that a run has already: tars, Parquet files and loose images by their names, images of
lists by their URIs, and by their ids with their URIs.
"""


def is_known(member: Member, known: Known) -> bool:
    """Whether a run has a loose image; in a list, one URI may have several ids of its own."""
    if member.uri is None or member.uri == member.key:
        return member.key in known
    return (member.key, member.uri) in known


def readable_name(name: str) -> str:
    """A name that Parquet can hold: bytes that are no UTF-8 are shown as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def make_shard(
    uri: str, size: int, etag: str | None, first: int | None = None, count: int | None = None,
    members: tuple[Member, ...] = (),
) -> Shard:  # fmt: skip
    """A shard with the id that its content gives it."""
    range_ = [first, count] if uri else []  # a group of loose images is named by its members
    named = [member if member.files else member[:-1] for member in members]
    identity = [uri, size, etag, range_, named]
    shard_id = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    return Shard(shard_id, uri, size, etag, first, count, None, members)
