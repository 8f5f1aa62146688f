"""``unet-jobs pack``: loose images and their masks into balanced shards that stream well.

A shard is written whole or not at all, and is named by what it holds: running the same command
again writes only what is missing.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from unet_core.concurrency import map_in_order
from unet_core.config.predict import PredictConfig
from unet_core.errors import ConfigError
from unet_core.images.codec import is_image
from unet_core.images.sample import Sample
from unet_core.inputs.formats import FORMATS, list_shards, open_source, read_shard
from unet_core.inputs.shards import Member, Shard, make_shard
from unet_core.storage.parquet_files import encode_parquet
from unet_core.storage.store import Store

ROW_GROUP_ROWS = 64
ROW_GROUP_BYTES = 2**28
UNKNOWN_BYTES = 2**18
"""Assumed size of an image in a list without sizes."""


@dataclass(frozen=True)
class Packed:
    """Numbers of shards written and kept, and of images and masks in all of them."""

    shards: int
    kept: int
    images: int
    masks: int


def pack(config: PredictConfig, kind: str, shard_bytes: int) -> Packed:
    """Pack ``config.input`` (loose images or a list) into ``config.output.uri``.

    Raises ConfigError if the input is packed already, if two images would get one key, or if the
    destination holds anything else.
    """
    source = open_source(config.input, config.storage)
    if not FORMATS[source.format].is_loose:
        raise ConfigError(
            f"pack {config.input.uri}: it is {source.format} already, not loose images"
        )
    members = [member for shard in list_shards(source) for member in shard.members]
    _require_distinct_keys(members)
    output = Store(config.output.uri, config.storage)
    ending = FORMATS[kind].extensions[0]
    plan = {f"{shard.shard_id}{ending}": shard for shard in _balanced(members, shard_bytes)}
    there = {entry.name for entry in output.list() if not entry.name.startswith("_")}
    if strange := sorted(there - plan.keys()):
        raise ConfigError(
            f"pack: {config.output.uri} holds {strange[0]}, which is no shard of this input; "
            "choose a new destination, or images would be there twice"
        )
    new = {name: shard for name, shard in plan.items() if name not in there}
    for name, shard in new.items():
        packing = list(map_in_order(_contents, read_shard(source, shard)))
        output.publish(name, WRITERS[kind](packing))
    return Packed(
        shards=len(new),
        kept=len(plan) - len(new),
        images=len(members),
        masks=sum(member.mask is not None for member in members),
    )


def _require_distinct_keys(members: list[Member]) -> None:
    seen: dict[str, str] = {}
    for member in members:
        if not is_image(member.uri or member.key):
            raise ConfigError(f"pack: {member.uri or member.key} has no ending of an image")
        key = _key(member.key)
        if key in seen:
            raise ConfigError(
                f"pack: {seen[key]} and {member.key} would both be {key!r} in a shard; rename one"
            )
        seen[key] = member.key


def _key(name: str) -> str:
    """Return a name without its ending, with dashes for dots, since a tar's key ends at its first
    dot; for a URI, its bucket and path.
    """
    stem = name.rpartition(".")[0] if is_image(name) else name
    return stem.replace("://", "/").lstrip("/").replace(".", "-")


def _balanced(members: list[Member], shard_bytes: int) -> Iterator[Shard]:
    """Divide members, in their order, into as few shards of about equal size as possible."""
    total = sum(member.bytes or UNKNOWN_BYTES for member in members)
    count = max(1, min(len(members), -(-total // shard_bytes)))
    groups: list[list[Member]] = [[]]
    done = 0
    for member in members:
        groups[-1].append(member)
        done += member.bytes or UNKNOWN_BYTES
        if done * count >= total * len(groups) and len(groups) < count:
            groups.append([])
    for group in filter(None, groups):
        yield make_shard("", sum(m.bytes for m in group), None, 0, len(group), tuple(group))


Packing = list[tuple[Sample, bytes, bytes | None]]
"""Samples, each with the bytes of its image and mask."""


def _contents(sample: Sample) -> tuple[Sample, bytes, bytes | None]:
    return sample, sample.read(), sample.read_mask() if sample.read_mask is not None else None


def _tar(packing: Packing) -> bytes:
    """Write ``KEY.ext`` and ``KEY.mask.png``; headers hold no time or user, so bytes repeat."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample, image, mask in packing:
            key, ending = _key(sample.image_id), PurePosixPath(sample.source_uri).suffix.lower()
            for name, data in ((f"{key}{ending}", image), (f"{key}.mask.png", mask)):
                if data is not None:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def _parquet(packing: Packing) -> bytes:
    """Write columns ``id``, ``image`` and ``mask``; images as ``struct<bytes, path>``."""
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("id", pa.string()), ("image", cell), ("mask", pa.binary())])
    columns = {
        "id": [sample.image_id for sample, _, _ in packing],
        "image": [{"bytes": i, "path": PurePosixPath(s.image_id).name} for s, i, _ in packing],
        "mask": [mask for _, _, mask in packing],
    }
    largest = max(len(image) + len(mask or b"") for _, image, mask in packing)
    return encode_parquet(
        pa.table(columns, schema=schema),
        compression="none",  # images are compressed already
        row_group_size=max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // max(1, largest))),
    )


WRITERS = {"webdataset": _tar, "parquet": _parquet}
