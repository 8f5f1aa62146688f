"""Opening an input and reading its shards, whatever its format. A new format is a module with
``list_shards`` and ``read``, and a row of ``FORMATS``.
"""

from collections.abc import Iterator

from unet_core import folder, webdataset
from unet_core.codec import EXTENSIONS, is_image
from unet_core.config import InputConfig, StorageConfig
from unet_core.errors import ConfigError, StoreError
from unet_core.shards import Sample, Shard, Source
from unet_core.store import Store, split

FORMATS = {"folder": folder, "webdataset": webdataset}


def open_source(config: InputConfig, storage: StorageConfig | None = None) -> Source:
    """Find out what the input is; ``format = "auto"`` looks at the names below the root.

    Raises StoreError if nothing is there, ConfigError if images and tars are mixed.
    """
    root = Store(config.uri, storage)
    names: tuple[str, ...] = ()
    if root.size is not None:
        folder, name = split(root.uri())
        root, names = Store(folder, storage), (name,)
    elif not root.exists():
        raise StoreError(
            f"input.uri: there is nothing at {config.uri}; check the bucket's name and the prefix"
            if "://" in config.uri
            else f"input.uri: there is nothing at {config.uri}"
        )
    wanted: str = config.format
    if wanted == "auto":
        wanted = _detect(config, names or tuple(entry.name for entry in root.list()))
    return Source(config, wanted, root, names)


def list_shards(source: Source) -> list[Shard]:
    """All shards of the input, by name. One listing; nothing is opened.

    Raises ConfigError if masks are asked for and none fits any image.
    """
    return FORMATS[source.format].list_shards(source)


def read_shard(source: Source, shard: Shard) -> Iterator[Sample]:
    """The images of one shard, always in the same order."""
    return FORMATS[source.format].read(source, shard)


def _detect(config: InputConfig, names: tuple[str, ...]) -> str:
    tars = sum(name.endswith(webdataset.EXTENSIONS) for name in names)
    images = sum(is_image(name) for name in names)
    if tars and images:
        raise ConfigError(
            f"input.format: {config.uri} holds {tars} tars and {images} images; say which to "
            'read: "webdataset" or "folder"'
        )
    if not tars and not images:
        raise StoreError(
            f"input.uri: no tars ({', '.join(webdataset.EXTENSIONS)}) and no images "
            f"({', '.join(EXTENSIONS)}) below {config.uri}"
        )
    return "webdataset" if tars else "folder"
