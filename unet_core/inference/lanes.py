"""The lanes of a device: batches side by side, for one shard after the other; and how long they
stood still.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from unet_core.inference.engine import Batch, Engine, TileResult
from unet_core.runs.timings import Seconds

BatchResult = tuple[list[TileResult], float]
"""What a batch gave, and the seconds on its lane."""


class Lanes:
    """Shards take turns in the order in which they came: the oldest shard of an actor is the one
    that is watched, so it must not wait for a younger one.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(engine.lanes, thread_name_prefix="device")
        self._line: deque[object] = deque()
        """Shards that want the device; the first one has it."""
        self._changed = threading.Condition()
        self._running = 0
        """Lanes at work, for whatever shard."""
        self._ended = time.perf_counter()
        """When the last of them came to an end."""

    @property
    def idle(self) -> int:
        """Lanes that stand still."""
        return self._engine.lanes - self._running

    @contextlib.contextmanager
    def ticket(self) -> Iterator[object]:
        """A ticket in the line of those that will want the device."""
        ticket = object()
        with self._changed:
            self._line.append(ticket)
        try:
            yield ticket
        finally:
            self._leave(ticket)

    @contextlib.contextmanager
    def taken(self, ticket: object, seconds: Seconds) -> Iterator[None]:
        """The device, once all before have had it; notes how long it was free since then."""
        with self._changed:
            self._changed.wait_for(lambda: self._line[0] is ticket)
        if not self._running:
            free_s = time.perf_counter() - self._ended
            seconds.waiting_for_shard += self._engine.lanes * free_s
        try:
            yield
        finally:
            self._leave(ticket)

    def _leave(self, ticket: object) -> None:
        with self._changed:
            if ticket in self._line:
                self._line.remove(ticket)
            self._changed.notify_all()

    def submit(self, batch: Future[Batch]) -> Future[BatchResult]:
        """Run a batch once it is there, after those submitted before."""
        return self._threads.submit(self._run, batch)

    def _run(self, batch: Future[Batch]) -> BatchResult:
        ready = batch.result()
        start = time.perf_counter()
        with self._changed:
            self._running += 1
        try:
            return self._engine.run(ready), time.perf_counter() - start
        finally:
            with self._changed:
                self._running -= 1
                self._ended = time.perf_counter()
