"""``format = "folder"``: loose images at any depth, in fixed groups, each with its mask by stem."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TypeVar

from unet_core.errors import (
    ChangedError,
    ConfigError,
    ForbiddenError,
    ImageError,
    NotFoundError,
    ObjectError,
    StoreError,
    few,
)
from unet_core.images import sample as sample_module
from unet_core.images import unsupported
from unet_core.images.codec import EXTENSIONS, is_image
from unet_core.images.sample import Sample
from unet_core.inputs.container import Container, LabelFiles
from unet_core.inputs.shards import (
    Known,
    Member,
    Shard,
    Source,
    is_known,
    make_shard,
    member_ids,
    readable_name,
)
from unet_core.storage.ranges import Ranged
from unet_core.storage.store import Entry, Store

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

SHOWN = 3
WORLD = "world file"
"""``channel`` of a member's file that holds coordinates and no pixels."""
WORLD_FILES = (
    ".tfw", ".tifw", ".tiffw", ".jgw", ".jpgw", ".jpegw", ".pgw", ".pngw", ".bpw", ".bmpw", ".gfw",
    ".gifw", ".j2w", ".jp2w", ".wld",
)  # fmt: skip
REREAD = "then predict --retry-failed reads it again (masks: evaluate)"
"""What follows when one object can be read again."""


def list_shards(source: Source, known: Known) -> Iterator[Shard]:
    """Groups of images, by name; raises ConfigError if no mask fits any."""
    yield from group_into_shards(source, _pair_masks(source), known)


def read(source: Source, shard: Shard) -> Iterator[Sample]:
    """The images of one shard, by name; bytes are read when they are asked for."""
    image_at, mask_at = partial(ListedFile, source.root), partial(ListedFile, source.mask_root)
    yield from samples_of(source, shard, image_at, mask_at)


def samples_of(
    source: Source,
    shard: Shard,
    image_at: Callable[[str, str], "ListedFile"],
    mask_at: Callable[[str, str | None], "ListedFile"],
) -> Iterator[Sample]:
    """The loose images of a shard with their truth; files are found by name (in a list by URI) and
    etag. Lists may not know how large they are.
    """
    for member in shard.members:
        image = image_at(member.uri or member.key, member.etag)
        mask = mask_at(member.mask, member.mask_etag) if member.mask else None
        may_be_large = member.bytes > sample_module.LARGE_FILE_BYTES or (
            not member.bytes and image.name.lower().endswith((".tif", ".tiff"))
        )
        yield Sample(
            image_id=member.key,
            key=PurePosixPath(member.key).stem,
            source_uri=member.uri or source.root.uri(member.key),
            read=partial(_read_image, image, member.bytes),
            read_mask=mask.read if mask is not None else None,
            open=image.open if may_be_large and not unsupported.has_kind(image.name) else None,
            open_mask=mask.open if mask is not None else None,
            read_world=_world_file(member, image_at),
        )


def _world_file(
    member: Member, image_at: Callable[[str, str], "ListedFile"]
) -> Callable[[], bytes] | None:
    worlds = (file for file in member.files or () if file["channel"] == WORLD)
    return next((image_at(file["key"], file["etag"]).read for file in worlds), None)


def _read_image(image: "ListedFile", size: int) -> bytes:
    """Read a file whole; of a kind that is not read, only its beginning, where its size is known.

    Raises ImageError (``unsupported``).
    """
    if unsupported.has_kind(image.name):
        is_longer = size > unsupported.HEAD_BYTES
        head = image.read(0, unsupported.HEAD_BYTES) if is_longer else image.read()
        if (refusal := unsupported.by_name(image.name, head)) is not None:
            raise refusal
    return image.read()


def group_into_shards(source: Source, members: Iterable[Member], known: Known) -> Iterator[Shard]:
    """Shards of loose images, without those that are known: ``input.shard_images`` each, or fewer
    that together have ``input.shard_mb``. Sizes that a list does not give count as 0.

    Raises ConfigError for images without a mask if ``input.on_missing_mask`` refuses them.
    """
    refuses, lonely, images = source.config.missing_mask == "refuse", list[str](), 0
    first, size = 0, 0
    group: list[Member] = []
    for member in members:
        if is_known(member, known):
            continue
        images += 1
        if refuses and member.mask is None:
            lonely.append(member.key)
        is_full = len(group) == source.config.shard_images
        if group and (is_full or size + member.bytes > source.config.shard_mb * 10**6):
            yield make_shard("", size, None, first, len(group), tuple(group))
            first, size, group = first + len(group), 0, []
        group.append(member)
        size += member.bytes
    if group:
        yield make_shard("", size, None, first, len(group), tuple(group))
    if lonely:
        raise ConfigError(
            f"input.masks: {len(lonely)} of {images} images have no mask in "
            f"{source.config.masks!r}: {few(lonely, SHOWN)}; add the masks, or set "
            'input.on_missing_mask to "skip" or "background"'
        )


def _pair_masks(source: Source) -> list[Member]:
    """Pair every image with its mask by equal stems, and remove the masks from the images.

    A mask may also be named after the whole image, as exports are: ``a.tif.png`` of ``a.tif``.
    """
    masks = source.config.masks
    # a key may end with a slash and still be an image
    found = source.entries(lambda name: is_image(name.rstrip("/")) or is_world_file(name))
    worlds = {entry.name.lower(): entry for entry in found if is_world_file(entry.name)}
    entries = [entry for entry in found if entry.name.lower() not in worlds]
    if not masks:
        return [_member(entry, None, worlds) for entry in entries]
    if source.config.mask_folder:
        store, root = source.mask_root, f"{source.root.uri()}/"
        if store.uri().startswith(root):
            below = f"{store.uri().removeprefix(root)}/"
            entries = [entry for entry in entries if not entry.name.startswith(below)]
        by_stem = labels_by_stem(store.list(), masks)
    else:
        stems = {stem_of(entry.name) for entry in entries}
        of_images = (e for e in entries if stem_of(e.name)[: -len(masks)] in stems)
        by_stem = labels_by_stem(of_images, masks)
        labels = set(by_stem.values())
        entries = [entry for entry in entries if entry not in labels]
    # or the mask as it is exported
    truths = (by_stem.get(stem_of(entry.name)) or by_stem.get(entry.name) for entry in entries)
    members = [_member(entry, label, worlds) for entry, label in zip(entries, truths, strict=True)]
    _report_unmatched(members, [label.name for label in by_stem.values()], masks)
    return members


def _member(entry: Entry, label: Entry | None, worlds: dict[str, Entry]) -> Member:
    """Make the member of an image with its truth and its world file."""
    mask, mask_etag = (label.name, label.etag) if label else (None, None)
    stem, dot, ending = entry.name.lower().rpartition(".")
    names = (f"{stem}.{ending[:1]}{ending[-1:]}w", f"{stem}.{ending}w", f"{stem}.wld")
    world = next((worlds[name] for name in names if dot and name in worlds), None)
    files = None
    if world:
        file = {"channel": WORLD, "key": world.name, "bytes": world.bytes, "etag": world.etag}
        files = (file,)
    return Member(entry.name, entry.bytes, entry.etag, mask, mask_etag, files=files)


def is_world_file(name: str) -> bool:
    """Whether a file's extension is one of files with the coordinates of an image."""
    return name.lower().endswith(WORLD_FILES)


def list_labels(source: Source) -> dict[str, tuple[str, str | None]]:
    """Label images below ``source.mask_root`` by their stems; names that are no UTF-8 are left out.

    Raises ConfigError for two of one stem.
    """
    entries = (e for e in source.mask_root.list() if readable_name(e.name) == e.name)
    by_stem = labels_by_stem(entries, source.config.masks)
    return {stem: (entry.name, entry.etag) for stem, entry in by_stem.items()}


def label_keys(shard: Shard, image_id: str) -> Iterator[str]:
    """The path of an image below the root, with and without extension, and inside its container."""
    yield image_id
    if is_image(image_id):
        yield stem_of(image_id)
    if shard.uri:
        yield image_id.removeprefix(f"{shard.uri}/")


def open_label(source: Source, name: str, etag: str | None) -> Sample:
    """A label image below ``source.mask_root``."""
    return label_sample(name, ListedFile(source.mask_root, name, etag))


def label_sample(name: str, mask: "ListedFile") -> Sample:
    """A sample of a label image alone."""
    return Sample(name, "", "", bytes, read_mask=mask.read, open_mask=mask.open)


def stem_of(name: str) -> str:
    """A path without its extension."""
    return name.removeprefix("./").removesuffix(PurePosixPath(name).suffix)  # // stays as it is


def labels_by_stem(entries: Iterable[Entry], masks: str) -> dict[str, Entry]:
    """Label images by the stems of their images; raises ConfigError for two of one stem."""
    suffix = "" if "/" in masks else masks
    by_stem: dict[str, Entry] = {}
    for entry in entries:
        if not entry.name.lower().endswith(EXTENSIONS) or not (
            stem := stem_of(entry.name)
        ).endswith(suffix):
            continue
        other = by_stem.setdefault(stem.removesuffix(suffix), entry)
        if other is not entry:
            raise ConfigError(
                f"input.masks: {masks} holds two masks of one name: {other.name}, {entry.name}"
            )
    return by_stem


def _report_unmatched(members: list[Member], labels: list[str], masks: str) -> None:
    lonely, images = [member.key for member in members if member.mask is None], len(members)
    shown = ", ".join(lonely[:SHOWN])
    if lonely and len(lonely) == images:
        there = ", ".join(labels[:SHOWN]) or "no images at all"
        raise ConfigError(
            f"input.masks: none of {images} images has a mask with the same stem in {masks!r}; "
            f"images: {shown}; masks: {there}"
        )
    if lonely:
        log.warning("%d of %d images have no mask in %r: %s", len(lonely), images, masks, shown)


@dataclass(frozen=True)
class ListedFile:
    """A loose object, to be read whole or in pieces, as it was when it was listed.

    Reading raises StoreError, and ImageError (``missing``, ``changed``, ``archived``,
    ``forbidden``) if it is only this object.
    """

    store: Store
    name: str
    etag: str | None = None

    def read(self, start: int | None = None, stop: int | None = None) -> bytes:
        """All bytes, or those in [start, stop)."""
        return self._translate_errors(lambda: self.store.read(self.name, start, stop, self.etag))

    def open(self) -> Ranged:
        """Return its size and a reader of byte ranges."""
        size = self._translate_errors(lambda: self.store.entry(self.name).bytes)
        return Ranged(size, self.read)

    def _translate_errors(self, look: Callable[[], ResultT]) -> ResultT:
        try:
            return look()
        except ChangedError as error:
            raise ImageError(error.code, str(error)) from error
        except ObjectError as error:
            require_store(self.store, error)
            is_gone = isinstance(error, NotFoundError)
            told = "it was there when the run began" if is_gone else REREAD
            raise ImageError(error.code, f"{error}; {told}") from error


def require_store(root: Store, error: ObjectError) -> None:
    """Raises StoreError if it is not one object of the input that is gone or denied, but all."""
    if isinstance(error, ForbiddenError):
        root.require_access()
    elif isinstance(error, NotFoundError) and not root.exists():
        raise StoreError(f"{root.uri()} is gone; was it unmounted, or deleted?")


LABELS = LabelFiles(list_labels, label_keys, open_label)
CONTAINER = Container(
    list_shards, read, EXTENSIONS, is_loose=True, labels=LABELS, recount=member_ids
)
