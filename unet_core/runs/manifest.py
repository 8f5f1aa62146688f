"""The manifest: every shard of a run, on disk. Members are many, so the driver keeps only heads.

Each listing writes one file, row group by row group. The driver reads it without members; the
worker that segments a shard reads the members of that shard.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, chain, islice
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_core.errors import ConfigError
from unet_core.inputs.shards import Known, Member, Shard
from unet_core.runs.schema import MANIFEST, MEMBER
from unet_core.storage.spool import drop, reports_full_disk, spooled
from unet_core.storage.store import Store

SHARDS_PER_GROUP = 16
"""Shards per row group if they have members: a worker reads a whole group for one shard."""
HEADS_PER_GROUP = 4096
"""Shards per row group if they have none."""
FOLDER = "manifest"
HEADS = [name for name in MANIFEST.names if name != "members"]


def manifest_name(generation: int) -> str:
    """Return the path of the file of the ``generation``-th listing; 0 is the first."""
    return f"{FOLDER}/{generation:05d}.parquet"


@dataclass(frozen=True)
class Draft:
    """A manifest that is complete but not yet published."""

    heads: list[Shard]
    file: BinaryIO
    generation: int = 0

    def with_members(self, head: Shard) -> Shard:
        """Add the members of a shard; a shard without members is returned unchanged."""
        return _with_members(head, lambda group: _group(pq.ParquetFile(self.file), group))


@contextmanager
def draft(
    shards: Iterable[Shard], generation: int = 0, passed_over: Mapping[str, int] | None = None
) -> Iterator[Draft]:
    """Write shards, as they come, into a temporary file, for a manifest's ``generation``; its
    footer keeps the numbers of files that were ``passed_over`` by then.

    Raises ConfigError if two shards are the same, StoreError if there is no room for it.
    """
    file = spooled()
    try:
        with reports_full_disk():
            heads = _write(iter(shards), file, generation, passed_over)
            file.flush()
        yield Draft(heads, file, generation)
    finally:
        drop(file)


def _write(
    shards: Iterator[Shard], file: BinaryIO, generation: int, passed_over: Mapping[str, int] | None
) -> list[Shard]:
    """Write all shards; returns their heads."""
    heads: dict[str, Shard] = {}
    with pq.ParquetWriter(file, MANIFEST, compression="zstd", use_dictionary=False) as writer:
        first = next(shards, None)
        shards = chain([first] if first is not None else [], shards)
        size = SHARDS_PER_GROUP if first is not None and first.has_members else HEADS_PER_GROUP
        while group := list(islice(shards, size)):
            writer.write_batch(_batch(group))
            for shard in group:
                if shard.shard_id in heads:
                    raise ConfigError(
                        f"input: shard {shard.shard_id} comes twice: the same objects are named "
                        "twice, in the same order; take them out of the list"
                    )
                heads[shard.shard_id] = replace(
                    shard, members=(), generation=generation, row=len(heads)
                )
        if passed_over:
            writer.add_key_value_metadata({"passed_over": json.dumps(passed_over)})
    return list(heads.values())


def _batch(shards: list[Shard]) -> pa.RecordBatch:
    """Build rows of the manifest by column: members may be fifty million."""
    columns = [
        pa.array([getattr(shard, name) for shard in shards], MANIFEST.field(name).type)
        for name in HEADS
    ]
    members = [member for shard in shards for member in shard.members]
    values = zip(*members, strict=True) if members else [()] * len(MEMBER.fields)
    fields = [pa.array(v, f.type) for v, f in zip(values, MEMBER.fields, strict=True)]
    lists = pa.ListArray.from_arrays(
        pa.array([0, *accumulate(len(shard.members) for shard in shards)], pa.int32()),
        pa.StructArray.from_arrays(fields, fields=MEMBER.fields),
    )
    return pa.RecordBatch.from_arrays([*columns, lists], schema=MANIFEST)


def read_heads(store: Store, generation: int) -> list[Shard]:
    """Read the shards of a listing, without their members.

    Raises ParquetDamagedError if the file is damaged.
    """
    with store.open_parquet(manifest_name(generation)) as file:
        heads = chain.from_iterable(b.to_pylist() for b in file.iter_batches(columns=HEADS))
        return [Shard(**head, generation=generation, row=row) for row, head in enumerate(heads)]


def passed_over(store: Store, generation: int) -> dict[str, int]:
    """Numbers of files that a listing passed over, by their endings."""
    footer = _metadata(store, manifest_name(generation)).metadata or {}
    return dict(json.loads(footer.get(b"passed_over", b"{}")))


def with_members(store: Store, shard: Shard) -> Shard:
    """Add the members of a shard from the manifest; one without members is returned unchanged."""
    return _with_members(shard, partial(_members, store, manifest_name(shard.generation)))


def _with_members(shard: Shard, read: Callable[[int], list[tuple[Member, ...]]]) -> Shard:
    if not shard.has_members:
        return shard
    group, index = divmod(shard.row, SHARDS_PER_GROUP)
    return replace(shard, members=read(group)[index])


def names(store: Store, heads: list[Shard]) -> Known:
    """Collect the names of every tar, Parquet file and loose image in the shards of a run."""
    found: set[str | tuple[str, str]] = {shard.uri for shard in heads if shard.uri}
    for generation in sorted({shard.generation for shard in heads if shard.has_members}):
        with store.open_parquet(manifest_name(generation)) as file:
            for batch in file.iter_batches(SHARDS_PER_GROUP, columns=["members"]):
                members = pc.list_flatten(batch["members"])
                keys, uris = (members.field(name).to_pylist() for name in ("key", "uri"))
                for key, uri in zip(keys, uris, strict=True):
                    found.update([key] if uri is None else [uri, (key, uri)])
    return found


@lru_cache(maxsize=4)
def _members(store: Store, name: str, group: int) -> list[tuple[Member, ...]]:
    """Read the members of every shard in one row group."""
    with store.open_parquet(name, metadata=_metadata(store, name)) as file:
        return _group(file, group)


@lru_cache(maxsize=4)
def _metadata(store: Store, name: str) -> pq.FileMetaData:
    """Read the footer of a manifest file, which has a kilobyte for every row group."""
    with store.open_parquet(name) as file:
        return file.metadata


def _group(file: pq.ParquetFile, group: int) -> list[tuple[Member, ...]]:
    column = file.read_row_group(group, columns=["members"])["members"].to_pylist()
    return [tuple(Member(**member) for member in members) for members in column]
