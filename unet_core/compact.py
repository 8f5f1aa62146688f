"""``metrics.parquet``: the rows of all metrics parts in one file, with the shard of each.

It is made from the parts, and says in its footer of which; where they are others by now, the parts
count.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
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
GROUP_BYTES = 128 * 2**20
"""In memory; a row group has so many or a few parts more."""
PARTS = "parts"
BATCH_ROWS = 8192

State = list[tuple[str, int, str]]


def compact(store: Store, record: Record) -> None:
    """Write ``metrics.parquet`` unless it is there and tells of all parts of a run.

    One row group is in memory at a time.
    """
    state = _state(store)
    if not state or _is_current(store, state):
        return
    names = json.dumps(record.class_names)
    footer = {"fingerprint": record.fingerprint, "class_names": names, PARTS: _digest(state)}
    schema = COMPACTED.with_metadata(footer)
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as file:
        with pq.ParquetWriter(file, schema, **COMPRESSION) as writer:
            for group in _groups(_tables(store, state)):
                writer.write_table(group.cast(schema))
        store.publish(FILE, cast(BinaryIO, file))


def read_rows(store: Store) -> pa.Table:
    """The rows of all committed shards, by shard id and then in the order of the shard; columns as
    ``COMPACTED``.
    """
    state = _state(store)
    if _is_current(store, state):
        return table_of(store.read(FILE)).replace_schema_metadata()
    return pa.concat_tables([COMPACTED.empty_table(), *_tables(store, state)])


def batches(store: Store) -> Iterator[pa.Table]:
    """The same rows a few thousand at a time, for who needs sums of many columns."""
    state = _state(store)
    if _is_current(store, state):
        with store.open_parquet(FILE) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                yield pa.Table.from_batches([batch]).replace_schema_metadata()
        return
    yield from _tables(store, state)


def _tables(store: Store, state: State) -> Iterator[pa.Table]:
    """The rows of shards, a few shards at a time."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for at in range(0, len(state), READ_THREADS):
            names = [shard_id for shard_id, *_ in state[at : at + READ_THREADS]]
            yield pa.concat_tables(pool.map(lambda name: _rows(store, name), names))


def _groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    held_bytes = 0
    for table in tables:
        held.append(table)
        held_bytes += table.nbytes
        if held_bytes >= GROUP_BYTES:
            yield pa.concat_tables(held)
            held, held_bytes = [], 0
    if held:
        yield pa.concat_tables(held)


def _rows(store: Store, shard_id: str) -> pa.Table:
    rows, _ = read_metrics(store, shard_id)
    names = pa.array([shard_id] * rows.num_rows, pa.string())
    return pa.table([names, *rows.select(METRICS.names).columns], schema=COMPACTED)


def _state(store: Store) -> State:
    """Ids, sizes and etags of the metrics parts."""
    return [
        (entry.name.removesuffix(".parquet"), entry.bytes, entry.etag)
        for entry in store.list("metrics")
        if not entry.name.startswith("_")
    ]


def _digest(state: State) -> str:
    return hashlib.sha256(repr(state).encode()).hexdigest()


def _is_current(store: Store, state: State) -> bool:
    if not store.exists(FILE):
        return False
    with store.open_parquet(FILE) as file:
        told = (file.schema_arrow.metadata or {}).get(PARTS.encode(), b"")
    return bool(told.decode() == _digest(state))
