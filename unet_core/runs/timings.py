"""Timings: the stages of an attempt measured by a stopwatch, and the ``timings/`` of a run."""

import contextlib
import datetime
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from unet_core.concurrency import map_in_order
from unet_core.errors import StoreError
from unet_core.metrics import Totals, added
from unet_core.storage.parquet_files import decode_parquet, encode_parquet
from unet_core.storage.store import Store

FLUSH_S = 60.0  # a driver that dies loses the timings of a minute, and a day makes 1,440 files
DEVICE = {
    "busy": "device",
    "waiting for a shard": "waiting_for_shard",
    "waiting for reading": "waiting_for_reading",
    "waiting for decoding": "waiting_for_decoding",
}
"""States of a device, and the field of ``Seconds`` that measures each."""


@dataclass(frozen=True)
class Seconds:
    """Time of an attempt by stage, summed over threads and over the lanes of the device."""

    reading: float = 0.0
    decoding: float = 0.0
    device: float = 0.0
    encoding: float = 0.0
    writing: float = 0.0
    waiting_for_shard: float = 0.0
    """Lanes were idle and no shard had the device; for the first one, since the actor began."""
    waiting_for_reading: float = 0.0
    """Lanes were idle while images were read."""
    waiting_for_decoding: float = 0.0
    """Lanes were idle while images were decoded and cut into tiles."""

    def __add__(self, other: "Seconds") -> "Seconds":
        return added(self, other)

    @property
    def at_device(self) -> float:
        """Seconds in which lanes worked or waited."""
        return float(sum(getattr(self, stage) for stage in DEVICE.values()))

    @property
    def shares(self) -> dict[str, float]:
        """Share of each state of the device; empty if no time was measured."""
        total = self.at_device
        return {what: getattr(self, stage) / total for what, stage in DEVICE.items() if total}

    @classmethod
    def of_table(cls, table: pa.Table) -> "Seconds":
        """Sum of the rows of a table of ``TIMINGS``."""
        return cls(**{s.name: pc.sum(table[f"{s.name}_s"]).as_py() or 0.0 for s in fields(cls)})


class Stopwatch:
    """Measures the stages of an attempt on all its threads: ``with stopwatch("reading"): …``."""

    def __init__(self) -> None:
        self.threads: Counter[str] = Counter()
        """Number of threads that are in each stage now."""
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, stage: str, inside: str = "") -> Iterator[None]:
        """Count a block, or the calls of a function, as a stage of ``Seconds``; a stage that it
        lies ``inside`` of is paused.
        """
        self._switch(inside, stage)
        try:
            yield
        finally:
            self._switch(stage, inside)

    def _switch(self, before: str, after: str) -> None:
        now = time.perf_counter()
        with self._lock:
            for stage, step in ((before, -1), (after, 1)):
                self.threads[stage] += step
                self._spent[stage] -= step * now

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        with self._lock:
            self._spent[stage] += seconds

    @property
    def seconds(self) -> Seconds:
        """Sums so far; a stage must have been left by all threads."""
        return Seconds(**{stage: spent for stage, spent in self._spent.items() if stage})


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
"""``whole_s``: wall time from an attempt's first read to its commit; the seconds of stages are sums
over threads, and attempts of one actor overlap.
"""


@dataclass(frozen=True)
class ShardResult:
    """Summary of a committed shard, small enough to be sent to the driver."""

    shard_id: str
    totals: Totals
    seconds: Seconds
    whole_s: float = 0.0
    """Wall time from the first read to the commit."""


class TimingsLog:
    """Collects timings and writes them to ``timings/`` about once a minute, and at the end of a
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
        """Collect the timings of one committed attempt."""
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
        """Write what was collected, if anything was."""
        if self._rows:
            data = encode_parquet(pa.Table.from_pylist(self._rows, schema=TIMINGS))
            self._store.publish(f"timings/{self._start}-{self._files:05d}.parquet", data)
            self._files += 1
        self._rows, self._flushed = [], time.monotonic()


def read_timings(store: Store, files: int) -> pa.Table:
    """Rows of the newest ``files`` files of a run's ``timings/``, oldest first."""
    names = [f"timings/{entry.name}" for entry in store.list("timings")][-files:]
    tables = map_in_order(lambda name: decode_parquet(store.read(name)), names)
    return pa.concat_tables([TIMINGS.empty_table(), *tables])


def recent_seconds(store: Store) -> Seconds:
    """Sum over about the last hour in which a run was at work."""
    return Seconds.of_table(read_timings(store, 60))  # a file a minute
