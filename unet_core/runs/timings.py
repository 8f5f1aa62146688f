"""Where the time of each attempt went, and what an attempt reports."""

import datetime
import time
import uuid
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from unet_core.concurrency import map_in_order
from unet_core.errors import StoreError
from unet_core.metrics import Totals, added
from unet_core.storage.parquet_files import parquet_of, table_of
from unet_core.storage.store import Store

FLUSH_S = 60.0
RECENT = 60
"""Files that make about an hour."""
DEVICE = {
    "busy": "device",
    "waiting for a shard": "waiting_for_shard",
    "waiting for reading": "waiting_for_reading",
    "waiting for decoding": "waiting_for_decoding",
}
"""What a device does, and which of ``Seconds`` that is."""


@dataclass
class Seconds:
    """Where a shard's time went, summed over threads, and over the lanes of the device."""

    reading: float = 0.0
    decoding: float = 0.0
    device: float = 0.0
    encoding: float = 0.0
    writing: float = 0.0
    waiting_for_shard: float = 0.0
    """The device was free and no shard was at hand; for the first one, since the actor began."""
    waiting_for_reading: float = 0.0
    """The device was free because bytes of the next image were on their way."""
    waiting_for_decoding: float = 0.0
    """The device was free because the next image was being decoded."""

    def __add__(self, other: "Seconds") -> "Seconds":
        return added(self, other)

    @property
    def at_device(self) -> float:
        """Seconds in which the device worked or waited."""
        return float(sum(getattr(self, stage) for stage in DEVICE.values()))

    @property
    def shares(self) -> dict[str, float]:
        """What the device did with its time, as shares; empty if there was none."""
        total = self.at_device
        return {what: getattr(self, stage) / total for what, stage in DEVICE.items() if total}

    @classmethod
    def of_table(cls, table: pa.Table) -> "Seconds":
        """The sums of rows as ``TIMINGS``."""
        return cls(**{s.name: pc.sum(table[f"{s.name}_s"]).as_py() or 0.0 for s in fields(cls)})


TIMINGS = pa.schema(
    [
        ("shard_id", pa.string()),
        ("attempt", pa.int32()),
        ("actor", pa.string()),
        ("finished", pa.timestamp("ms", tz="UTC")),
        ("images", pa.int64()),
        ("pixels", pa.int64()),
        *((f"{stage.name}_s", pa.float64()) for stage in fields(Seconds)),
        ("whole_s", pa.float64()),
    ]
)
"""``whole_s``: by the clock, from an attempt's first read to its commit; the seconds of stages are
sums over threads, and attempts of one actor overlap.
"""


@dataclass(frozen=True)
class ShardResult:
    """A committed shard, small enough for any wire."""

    shard_id: str
    totals: Totals
    seconds: Seconds
    whole_s: float = 0.0
    """By the clock, from the first read to the commit."""


class TimingsLog:
    """Collects results and writes them to ``timings/`` about once a minute, and at the end of a
    ``with`` block.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._start = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}{uuid.uuid4().hex[:6]}"
        self._rows: list[dict[str, Any]] = []
        self._files = 0
        self._flushed = time.monotonic()

    def __enter__(self) -> "TimingsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush, but not into storage that has just failed: its second error would hide the first,
        after another deadline.
        """
        if kind is None or not issubclass(kind, StoreError):
            self.flush()

    def add(self, result: ShardResult, attempt: int, actor: str) -> None:
        """Note one committed attempt."""
        self._rows.append(
            {
                "shard_id": result.shard_id,
                "attempt": attempt,
                "actor": actor,
                "finished": datetime.datetime.now(datetime.UTC),
                "images": result.totals.images_seen,
                "pixels": result.totals.pixels,
                **{f"{stage}_s": seconds for stage, seconds in vars(result.seconds).items()},
                "whole_s": result.whole_s,
            }
        )
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what was collected; nothing collected writes nothing."""
        if self._rows:
            data = parquet_of(pa.Table.from_pylist(self._rows, schema=TIMINGS))
            self._store.publish(f"timings/{self._start}-{self._files:05d}.parquet", data)
            self._files += 1
        self._rows, self._flushed = [], time.monotonic()


def read_timings(store: Store, files: int) -> pa.Table:
    """What the newest so many files of a run's ``timings/`` say, in their order."""
    names = [f"timings/{entry.name}" for entry in store.list("timings")][-files:]
    tables = map_in_order(lambda name: table_of(store.read(name)), names)
    return pa.concat_tables([TIMINGS.empty_table(), *tables])


def recent_seconds(store: Store) -> Seconds:
    """The sums of about the last hour that a run was at work."""
    return Seconds.of_table(read_timings(store, RECENT))
