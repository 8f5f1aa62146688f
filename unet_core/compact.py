"""``metrics.parquet``: the rows of all metrics parts in one file, with the shard of each.

It is made from the parts, and says in its footer of which; where they are others by now, the parts
count.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from unet_core.parts import COMPRESSION, SPOOL_BYTES, read_metrics
from unet_core.run import METRICS as FILE
from unet_core.run import READ_THREADS, Record
from unet_core.schema import METRICS
from unet_core.storage.store import Store, table_of

COMPACTED = pa.schema([pa.field("shard_id", pa.string()), *METRICS])
PARTS_PER_GROUP = 512
"""Parts that make a row group."""
PARTS = "parts"
BATCH_ROWS = 8192


def compact(store: Store, record: Record) -> None:
    """Write ``metrics.parquet`` unless it is there and tells of all parts of a run.

    A few hundred parts are in memory at a time.
    """
    state = _state(store)
    if not state or _is_current(store, state):
        return
    names = json.dumps(record.class_names)
    footer = {"fingerprint": record.fingerprint, "class_names": names, PARTS: _digest(state)}
    schema = COMPACTED.with_metadata(footer)
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as file:
        with pq.ParquetWriter(file, schema, **COMPRESSION) as writer:
            for table in tables(store, [shard_id for shard_id, _ in state]):
                writer.write_table(table.cast(schema))
        store.publish(FILE, cast(BinaryIO, file))


def read_rows(store: Store) -> pa.Table:
    """The rows of all committed shards, by shard id and then in the order of the shard; columns as
    ``COMPACTED``.
    """
    state = _state(store)
    if _is_current(store, state):
        return table_of(store.read(FILE)).replace_schema_metadata()
    found = tables(store, [shard_id for shard_id, _ in state])
    return pa.concat_tables([COMPACTED.empty_table(), *found])


def batches(store: Store) -> Iterator[pa.Table]:
    """The same rows a few thousand at a time, for who needs sums of many columns."""
    state = _state(store)
    if _is_current(store, state):
        with store.open_parquet(FILE) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                yield pa.Table.from_batches([batch]).replace_schema_metadata()
        return
    shard_ids = [shard_id for shard_id, _ in state]
    for at in range(0, len(shard_ids), READ_THREADS):
        yield from tables(store, shard_ids[at : at + READ_THREADS])


def tables(store: Store, shard_ids: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of shards, a few hundred shards at a time."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for at in range(0, len(shard_ids), PARTS_PER_GROUP):
            names = shard_ids[at : at + PARTS_PER_GROUP]
            yield pa.concat_tables(pool.map(lambda name: _rows(store, name), names))


def _rows(store: Store, shard_id: str) -> pa.Table:
    rows, _ = read_metrics(store, shard_id)
    names = pa.array([shard_id] * rows.num_rows, pa.string())
    return pa.table([names, *rows.select(METRICS.names).columns], schema=COMPACTED)


def _state(store: Store) -> list[tuple[str, int]]:
    """Ids and sizes of the metrics parts."""
    return [
        (entry.name.removesuffix(".parquet"), entry.bytes)
        for entry in store.list("metrics")
        if not entry.name.startswith("_")
    ]


def _digest(state: list[tuple[str, int]]) -> str:
    return hashlib.sha256(repr(state).encode()).hexdigest()


def _is_current(store: Store, state: list[tuple[str, int]]) -> bool:
    if not store.exists(FILE):
        return False
    with store.open_parquet(FILE) as file:
        told = (file.schema_arrow.metadata or {}).get(PARTS.encode(), b"")
    return bool(told.decode() == _digest(state))
