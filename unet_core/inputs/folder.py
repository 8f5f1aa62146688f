"""``format = "folder"``: loose images at any depth, in fixed groups, each with its mask by stem."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import TypeVar

from unet_core.errors import ChangedError, ConfigError, ImageError, NotFoundError, StoreError
from unet_core.images.codec import is_image
from unet_core.inputs.shards import (
    LARGE_FILE_BYTES,
    Known,
    Member,
    Ranged,
    Sample,
    Shard,
    Source,
    make_shard,
)
from unet_core.storage.store import Store

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

SHOWN = 3


def list_shards(source: Source, known: Known) -> Iterator[Shard]:
    """Groups of ``input.shard_images`` images, by name.

    Raises ConfigError if masks are asked for and none fits any image.
    """
    yield from grouped(source, _pair(source), known)


def read(source: Source, shard: Shard) -> Iterator[Sample]:
    """The images of one shard, by name; bytes are read when they are asked for."""
    mask_root = source.mask_root
    for member in shard.members:
        image = File(source.root, member.key, source.root, member.etag)
        mask = File(mask_root, member.mask, mask_root, member.mask_etag) if member.mask else None
        yield sample_of(
            member,
            stem_of(PurePosixPath(member.key).name),
            source.root.uri(member.key),
            image,
            mask,
        )


def sample_of(
    member: Member, key: str, source_uri: str, image: "File", mask: "File | None"
) -> Sample:
    """A loose image with its truth; lists may not know how large it is."""
    may_be_large = member.bytes > LARGE_FILE_BYTES or (
        not member.bytes and image.name.lower().endswith((".tif", ".tiff"))
    )
    return Sample(
        image_id=member.key,
        key=key,
        source_uri=source_uri,
        read=image.read,
        read_mask=mask.read if mask is not None else None,
        open=image.open if may_be_large else None,
        open_mask=mask.open if mask is not None else None,
    )


def grouped(source: Source, members: Iterable[Member], known: Known) -> Iterator[Shard]:
    """Shards of ``input.shard_images`` loose images, without those that are known."""
    new = (member for member in members if member.key not in known)
    first = 0
    while some := tuple(islice(new, source.config.shard_images)):
        yield make_shard("", sum(member.bytes for member in some), None, first, len(some), some)
        first += len(some)


def _pair(source: Source) -> list[Member]:
    """Give every image its mask by exactly equal stems, and take the masks out of the images."""
    masks = source.config.masks
    entries = [entry for entry in source.entries() if is_image(entry.name)]
    members = [Member(entry.name, entry.bytes, entry.etag) for entry in entries]
    if not masks:
        return members
    if source.config.mask_folder:
        store = source.mask_root
        below = _path_below(store.uri(), source.root.uri())
        members = [m for m in members if not (below and m.key.startswith(below))]
        entries = [entry for entry in store.list() if is_image(entry.name)]
        by_stem = names_by_stem([entry.name for entry in entries], masks)
    else:
        stems = {stem_of(m.key) for m in members}
        found = dict.fromkeys(
            m.key
            for m in members
            if (stem := stem_of(m.key)).endswith(masks) and stem.removesuffix(masks) in stems
        )
        members = [m for m in members if m.key not in found]
        by_stem = {s.removesuffix(masks): n for s, n in names_by_stem(list(found), masks).items()}
    etags = {entry.name: entry.etag for entry in entries}
    lonely = []
    for at, member in enumerate(members):
        mask = by_stem.get(stem_of(member.key))
        if mask is None:
            lonely.append(member.key)
        else:
            members[at] = member._replace(mask=mask, mask_etag=etags[mask])
    _say_unmatched(lonely, len(members), by_stem, masks)
    return members


def stem_of(name: str) -> str:
    """A path without its extension."""
    return str(PurePosixPath(name).with_suffix(""))


def _path_below(path: str, root: str) -> str:
    """``path`` relative to ``root`` with a trailing slash, or nothing if it lies elsewhere."""
    return f"{path[len(root) + 1 :]}/" if path.startswith(f"{root}/") else ""


def names_by_stem(names: list[str], masks: str) -> dict[str, str]:
    """Label images by their stems; raises ConfigError for two of one stem."""
    by_stem: dict[str, str] = {}
    for name in names:
        other = by_stem.setdefault(stem_of(name), name)
        if other != name:
            raise ConfigError(f"input.masks: {masks} holds two masks of one name: {other}, {name}")
    return by_stem


def _say_unmatched(lonely: list[str], images: int, by_stem: dict[str, str], masks: str) -> None:
    if not lonely:
        return
    shown = ", ".join(lonely[:SHOWN])
    if len(lonely) == images:
        there = ", ".join(list(by_stem.values())[:SHOWN]) or "no images at all"
        raise ConfigError(
            f"input.masks: none of {images} images has a mask with the same stem in {masks!r}; "
            f"images: {shown}; masks: {there}"
        )
    log.warning("%d of %d images have no mask in %r: %s", len(lonely), images, masks, shown)


@dataclass(frozen=True)
class File:
    """A loose object, to be read whole or in pieces, as it was when it was listed.

    Reading raises StoreError, and ImageError (``missing``, ``changed``) if it is only this object.
    """

    store: Store
    name: str
    root: Store
    """Where the input lies; if that is gone, it is not the object that is missing."""
    etag: str | None = None

    def read(self) -> bytes:
        """All bytes."""
        return self._held(lambda: self.store.read(self.name, etag=self.etag))

    def open(self) -> Ranged:
        """Its size, and pieces of it."""
        size = self._held(lambda: self.store.entry(self.name).bytes)
        return Ranged(size, self._piece)

    def _piece(self, start: int, stop: int) -> bytes:
        return self._held(lambda: self.store.read(self.name, start, stop, self.etag))

    def _held(self, look: Callable[[], ResultT]) -> ResultT:
        try:
            return look()
        except ChangedError as error:
            raise ImageError("changed", str(error)) from error
        except NotFoundError as error:
            require_there(self.root)
            raise ImageError("missing", f"{error}; it was there when the run began") from error


def require_there(root: Store) -> None:
    """Raises StoreError if it is not one object of the input that is gone, but all of it."""
    if not root.exists():
        raise StoreError(f"{root.uri()} is gone; was it unmounted, or deleted?")
