"""Lanes of a device: batches side by side for one shard after the other, and a sampler of why lanes
are idle.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from unet_core.inference.engine import Batch, Engine, TileResult
from unet_core.runs.timings import Stopwatch

SAMPLE_S = 0.02  # 50 samples a second take 0.3 % of a core


class Lanes:
    """Threads that run batches on the device. Shards get it in the order of ``ticket()``, as with a
    ticket lock: the oldest shard of a worker is watched for progress, so it must not wait for a
    younger one. The stopwatch of an attempt serves as its ticket.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(engine.lanes, thread_name_prefix="device")
        self._line: dict[Stopwatch, None] = {}
        """Tickets: stopwatches of the attempts that want the device; the first one may have it."""
        self._changed = threading.Condition()
        self._holder: Stopwatch | None = None
        """The attempt that feeds the lanes now."""
        self._all = Stopwatch()
        """Lanes at work for any attempt."""
        self._without_shard_s = 0.0
        """Idle seconds since the last shard, for the one that comes next."""
        threading.Thread(target=_sample, args=(weakref.ref(self),), daemon=True).start()

    @contextlib.contextmanager
    def ticket(self) -> Iterator[Stopwatch]:
        """Stand in the line for the device; yields the stopwatch of the attempt, its ticket."""
        ticket = Stopwatch()
        with self._changed:
            self._line[ticket] = None
        try:
            yield ticket
        finally:
            self._leave(ticket)

    @contextlib.contextmanager
    def taken(self, ticket: Stopwatch) -> Iterator[None]:
        """Have the device, once all earlier tickets have had it."""
        with self._changed:
            self._changed.wait_for(lambda: next(iter(self._line)) is ticket)
            ticket.add("waiting_for_shard", self._without_shard_s)
            self._holder, self._without_shard_s = ticket, 0.0
        try:
            yield
        finally:
            self._leave(ticket)

    def _leave(self, ticket: Stopwatch) -> None:
        with self._changed:
            self._line.pop(ticket, None)
            self._holder = None if self._holder is ticket else self._holder
            self._changed.notify_all()

    def submit(self, batch: Future[Batch], ticket: Stopwatch) -> Future[list[TileResult]]:
        """Run a batch once it is there, after those submitted before."""
        return self._threads.submit(self._run, batch, ticket)

    def _run(self, batch: Future[Batch], ticket: Stopwatch) -> list[TileResult]:
        ready = batch.result()
        with self._all("device"), ticket("device"):
            return self._engine.run(ready)

    def count_idle(self, seconds: float) -> None:
        """Charge the lanes that are idle now, for so many seconds, to what they wait for: a shard,
        or reading and decoding by the number of threads at each.
        """
        idle_s = seconds * (self._engine.lanes - self._all.threads["device"])
        with self._changed:
            if self._holder is None:
                self._without_shard_s += idle_s
                return
            reading, decoding = (self._holder.threads[at] for at in ("reading", "decoding"))
            share = reading / max(1, reading + decoding)
            self._holder.add("waiting_for_reading", idle_s * share)
            self._holder.add("waiting_for_decoding", idle_s * (1 - share))


def _sample(reference: weakref.ref[Lanes]) -> None:
    """Measure idle lanes for as long as they are used."""
    before = time.perf_counter()
    while (lanes := reference()) is not None:
        now = time.perf_counter()
        lanes.count_idle(now - before)
        before = now
        del lanes
        time.sleep(SAMPLE_S)
