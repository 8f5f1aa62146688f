"""The worker of ``workers.count = "inline"``: one replica on threads of this process. No Ray."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch

from jobs.scheduler.events import (
    MAX_SHARDS_PER_WORKER,
    Attempt,
    Done,
    Event,
    Heartbeat,
    Ready,
    Refused,
)
from unet_core.errors import ShardError
from unet_core.inference.replica import Replica
from unet_core.inference.shard_segmenter import ShardSegmenter
from unet_core.runs.compute import RecordRun, ReplicaSpec
from unet_core.runs.timings import ShardResult

log = logging.getLogger(__name__)

NAME = "inline"  # of the worker, in timings and logs
WAIT_S = 0.5  # between heartbeats
STOP_S = 30.0  # limit for shards under way to notice that they are given up


class InlineWorker:
    """A single worker in this process, closed at the end of the run."""

    def __init__(
        self, spec: ReplicaSpec, on_image: Callable[[], None], record_run: RecordRun
    ) -> None:
        self._torch_threads = torch.get_num_threads()  # Engine.share_cores sets 1
        replica = Replica(spec)
        self._segmenter = ShardSegmenter(replica, record_run(replica.probe()), on_image)
        self._threads = ThreadPoolExecutor(MAX_SHARDS_PER_WORKER, thread_name_prefix="shard")
        self._futures: dict[Future[ShardResult], Attempt] = {}
        self._is_new = True

    def events(self) -> Iterator[Event]:
        """Yield Ready once, then heartbeats, commits and refusals; other errors are raised."""
        if self._is_new:
            self._is_new = False
            yield Ready(NAME)
            return
        yield Heartbeat(NAME, dict(self._segmenter.steps))
        done, _ = wait(self._futures, timeout=WAIT_S, return_when=FIRST_COMPLETED)
        for future in done:
            attempt = self._futures.pop(future)
            try:
                yield Done(NAME, attempt, future.result())
            except ShardError as error:
                yield Refused(NAME, attempt, str(error))

    def submit(self, worker: str, attempt: Attempt) -> None:
        """Begin a shard on a thread of its own."""
        self._futures[self._threads.submit(self._segmenter.segment, attempt.shard)] = attempt

    def scale(self, useful_workers: int, open_shards: int) -> int:
        """Return 1: there is one worker."""
        return 1

    def stop_idle(self, worker: str) -> None:
        """Do nothing: the worker ends with the run."""

    def kill_stalled(self, worker: str, reason: str) -> None:
        """Warn: a thread cannot be ended, but a worker process can."""
        log.warning("%s; where it hangs for ever, stop, and continue with workers.count=1, which "
                    "gives it a process that can be ended", reason)  # fmt: skip

    def close(self) -> None:
        """Cancel shards that have not begun and wait ``STOP_S`` for those in flight."""
        self._segmenter.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        _, hanging = wait(self._futures, timeout=STOP_S)
        for future in hanging:
            log.warning("shard %s does not stop", self._futures[future].shard.name)
        torch.set_num_threads(self._torch_threads)
