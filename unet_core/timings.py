"""Where the time of each attempt went, and what an attempt reports."""

import datetime
import io
import time
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unet_core.metrics import Totals
from unet_core.schema import TIMINGS
from unet_core.store import Store

FLUSH_S = 60.0


@dataclass
class Seconds:
    """Where a shard's time went; decoding, device and encoding are summed over threads."""

    waiting: float = 0.0
    """The device, or one of its lanes, had nothing to do."""
    decoding: float = 0.0
    device: float = 0.0
    encoding: float = 0.0
    writing: float = 0.0


@dataclass(frozen=True)
class ShardResult:
    """A committed shard, small enough for any wire."""

    shard_id: str
    totals: Totals
    seconds: Seconds


class TimingsLog:
    """Collects results and writes them to ``timings/`` about once a minute."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._start = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}{uuid.uuid4().hex[:6]}"
        self._rows: list[dict[str, Any]] = []
        self._files = 0
        self._flushed = time.monotonic()

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
            }
        )
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what was collected; nothing collected writes nothing."""
        if self._rows:
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(self._rows, schema=TIMINGS), sink)
            self._store.publish(f"timings/{self._start}-{self._files:05d}.parquet", sink.getvalue())
            self._files += 1
        self._rows, self._flushed = [], time.monotonic()
