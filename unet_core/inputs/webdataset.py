"""``format = "webdataset"``: tars, a shard each, streamed once from front to back."""

import contextlib
import gzip
import io
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from unet_core.errors import ConfigError, ImageError, StoreError, one_line
from unet_core.images import unsupported
from unet_core.images.codec import MAX_ENCODED_BYTES, is_image
from unet_core.images.sample import Sample
from unet_core.inputs.container import Container
from unet_core.inputs.shards import Known, Shard, Source, make_shard, readable_name
from unet_core.storage.store import is_hidden

EXTENSIONS = (".tar", ".tar.gz", ".tgz")
MASK_WORDS = ("mask", "masks", "seg", "label", "labels")
"""``key.WORD.png`` is never an image, whether or not it is the truth that was asked for."""
Content = bytes | ImageError
"""Bytes of a member, or the reason why it has none."""
MAX_HEADER_BYTES = 2**20
"""All that describes one member, and what describes all of them together."""


def list_shards(source: Source, known: Known) -> Iterator[Shard]:
    """A shard for every tar, by name, unopened; raises ConfigError for odd ``input.masks``."""
    _mask_suffix(source)
    for entry in source.entries(lambda name: name.lower().endswith(EXTENSIONS)):
        if entry.name not in known:
            yield make_shard(entry.name, entry.bytes, entry.etag)


class _TarMember(tarfile.TarInfo):
    """A tar header; tells its archive of the end mark, and of blocks that are no headers."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> "_TarMember":
        try:
            with tarfile_.fileobj.fileobj.metered():
                member = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # missing from the stubs
            tarfile_.has_end_mark = True
            raise
        except tarfile.InvalidHeaderError:  # type: ignore[attr-defined]  # missing from the stubs
            tarfile_.has_strange_blocks = True
            raise
        tarfile_.has_end_mark = False
        shared = tarfile_.pax_headers
        if sum(map(len, (*shared, *shared.values()))) > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADER_BYTES} bytes")
        return member


class _Metered:
    """A stream that gives only so much while a header is read: headers say themselves how long
    they are, and a packed tar of a few kB can hold one of many GB.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._left: int | None = None
        self._empty = 0

    @contextlib.contextmanager
    def metered(self) -> Iterator[None]:
        """Headers within a header share its meter."""
        if self._left is not None:
            yield
            return
        self._left = MAX_HEADER_BYTES
        try:
            yield
        finally:
            self._left = None

    def read(self, size: int) -> bytes:
        """Raises ReadError for a header that is too long, and for reading on behind the end."""
        if self._left is not None:
            self._left -= size
            if self._left < 0:
                raise tarfile.ReadError(f"a header of more than {MAX_HEADER_BYTES} bytes")
        data = self._stream.read(size)
        self._empty = 0 if data else self._empty + 1
        if self._empty > 2:  # the end is asked for once; to skip a lying member, for years
            raise tarfile.ReadError("it ends within a member")
        return data


def read(source: Source, shard: Shard) -> Iterator[Sample]:
    """Stream a tar once, to its very end. Members of one sample are neighbours and share the name
    up to a suffix; a tar that is cut short or damaged has a failed sample of its own, the last.

    Raises StoreError if storage fails, ObjectError if the tar is not the one that was listed or
    cannot be read.
    """
    uri = source.root.uri(shard.uri)
    mask_suffix = _mask_suffix(source)
    with source.root.open(shard.uri, shard.bytes, shard.etag) as stream:
        try:
            for key, images, masks in _groups(_members(stream, uri), mask_suffix):
                yield from _samples_of(f"{shard.uri}/{key}", uri, images, masks)
        except ImageError as failure:
            yield Sample(shard.uri, "", uri, bytes, failure=failure)


def recount(source: Source, shard: Shard) -> Iterator[str]:
    """Image ids of a tar by its members alone, none of which is kept; those before its damage."""
    with contextlib.suppress(StoreError, ImageError), source.root.open(shard.uri) as stream:
        members = _members(stream, source.root.uri(shard.uri), is_kept=False)
        for key, images, _ in _groups(members, _mask_suffix(source)):
            yield from [f"{shard.uri}/{key}"] * len(images)


def names(source: Source, shard: Shard) -> Iterator[str]:
    """Names of all files in a tar, up to its damage; raises StoreError if storage fails."""
    with contextlib.suppress(ImageError), source.root.open(shard.uri) as stream:
        for name, _ in _members(stream, source.root.uri(shard.uri), False, lambda name: True):
            yield name


def _groups(
    members: Iterator[tuple[str, Content]], mask_suffix: str
) -> Iterator[tuple[str, list[Content], list[Content]]]:
    """Images and masks of each key. A file of a kind that is not read counts as its image only if
    there is no other. Raises ImageError where the tar is damaged, after what comes before.
    """
    key, held, images, masks = "", 0, list[Content](), list[Content]()
    failure: ImageError | None = None
    try:
        for name, data in members:
            named, suffix = _split_member(name, mask_suffix)
            if named != key:
                yield key, _readable(images), masks
                key, held, images, masks = named, 0, [], []
            held += _size_of(data)  # a tar may hold the same name any number of times
            refusal = ImageError("too_large", f"its names hold {held} bytes together")
            if suffix in ("", mask_suffix):
                content = data if held <= MAX_ENCODED_BYTES else refusal
                (masks if suffix else images).append(content)
    except ImageError as error:
        failure = error
    yield key, _readable(images), masks
    if failure is not None:
        raise failure


def _readable(images: list[Content]) -> list[Content]:
    """Images of one key without those of kinds that are not read, unless there are no others."""
    others = [i for i in images if not isinstance(i, ImageError) or i.code != "unsupported"]
    return others or images[:1]


def _mask_suffix(source: Source) -> str:
    """``input.masks`` as a member suffix without first dot; raises ConfigError if it is none."""
    masks = source.config.masks
    suffix = masks.removeprefix(".")
    if masks and ("/" in suffix or "." not in suffix):
        raise ConfigError(
            f"input.masks: got {masks!r}; in tars it is a member suffix such as 'mask.png', "
            "which makes KEY.mask.png the truth of KEY"
        )
    return suffix


def _members(
    stream: BinaryIO,
    uri: str,
    is_kept: bool = True,
    is_wanted: Callable[[str], bool] = is_image,
) -> Iterator[tuple[str, Content]]:
    """Names and contents of the image members; contents are read and dropped unless they are kept.

    Raises ImageError where the tar is damaged.
    """
    try:
        is_packed = cast(io.BufferedReader, stream).peek(2)[:2] == b"\x1f\x8b"
        plain = cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if is_packed else stream
        with tarfile.open(
            fileobj=cast(BinaryIO, _Metered(plain)),
            mode="r|",
            tarinfo=_TarMember,
            ignore_zeros=True,
            encoding="utf-8",
            errors="surrogateescape",
        ) as tar:
            for info in tar:
                name = readable_name(info.name.removeprefix("./"))
                parts = (part for part in name.split("/") if part not in (".", ".."))
                if not info.isdir() and is_wanted(name) and not any(map(is_hidden, parts)):
                    yield name, _content(tar, info, is_kept, name)
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember every one
            if not getattr(tar, "has_end_mark", False):
                raise tarfile.ReadError("it has no end mark")
            if getattr(tar, "has_strange_blocks", False):
                raise tarfile.ReadError("blocks between its members are no headers")
    except (StoreError, MemoryError):
        raise
    except Exception as error:  # tarfile raises whatever a hostile header leads to
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise StoreError(f"cannot read {uri}: {error.strerror or error}") from error
        raise ImageError("tar", f"the tar is cut short or damaged: {one_line(error)}") from error


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo, is_kept: bool, name: str) -> Content:
    if not info.isreg():
        return ImageError("not_a_file", "the tar member is a link or a device, not a file")
    if info.size > MAX_ENCODED_BYTES:
        return ImageError("too_large", f"{info.size} encoded bytes, allowed: {MAX_ENCODED_BYTES}")
    file = tar.extractfile(info)
    assert file is not None
    head = file.read(unsupported.HEAD_BYTES)
    if (refusal := unsupported.by_name(name, head)) is not None:
        return refusal
    content = io.BytesIO()  # grows in place; reading at once would take twice the memory
    content.write(head)
    while piece := file.read(2**20):
        if is_kept:
            content.write(piece)
    return content.getvalue()


def _split_member(name: str, mask_suffix: str) -> tuple[str, str]:
    """A member's key, and its suffix if it is a mask: ``a.mask.png`` → (``a``, ``mask.png``)."""
    folder, slash, base = name.rpartition("/")
    if mask_suffix and base.endswith(f".{mask_suffix}"):
        return folder + slash + base.removesuffix(f".{mask_suffix}"), mask_suffix
    stem = base.rpartition(".")[0]
    before, _, word = stem.rpartition(".")
    if before and word in MASK_WORDS:
        return folder + slash + before, base[len(before) + 1 :]
    return folder + slash + stem, ""


def _samples_of(
    image_id: str, uri: str, images: list[Content], masks: list[Content]
) -> Iterator[Sample]:
    """The images of one key; the first mask is theirs."""
    for image in images:
        yield Sample(
            image_id=image_id,
            key=PurePosixPath(image_id).name,
            source_uri=uri,
            read=partial(_given, image),
            read_mask=partial(_given, masks[0]) if masks else None,
            failure=image if isinstance(image, ImageError) else None,
            encoded_bytes=sum(map(_size_of, (image, *masks[:1]))),
        )


def _size_of(data: Content) -> int:
    return len(data) if isinstance(data, bytes) else 0


def _given(data: Content) -> bytes:
    if isinstance(data, ImageError):
        raise data
    return data


CONTAINER = Container(list_shards, read, EXTENSIONS, recount=recount)
