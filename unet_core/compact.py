"""``metrics.parquet``: the rows of all metrics parts in one file, with the shard of each.

It is made from the parts, and says in its footer of which; where they are others by now, the parts
count.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing

import pyarrow as pa

from unet_core.ordered import side_by_side
from unet_core.parts import RowGroups, read_footer, read_metrics
from unet_core.run import METRICS as FILE
from unet_core.run import Record
from unet_core.schema import METRICS
from unet_core.storage.store import Store

COMPACTED = pa.schema([pa.field("shard_id", pa.string()), *METRICS])
GROUP_BYTES = 128 * 2**20
"""In memory; a row group has so many, or a part more."""
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
    with closing(RowGroups(COMPACTED.with_metadata(footer), GROUP_BYTES)) as file:
        for rows in _tables(store, state):
            file.append(rows)
        store.publish(FILE, file.complete())


def batches(store: Store) -> Iterator[pa.Table]:
    """The rows of all committed shards, by shard id and then in the order of the shard, a few at a
    time; columns as ``COMPACTED``.
    """
    state = _state(store)
    if not _is_current(store, state):
        yield from _tables(store, state)
        return
    with store.open_parquet(FILE) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            yield pa.Table.from_batches([batch]).replace_schema_metadata()


def _tables(store: Store, state: State) -> Iterator[pa.Table]:
    def rows(shard_id: str) -> pa.Table:
        table, _ = read_metrics(store, shard_id)
        names = pa.array([shard_id] * table.num_rows, pa.string())
        return pa.table([names, *table.select(METRICS.names).columns], schema=COMPACTED)

    return side_by_side(rows, (shard_id for shard_id, *_ in state))


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
    return store.exists(FILE) and read_footer(store, FILE).get(PARTS) == _digest(state)
