"""``metrics.parquet``: the rows of all metrics parts in one file, with the shard of each.

Its footer records the parts it was made from. If the run has other parts now, those are read.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing

import pyarrow as pa

from unet_core.concurrency import map_in_order
from unet_core.runs import schema
from unet_core.runs.parts import read_footer, read_metrics
from unet_core.runs.run import METRICS, Record
from unet_core.storage.parquet_files import RowGroupWriter
from unet_core.storage.spool import reports_full_disk
from unet_core.storage.store import Store

COMPACTED = pa.schema([pa.field("shard_id", pa.string()), *schema.METRICS])
GROUP_BYTES = 128 * 2**20
"""Bytes in memory per row group, plus at most one part."""
PARTS = "parts"
BATCH_ROWS = 8192
"""Rows read at a time: a few megabytes."""


@reports_full_disk()
def compact(store: Store, record: Record) -> None:
    """Write ``metrics.parquet`` unless it exists and was made from all parts of the run.

    One row group is in memory at a time.
    """
    ids, digest = _parts(store)
    if not ids or _is_current(store, digest):
        return
    footer = {
        "fingerprint": record.fingerprint,
        "class_names": json.dumps(record.class_names),
        PARTS: digest,
    }
    with closing(RowGroupWriter(COMPACTED.with_metadata(footer), GROUP_BYTES)) as file:
        for rows in _tables(store, ids):
            file.append(rows)
        store.publish(METRICS, file.complete())


def batches(store: Store, columns: list[str] = COMPACTED.names) -> Iterator[pa.Table]:
    """Read the rows of all committed shards in batches, by shard id and in the order of the shard.

    ``columns``: columns of ``COMPACTED``.
    """
    ids, digest = _parts(store)
    if _is_current(store, digest):
        with store.open_parquet(METRICS) as file:
            wanted = pa.schema([COMPACTED.field(name) for name in columns])
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield schema.conformed(pa.Table.from_batches([batch]), wanted)
    else:
        yield from (table.select(columns) for table in _tables(store, ids))


def _tables(store: Store, ids: list[str]) -> Iterator[pa.Table]:
    def rows(shard_id: str) -> pa.Table:
        table, _ = read_metrics(store, shard_id)
        ids = pa.repeat(shard_id, table.num_rows)
        return pa.table([ids, *schema.conformed(table, schema.METRICS).columns], schema=COMPACTED)

    return map_in_order(rows, ids)


def _parts(store: Store) -> tuple[list[str], str]:
    """List the ids of committed shards, and compute a digest of them with sizes and etags."""
    state = [
        (entry.name.removesuffix(".parquet"), entry.bytes, entry.etag)
        for entry in store.list("metrics")
        if not entry.name.startswith("_")
    ]
    return [name for name, *_ in state], hashlib.sha256(repr(state).encode()).hexdigest()


def _is_current(store: Store, digest: str) -> bool:
    return store.exists(METRICS) and read_footer(store, METRICS).get(PARTS) == digest
