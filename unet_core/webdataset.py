"""``format = "webdataset"``: tars, a shard each, streamed once from front to back."""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from unet_core.codec import MAX_ENCODED_BYTES, is_image
from unet_core.errors import ImageError, StoreError
from unet_core.shards import Sample, Shard, Source, make_shard

EXTENSIONS = (".tar", ".tar.gz", ".tgz")
MASK_WORDS = ("mask", "masks", "seg", "label", "labels")
"""``key.WORD.png`` is never an image, whether or not it is the truth that was asked for."""


def list_shards(source: Source) -> list[Shard]:
    """A shard for every tar, by name; nothing is opened."""
    tars = [entry for entry in source.entries() if entry.name.endswith(EXTENSIONS)]
    return [make_shard(e.name, e.bytes, e.etag, None, None, ()) for e in tars]


class _TarMember(tarfile.TarInfo):
    """A tar header that remembers whether the archive's end mark was read."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_TarMember":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # missing from the stubs
            tarfile_.has_end_mark = True  # type: ignore[attr-defined]  # ours
            raise


def read(source: Source, shard: Shard) -> Iterator[Sample]:
    """Stream a tar once. Members of one sample are neighbours and share the name up to a suffix;
    a tar that is cut short or damaged ends with a failed sample of its own.
    """
    uri = source.root.uri(shard.uri)
    group: list[tuple[str, str, bytes | ImageError]] = []
    with source.root.open(shard.uri, shard.bytes) as stream:
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
    if before and word in MASK_WORDS:
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
