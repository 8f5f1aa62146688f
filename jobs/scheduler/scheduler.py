"""Assignment of shards to workers, and the handling of failed attempts. No Ray.

A worker holds at most two shards: one computes while the next is read. Near the end of a run each
gets one instead, including workers that are still starting. When a worker dies with two shards in
flight, either may be the cause, so no failure is counted: both are retried alone. Only the death of
a worker with a single shard counts as a failure of that shard. After ``max_attempts`` failures, or
when it stalls alone, a shard is isolated: its images are tried one by one in a child process, and
the poison images become failed rows. A shard that still crashes workers is set aside.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from jobs.scheduler.events import Attempt, Died, Heartbeat, Ready, Refused
from unet_core.config.predict import ErrorsConfig
from unet_core.config.sections import StorageConfig
from unet_core.inputs.shards import Shard

MAX_SHARDS_PER_WORKER = 2
"""Shards in flight on a worker: one computes while the next is read."""
MAX_ISOLATIONS = 2
"""Attempts to isolate a shard: the first worker may have died for another reason."""
ISOLATION_SLACK = 10.0
"""Factor on the stall timeout while a shard is isolated: its child process loads the model first,
and each image may take as long as a whole attempt."""
HEARTBEAT_S = 2.0
"""Seconds between two requests for the progress of busy workers."""
OVERHEAD_BYTES = 2**20
"""Cost of a shard besides its bytes, so that the rate of tiny shards is not absurd."""


@dataclass
class StallTimeout:
    """Seconds without a step after which an attempt is overdue: the storage deadline, plus
    ``errors.stall_s``, plus the time that a shard of its size takes at the rate of this run.
    """

    least_s: float
    seconds: float = 0.0
    bytes: int = 0

    def limit_s(self, shard: Shard) -> float:
        """Timeout for one attempt at a shard."""
        rate = self.seconds / self.bytes if self.bytes else 0.0
        return self.least_s + rate * (shard.bytes + OVERHEAD_BYTES)

    def record_duration(self, shard: Shard, seconds: float) -> None:
        """Add a completed attempt to the rate."""
        self.seconds += seconds
        self.bytes += shard.bytes + OVERHEAD_BYTES


@dataclass
class AttemptProgress:
    """Progress of the oldest attempt of a worker."""

    started_at: float
    """Time at which the attempt became the oldest."""
    last_step_at: float
    """Time of its last step."""
    steps: int = 0
    """Steps made at that time."""


@dataclass
class Scheduler:
    """State of the uncommitted shards of a run, until each is committed or set aside."""

    waiting: deque[Shard]
    max_attempts: int
    stall_timeout: StallTimeout
    clock: Callable[[], float] = time.monotonic
    retry_alone: deque[Shard] = field(default_factory=deque)
    isolating: deque[Shard] = field(default_factory=deque)
    in_flight: dict[str, list[Attempt]] = field(default_factory=dict)
    """Attempts by ready worker, the oldest first."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Reason by id of each shard that this session will not try again."""
    failure_count: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    is_stopped: bool = False
    failed_starts: int = 0
    """Workers in a row that died before they were ready, while no other was ready."""
    _isolation_counts: Counter[str] = field(default_factory=Counter)
    _progress: dict[str, AttemptProgress] = field(default_factory=dict)

    @classmethod
    def of(cls, left: list[Shard], errors: ErrorsConfig, storage: StorageConfig) -> "Scheduler":
        """Create a scheduler with all shards waiting, the largest first."""
        waiting = deque(sorted(left, key=lambda shard: (-shard.bytes, shard.shard_id)))
        least_s = max(storage.deadline_s + errors.stall_s, 3 * HEARTBEAT_S)
        return cls(waiting, errors.max_attempts, StallTimeout(least_s))

    @property
    def open(self) -> int:
        """Shards that are neither committed nor set aside."""
        return self._left + sum(map(len, self.in_flight.values()))

    @property
    def max_useful_workers(self) -> int:
        """Number of workers that hold a shard or could get one."""
        return self._left + sum(map(bool, self.in_flight.values()))

    @property
    def _left(self) -> int:
        return len(self.waiting) + len(self.retry_alone) + len(self.isolating)

    def has_use_for(self, worker: str) -> bool:
        """Whether a worker holds a shard or may get one."""
        return bool(self._left or self.in_flight[worker])

    def stop(self) -> None:
        """Begin no further shard; those in flight are completed."""
        self.is_stopped = True
        for queue in (self.waiting, self.retry_alone, self.isolating):
            queue.clear()

    def next_for(self, worker: str, workers: int = 0) -> Attempt | None:
        """Take the next attempt for a ready worker; ``workers`` counts starting ones too."""
        held = self.in_flight[worker]
        if any(attempt.alone for attempt in held) or len(held) >= MAX_SHARDS_PER_WORKER:
            return None
        if held and len(self.waiting) < max(workers, len(self.in_flight)):
            return None
        for queue in (self.waiting,) if held else (self.isolating, self.retry_alone, self.waiting):
            if queue:
                return self._begin(worker, queue)
        return None

    def handle(self, event: Ready | Refused | Heartbeat | Died) -> None:
        """Handle an event other than ``Done``."""
        match event:
            case Ready(worker):
                self.in_flight[worker] = []
                self.failed_starts = 0
            case Refused(worker, shard_id, reason):
                self._remove_attempt(worker, shard_id)
                self.set_aside[shard_id] = reason
            case Heartbeat(worker, steps) if held := self.in_flight.get(worker):
                progress, now = self._progress[worker], steps.get(held[0].shard.shard_id, 0)
                if now != progress.steps:
                    progress.steps, progress.last_step_at = now, self.clock()
            case Died():
                self.died(event)

    def done(self, worker: str, shard_id: str) -> Attempt:
        """Record a commit; return the attempt that made it."""
        started_at = self._progress[worker].started_at
        attempt, was_oldest = self._remove_attempt(worker, shard_id)
        if was_oldest and attempt.isolation_timeout_s is None:
            self.stall_timeout.record_duration(attempt.shard, self.clock() - started_at)
        return attempt

    def exclude_pause(self, seconds: float) -> None:
        """Exclude a pause of the loop, during which no event was received, from all timeouts."""
        for progress in self._progress.values():
            progress.started_at += seconds
            progress.last_step_at += seconds

    def overdue(self) -> Iterator[tuple[str, str]]:
        """Yield each worker whose oldest attempt has made no step for too long, with the reason."""
        for worker, held in list(self.in_flight.items()):
            if not held:
                continue
            limit_s = self.stall_timeout.limit_s(held[0].shard)
            limit_s *= ISOLATION_SLACK if held[0].isolation_timeout_s is not None else 1.0
            if self.clock() - self._progress[worker].last_step_at > limit_s:
                self._progress[worker].last_step_at = self.clock()
                name = held[0].shard.uri or held[0].shard.shard_id
                yield worker, f"shard {name} has made no step for {limit_s:.0f} s"

    def died(self, event: Died) -> None:
        """Take back the shards of a dead worker and decide how each is retried."""
        is_failed_start = event.worker not in self.in_flight and not event.node_lost
        held = self.in_flight.pop(event.worker, [])
        if is_failed_start and not self.in_flight:
            self.failed_starts += 1
        for attempt in held if not self.is_stopped else ():
            self._retry_or_isolate(attempt, event, was_alone=len(held) == 1)

    def _retry_or_isolate(self, attempt: Attempt, event: Died, was_alone: bool) -> None:
        """Count a failure only if the shard was alone in flight; one that stalls alone is isolated
        at once. While isolated, the worker itself may have died for another reason.
        """
        shard, name = attempt.shard, attempt.shard.shard_id
        if attempt.isolation_timeout_s is not None:
            self._isolation_counts[name] += not event.node_lost
            if self._isolation_counts[name] < MAX_ISOLATIONS:
                self.isolating.append(shard)
            else:
                reason = f"it still crashes workers after its images were isolated: {event.reason}"
                self.set_aside[name] = reason
        elif event.node_lost:
            self.waiting.appendleft(shard)
        elif was_alone:
            self.failure_count[name] += self.max_attempts if event.is_overdue else 1
            is_due = self.failure_count[name] >= self.max_attempts
            (self.isolating if is_due else self.retry_alone).append(shard)
        else:
            self.retry_alone.append(shard)

    def _begin(self, worker: str, queue: deque[Shard]) -> Attempt:
        shard = queue.popleft()
        self.attempts[shard.shard_id] += 1
        timeout_s = self.stall_timeout.limit_s(shard) if queue is self.isolating else None
        alone = queue is not self.waiting
        attempt = Attempt(shard, self.attempts[shard.shard_id], alone, timeout_s)
        if not self.in_flight[worker]:
            self._progress[worker] = AttemptProgress(self.clock(), self.clock())
        self.in_flight[worker].append(attempt)
        return attempt

    def _remove_attempt(self, worker: str, shard_id: str) -> tuple[Attempt, bool]:
        """Remove an attempt of a worker; return it, and whether it was the oldest."""
        held = self.in_flight[worker]
        place = next(n for n, a in enumerate(held) if a.shard.shard_id == shard_id)
        if place == 0:
            self._progress[worker] = AttemptProgress(self.clock(), self.clock())
        return held.pop(place), place == 0
