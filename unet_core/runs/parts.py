"""The two Parquet parts of a shard: masks first, metrics last. The metrics part is the commit."""

import contextlib
import hashlib
from collections.abc import Mapping
from itertools import compress
from typing import Any, BinaryIO, cast, get_args

import pyarrow as pa

from unet_core.concurrency import map_in_order
from unet_core.errors import Circumstance, CommitConflictError, NotFoundError, ParquetDamagedError
from unet_core.metrics import Totals
from unet_core.runs import schema
from unet_core.storage.parquet_files import (
    COMPRESSION,
    RowGroupWriter,
    decode_parquet,
    encode_parquet,
    whole_parquet,
)
from unet_core.storage.store import Store

ROW_GROUP_BYTES = 32 * 2**20
"""Bytes of masks per row group: what a reader holds in memory for one image."""
CIRCUMSTANTIAL = frozenset(get_args(Circumstance))
"""Error codes of failures that may differ between attempts."""
SETTLED = ("image_id", "status", "error_code", "height", "width")
"""Columns that must be equal in two attempts of which one had such failures."""


def masks_name(shard_id: str) -> str:
    """Name of a shard's masks part in the run folder."""
    return f"masks/{shard_id}.parquet"


def metrics_name(shard_id: str) -> str:
    """Name of a shard's metrics part in the run folder."""
    return f"metrics/{shard_id}.parquet"


class MasksPart(RowGroupWriter):
    """A masks part while it is being built."""

    def __init__(
        self, encoding: str, footer: Mapping[str, str], has_probabilities: bool = False
    ) -> None:
        columns = schema.masks(encoding, has_probabilities)
        small = [name for name in columns.names if name not in ("mask", "probabilities")]
        columns = columns.with_metadata({**(columns.metadata or {}), **footer})
        super().__init__(
            columns,
            ROW_GROUP_BYTES,
            lambda rows: pa.Table.from_pylist(rows, schema=columns),
            use_dictionary=small,
            write_statistics=small,
        )
        self._is_png = encoding == "png"

    def add(self, row: dict[str, Any]) -> None:
        """Append one mask window; ``mask`` and ``probabilities`` are bytes."""
        size = len(row["mask"]) + len(row.get("probabilities", b""))
        if self._is_png:
            row = {**row, "mask": {"bytes": row["mask"], "path": None}}
        self.append(row, size)

    def finish(self) -> tuple[BinaryIO, str, int]:
        """The complete file with its SHA-256 and its size in bytes."""
        file = self.complete()
        file.seek(0)
        sha256 = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
        return file, sha256, file.tell()


def metrics_part(
    rows: list[dict[str, Any]], footer: Mapping[str, str], columns: pa.Schema = schema.METRICS
) -> bytes:
    """Encode a metrics part."""
    table = pa.Table.from_pylist(rows, schema=columns.with_metadata(dict(footer)))
    return encode_parquet(table, **COMPRESSION)


def commit(store: Store, shard_id: str, masks: BinaryIO, metrics: bytes) -> bytes:
    """Publish both parts, masks first; the metrics part, exclusive and last, is the commit.

    Returns the metrics part that counts: a committed shard is left unchanged. Raises
    CommitConflictError if its commit has other bytes than this one, unless they differ only in
    failures that may differ.
    """
    name = metrics_name(shard_id)
    if not store.exists(name):
        is_first = store.publish_exclusively(masks_name(shard_id), masks)
        if not is_first and not store.exists(name):
            store.publish(masks_name(shard_id), masks)  # left by an attempt that was not committed
        if store.publish_exclusively(name, metrics):
            return metrics
    kept = store.read(name)
    if kept != metrics:
        _require_its_masks(store, shard_id)
        if not _differ_only_by_failures(kept, metrics):
            raise CommitConflictError(
                f"shard {shard_id} is committed with other bytes than this attempt made; the input "
                f"or the environment changed: look at {store.uri(name)}, and run `unet-jobs verify`"
            )
    return kept


def _require_its_masks(store: Store, shard_id: str) -> None:
    """Remove a commit whose masks another attempt replaced just before it.

    Raises CommitConflictError if so; the same command segments the shard again.
    """
    _, footer = read_metrics(store, shard_id)
    sha256 = hashlib.sha256(store.read(masks_name(shard_id))).hexdigest()
    if footer.get("masks_sha256") != sha256:
        store.remove(metrics_name(shard_id))
        raise CommitConflictError(
            f"two attempts at shard {shard_id} had different failures at once, and its commit was "
            "taken back; run the same command again"
        )


def _differ_only_by_failures(kept: bytes, metrics: bytes) -> bool:
    """Whether two metrics parts differ only in images that circumstances failed in one of them."""
    both = [decode_parquet(part).to_pylist() for part in (kept, metrics)]
    uncertain = {
        row["image_id"] for rows in both for row in rows if row["error_code"] in CIRCUMSTANTIAL
    }
    # beside what failed, batches are composed otherwise, which may show in the last bits
    compared = SETTLED if uncertain else schema.METRICS.names
    mine, theirs = (
        [[row[name] for name in compared] for row in rows if row["image_id"] not in uncertain]
        for rows in both
    )
    return mine == theirs


def read_metrics(store: Store, shard_id: str) -> tuple[pa.Table, dict[str, str]]:
    """Read rows and footer of a metrics part.

    Raises ParquetDamagedError if it is not a whole Parquet file.
    """
    name = metrics_name(shard_id)
    return _opened(store.read(name), store.uri(name))


def _opened(part: bytes, uri: str) -> tuple[pa.Table, dict[str, str]]:
    with whole_parquet(uri):
        table = decode_parquet(part)
    return table, _footer(table.schema)


def _footer(columns: pa.Schema) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (columns.metadata or {}).items()}


def read_footer(store: Store, name: str) -> dict[str, str]:
    """Read the key-value metadata in the footer of a Parquet file."""
    with store.open_parquet(name) as file:
        return _footer(file.schema_arrow)


def read_columns(store: Store, shard_id: str, *columns: str) -> pa.Table:
    """Read some columns of a metrics part."""
    with store.open_parquet(metrics_name(shard_id)) as file:
        return file.read(columns=list(columns))


def list_shard_ids(store: Store, folder: str) -> set[str]:
    """List the ids of shards that have their part in a folder. One listing."""
    return {
        entry.name.removesuffix(".parquet")
        for entry in store.list(folder)
        if not entry.name.startswith("_")
    }


def current_ids(run: Store, store: Store, folder: str) -> set[str]:
    """List the ids of shards whose file in ``folder`` was made from the run's present masks.

    A shard with failed images may have been segmented again since.
    """

    def is_current(shard_id: str) -> bool:
        now = masks_sha256(run, metrics_name(shard_id))
        return now is not None and now == masks_sha256(store, f"{folder}/{shard_id}.parquet")

    ids = list_shard_ids(store, folder)
    return set(compress(ids, map_in_order(is_current, ids)))


def masks_sha256(store: Store, name: str) -> str | None:
    """Read from a file's footer the digest of the masks part it was made from; None without one."""
    with contextlib.suppress(NotFoundError, ParquetDamagedError):
        return read_footer(store, name).get("masks_sha256")
    return None


def read_totals(store: Store, shard_id: str) -> Totals:
    """Read the totals of a committed shard."""
    name = metrics_name(shard_id)
    return compute_totals(store.read(name), store.uri(name))


def compute_totals(part: bytes, uri: str) -> Totals:
    """Compute the totals of a metrics part."""
    rows, footer = _opened(part, uri)
    if "images_seen" not in footer:
        raise ParquetDamagedError(f"{uri}: not a metrics part: it counts no images")
    return Totals.of_rows(rows, int(footer["images_seen"]))
