"""Opening an input and reading its shards, whatever its format. A format is a ``Container``: a
module of this room, and a row of ``FORMATS``.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from unet_core.config.sections import InputConfig, StorageConfig
from unet_core.errors import (
    ChangedError,
    ConfigError,
    NotFoundError,
    ObjectError,
    ShardError,
    StoreError,
    few,
)
from unet_core.images.codec import is_image
from unet_core.images.sample import Sample
from unet_core.inputs import folder, listing, parquet, webdataset
from unet_core.inputs.container import Container, LabelFiles
from unet_core.inputs.shards import Known, Shard, Source, described, ending_of, readable_name
from unet_core.storage.store import Store, split

FORMATS: dict[str, Container] = {
    "webdataset": webdataset.CONTAINER,
    "folder": folder.CONTAINER,
    "parquet": parquet.CONTAINER,
    "list": listing.CONTAINER,
}
"""By ``input.format``, in the order in which messages name them."""
SHOWN_NAMES = 3  # enough to recognize what lies there


def open_source(
    config: InputConfig, storage: StorageConfig | None = None, known_format: str = ""
) -> Source:
    """Find out what the input is; ``format = "auto"`` looks at the names below the root, unless an
    earlier session has recorded ``known_format``.

    Raises StoreError if nothing is there, ConfigError if images and tars are mixed.
    """
    root = Store(config.uri, storage)
    names: tuple[str, ...] = ()
    if root.size is not None:
        folder, name = split(root.uri())
        root, names = Store(folder, storage), (name,)
    elif not root.exists():
        hint = "; check the bucket's name and the prefix" if "://" in config.uri else ""
        raise StoreError(f"input.uri: there is nothing at {config.uri}{hint}")
    if known_format or config.format != "auto":
        return Source(config, known_format or config.format, root, names)
    listing = [] if names else root.list()
    found = _detect(config, names or tuple(entry.name for entry in listing))
    return Source(config, found, root, names, listing)


def list_shards(source: Source, known: Known | None = None) -> Iterator[Shard]:
    """All shards of the input, by name, one after the other: they may be many; of what is not
    ``known``, if that is given.

    Raises ConfigError if masks are asked for and none fits any image, StoreError if there is
    nothing.
    """
    is_empty = known is None
    for shard in FORMATS[source.format].list_shards(source, known or set()):
        for name in (shard.uri, *(member.key for member in shard.members)):
            if not name.isascii() and readable_name(name) != name:
                raise StoreError(f"{name!r} below {source.config.uri} is not UTF-8; rename it")
        is_empty = False
        yield shard
    if is_empty:
        raise StoreError(
            f"input.uri: nothing of format {source.format!r} at {source.config.uri}"
            f"{_instead(source.passed_over)}"
        )


def nothing_inside(source: Source, shards: list[Shard]) -> StoreError:
    """The error of tars that hold no image: only reading tells, so all of them were read."""
    inside = list(islice(webdataset.names(source, shards[0]), SHOWN_NAMES + 1))
    return StoreError(
        f"input.uri: no image in any tar at {source.config.uri} ({len(shards)} read); "
        f"{shards[0].uri} holds {few(inside, SHOWN_NAMES) or 'no files'}"
    )


def read_shard(source: Source, shard: Shard) -> Iterator[Sample]:
    """The images of one shard, always in the same order.

    Raises ShardError if its tar or Parquet file is not the one that was listed, is archived or
    forbidden; StoreError if storage fails.
    """
    try:
        yield from FORMATS[source.format].read(source, shard)
        if shard.uri and source.root.is_local:  # objects are held to their etag by each request
            source.root.require_etag(shard.uri, shard.etag)
    except ObjectError as error:
        folder.require_store(source.root, error)
        is_another = isinstance(error, ChangedError | NotFoundError)
        told = "restore it, or begin a new run" if is_another else "then the same command continues"
        raise ShardError(f"{error}; {told}") from error


def label_files(source: Source) -> LabelFiles | None:
    """Where ``input.masks`` has files of their own for truth; None if ``read_shard`` gives it."""
    return folder.LABELS if source.config.mask_folder else FORMATS[source.format].labels


def is_there(source: Source, shard: Shard) -> bool:
    """Whether a shard's tar or Parquet file is the one listed, and can be read; loose images show
    it when they are read.
    """
    if not shard.uri:
        return True
    try:
        entry = source.root.entry(shard.uri)
        if entry.bytes:
            source.root.read(shard.uri, 0, 1)  # archives can be looked at, and not read
        return entry.etag == shard.etag
    except ObjectError as error:
        folder.require_store(source.root, error)
        return False


def _instead(endings: Counter[str]) -> str:
    return f"; it holds {described(endings)}" if endings else ""


def _detect(config: InputConfig, names: tuple[str, ...]) -> str:
    """The format whose files are there, if it is only one."""
    there = {
        kind: matching
        for kind, container in FORMATS.items()
        if (matching := [name for name in names if name.lower().endswith(container.extensions)])
    }
    if len(there) > 1:
        shown = ", ".join(f"{len(m)} for {kind!r} ({m[0]})" for kind, m in there.items())
        raise ConfigError(f"input.format: {config.uri} holds files {shown}; say which to read")
    if not there and any(map(is_image, names)):
        return "folder"  # of kinds that are not read, whose rows will say so
    if not there:
        endings = ", ".join(end for container in FORMATS.values() for end in container.extensions)
        is_list = any(name.lower().endswith((*listing.CSV, "manifest.json")) for name in names)
        hint = "; to read a list or S3 Inventory, set input.format = 'list'" if is_list else ""
        raise StoreError(
            f"input.uri: no images, tars or Parquet files ({endings}) at {config.uri}{hint}"
            f"{_instead(Counter(map(ending_of, names)))}"
        )
    return next(iter(there))
