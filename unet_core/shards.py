"""Input: what the shards are, and the images of one shard in their order.

A shard's id is a digest of path, size, etag and members: never of a rank, a position or an attempt.
"""

import dataclasses
import hashlib
import json
import logging
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from unet_core.codec import EXTENSIONS, MAX_ENCODED_BYTES
from unet_core.config import InputConfig
from unet_core.errors import ConfigError, ImageError, StoreError
from unet_core.store import Entry, Store, split

log = logging.getLogger(__name__)

TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz")
TAR_MASK_WORDS = ("mask", "masks", "seg", "label", "labels")
SHOWN = 3


@dataclass(frozen=True)
class Member:
    """One loose image of a shard."""

    key: str
    """Path below the input root."""
    bytes: int
    etag: str
    mask: str | None = None
    """Path of its truth below the masks' root."""


@dataclass(frozen=True)
class Shard:
    """The unit of reading, retry and commit."""

    shard_id: str
    uri: str
    """Path below the input root: a tar, or the empty string for loose images."""
    bytes: int
    etag: str | None
    first: int | None
    """Position of the first loose image among all of them."""
    count: int | None
    """Images; None where only reading tells."""
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One image as it was found: named, not yet decoded. ``read`` raises StoreError."""

    image_id: str
    key: str
    source_uri: str
    read: Callable[[], bytes]
    read_mask: Callable[[], bytes] | None = None
    failure: ImageError | None = None
    """Set where the reader already knows that there is nothing to decode."""


@dataclass(frozen=True)
class Source:
    """An input that has been looked at: its root and what lies there."""

    config: InputConfig
    format: str
    root: Store
    names: tuple[str, ...] = ()
    """The only names of the root that count, if ``input.uri`` is itself a file."""

    def read(self, shard: Shard) -> Iterator[Sample]:
        """The images of one shard, always in the same order."""
        return _read_tar(self, shard) if self.format == "webdataset" else _read_loose(self, shard)

    def list_shards(self) -> list[Shard]:
        """All shards of the input, by name. One listing; nothing is opened.

        Raises StoreError if there is nothing to read, ConfigError if no mask fits any image.
        """
        entries = self._entries()
        if self.format == "webdataset":
            tars = [e for e in entries if e.name.endswith(TAR_EXTENSIONS)]
            return [_shard(e.name, e.bytes, e.etag, None, None, ()) for e in tars]
        members = _pair(self, [e for e in entries if is_image(e.name)])
        groups = range(0, len(members), self.config.shard_images)
        return [_group(members[at : at + self.config.shard_images], at) for at in groups]

    def _entries(self) -> list[Entry]:
        entries = self.root.list()
        for entry in entries:
            if not _is_utf8(entry.name):
                raise StoreError(f"{entry.name!r} below {self.config.uri} is not UTF-8; rename it")
        return [e for e in entries if e.name in self.names] if self.names else entries


def open_source(config: InputConfig) -> Source:
    """Find out what the input is; ``format = "auto"`` looks at the names below the root.

    Raises StoreError if nothing is there, ConfigError if images and tars are mixed.
    """
    root = Store(config.uri)
    if not root.exists():
        raise StoreError(f"input.uri: there is nothing at {config.uri}")
    names: tuple[str, ...] = ()
    if root.is_file():
        folder, name = split(root.uri())
        root, names = Store(folder), (name,)
    wanted: str = config.format
    if wanted == "auto":
        wanted = _detect(config, names or tuple(entry.name for entry in root.list()))
    return Source(config, wanted, root, names)


def is_image(name: str) -> bool:
    """Whether a file's extension is one that is decoded."""
    return name.lower().endswith(EXTENSIONS)


def _is_utf8(name: str) -> bool:
    """Whether a name can be stored; local names that cannot carry surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _detect(config: InputConfig, names: tuple[str, ...]) -> str:
    tars = sum(name.endswith(TAR_EXTENSIONS) for name in names)
    images = sum(is_image(name) for name in names)
    if tars and images:
        raise ConfigError(
            f"input.format: {config.uri} holds {tars} tars and {images} images; say which to "
            'read: "webdataset" or "folder"'
        )
    if not tars and not images:
        raise StoreError(
            f"input.uri: no tars ({', '.join(TAR_EXTENSIONS)}) and no images "
            f"({', '.join(EXTENSIONS)}) below {config.uri}"
        )
    return "webdataset" if tars else "folder"


def _shard(
    uri: str,
    size: int,
    etag: str | None,
    first: int | None,
    count: int | None,
    members: tuple[Member, ...],
) -> Shard:
    identity = [uri, size, etag, [[m.key, m.bytes, m.etag] for m in members]]
    shard_id = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    return Shard(shard_id, uri, size, etag, first, count, members)


def _group(members: list[Member], first: int) -> Shard:
    size = sum(member.bytes for member in members)
    return _shard("", size, None, first, len(members), tuple(members))


# --- loose images ---------------------------------------------------------------------------


def _pair(source: Source, entries: list[Entry]) -> list[Member]:
    """Give every image its mask by exactly equal stems, and take the masks out of the images."""
    masks = source.config.masks
    members = [Member(entry.name, entry.bytes, entry.etag) for entry in entries]
    if not masks:
        return members
    if "/" in masks:
        below = _path_below(Store(masks).uri(), source.root.uri())
        members = [m for m in members if not (below and m.key.startswith(below))]
        by_stem = _by_stem([e.name for e in Store(masks).list() if is_image(e.name)], masks)
    else:
        is_mask = [_stem(m.key).endswith(masks) for m in members]
        found = [m.key for m, yes in zip(members, is_mask, strict=True) if yes]
        members = [m for m, yes in zip(members, is_mask, strict=True) if not yes]
        by_stem = {s.removesuffix(masks): name for s, name in _by_stem(found, masks).items()}
    paired = [dataclasses.replace(m, mask=by_stem.get(_stem(m.key))) for m in members]
    _say_unmatched([m.key for m in paired if m.mask is None], len(paired), by_stem, masks)
    return paired


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _path_below(path: str, root: str) -> str:
    """``path`` relative to ``root`` with a trailing slash, or nothing if it lies elsewhere."""
    return f"{path[len(root) + 1 :]}/" if path.startswith(f"{root}/") else ""


def _by_stem(names: list[str], masks: str) -> dict[str, str]:
    by_stem: dict[str, str] = {}
    for name in names:
        other = by_stem.setdefault(_stem(name), name)
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


def _read_loose(source: Source, shard: Shard) -> Iterator[Sample]:
    masks = source.config.masks
    mask_root = Store(masks) if "/" in masks else source.root
    for member in shard.members:
        yield Sample(
            image_id=member.key,
            key=_stem(PurePosixPath(member.key).name),
            source_uri=source.root.uri(member.key),
            read=_reader(source.root, member.key),
            read_mask=_reader(mask_root, member.mask) if member.mask else None,
        )


def _reader(store: Store, name: str) -> Callable[[], bytes]:
    return lambda: store.read(name)


# --- WebDataset tars ------------------------------------------------------------------------


class _TarMember(tarfile.TarInfo):
    """A tar header that remembers whether the archive's end mark was read."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_TarMember":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # missing from the stubs
            tarfile_.has_end_mark = True  # type: ignore[attr-defined]  # ours
            raise


def _read_tar(source: Source, shard: Shard) -> Iterator[Sample]:
    """Stream a tar once. Members of one sample are neighbours and share the name up to a suffix;
    a tar that is cut short or damaged ends with a failed sample of its own.
    """
    uri = source.root.uri(shard.uri)
    group: list[tuple[str, str, bytes | ImageError]] = []
    with source.root.open(shard.uri) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_TarMember) as tar:
                for info in tar:
                    if info.isdir() or not is_image(info.name):
                        continue
                    key, suffix = _split_member(info.name, source.config.masks)
                    if group and group[0][0] != key:
                        yield from _samples_of(source, shard, uri, group)
                        group = []
                    group.append((key, suffix, _member_bytes(tar, info)))
                if not getattr(tar, "has_end_mark", False):
                    raise tarfile.ReadError("the archive has no end mark")
        except (tarfile.TarError, zlib.error, EOFError) as error:
            yield from _samples_of(source, shard, uri, group)
            reason = " ".join(str(error).split())
            yield Sample(
                image_id=shard.uri,
                key="",
                source_uri=uri,
                read=bytes,
                failure=ImageError("tar", f"the tar is cut short or damaged: {reason}"),
            )
            return
        except OSError as error:
            raise StoreError(f"cannot read {uri}: {error.strerror or error}") from error
    yield from _samples_of(source, shard, uri, group)


def _split_member(name: str, masks: str) -> tuple[str, str]:
    """A member's key, and its suffix if it is a mask: ``a.mask.png`` → (``a``, ``mask.png``)."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    suffix = masks.removeprefix(".")
    if suffix and base.endswith(f".{suffix}"):
        return folder + slash + base.removesuffix(f".{suffix}"), suffix
    stem = base.rpartition(".")[0]
    before, _, word = stem.rpartition(".")
    if before and word in TAR_MASK_WORDS:
        return folder + slash + before, base[len(before) + 1 :]
    return folder + slash + stem, ""


def _member_bytes(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | ImageError:
    if not info.isreg():
        return ImageError("not_a_file", "the tar member is a link or a device, not a file")
    if info.size > MAX_ENCODED_BYTES:
        return ImageError("too_large", f"{info.size} encoded bytes, allowed: {MAX_ENCODED_BYTES}")
    file = tar.extractfile(info)
    return file.read() if file is not None else b""


def _samples_of(
    source: Source, shard: Shard, uri: str, group: list[tuple[str, str, bytes | ImageError]]
) -> Iterator[Sample]:
    """The images among the members of one key; the mask asked for is theirs."""
    wanted = source.config.masks.removeprefix(".")
    mask = next((data for _, suffix, data in group if suffix and suffix == wanted), None)
    for key, suffix, data in group:
        if suffix:
            continue
        failure = data if isinstance(data, ImageError) else None
        yield Sample(
            image_id=f"{shard.uri}/{key}",
            key=PurePosixPath(key).name,
            source_uri=uri,
            read=_giver(data),
            read_mask=_giver(mask) if mask is not None else None,
            failure=failure,
        )


def _giver(data: bytes | ImageError) -> Callable[[], bytes]:
    def read() -> bytes:
        if isinstance(data, ImageError):
            raise data
        return data

    return read
