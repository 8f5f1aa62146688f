"""Assignment of shards to workers, and the handling of failed attempts. No Ray.

A worker holds at most two shards: one computes while the next is read. Near the end of a run each
gets one instead, including workers that are still starting. When a worker dies with two shards in
flight, either may be the cause, so no failure is counted: both are retried alone. Only the death of
a worker with a single shard counts as a failure of that shard. After ``max_attempts`` failures, or
when it stalls alone, a shard is isolated: its images are tried one by one in a child process, and
the poison images become failed rows. A shard that still crashes workers is set aside.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from jobs.scheduler.events import (
    HEARTBEAT_S,
    MAX_SHARDS_PER_WORKER,
    Attempt,
    Died,
    Done,
    Event,
    Heartbeat,
    Ready,
    Refused,
)
from unet_core.config.predict import ErrorsConfig
from unet_core.config.sections import StorageConfig
from unet_core.inputs.shards import Shard

MAX_ISOLATIONS = 2
"""Attempts to isolate a shard: the first worker may have died for another reason."""
ISOLATION_SLACK = 10.0
"""Factor on the stall timeout while a shard is isolated: its child process loads the model first,
and each image may take as long as a whole attempt."""
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
        rate = self.seconds / max(1, self.bytes)
        return self.least_s + rate * (shard.bytes + OVERHEAD_BYTES)

    def record_duration(self, shard: Shard, seconds: float) -> None:
        """Add a completed attempt to the rate."""
        self.seconds += seconds
        self.bytes += shard.bytes + OVERHEAD_BYTES


@dataclass
class Worker:
    """A ready worker: its attempts in flight, and the progress of the oldest of them."""

    held: list[Attempt] = field(default_factory=list)
    """Attempts in flight, the oldest first."""
    oldest_since: float = 0.0
    """Time at which the oldest attempt became the oldest."""
    last_step_at: float = 0.0
    """Time of its last step."""
    steps: int = 0
    """Steps made at that time."""

    @property
    def can_hold_another(self) -> bool:
        """True if a further shard may be in flight besides those held."""
        return len(self.held) < MAX_SHARDS_PER_WORKER and not any(a.is_alone for a in self.held)

    def add(self, attempt: Attempt, now: float) -> None:
        """Hold a further attempt."""
        self.held.append(attempt)
        if len(self.held) == 1:
            self._watch_oldest(now)

    def remove(self, attempt: Attempt, now: float) -> None:
        """Forget an attempt that ended."""
        if attempt == self.held[0]:
            self._watch_oldest(now)
        self.held.remove(attempt)

    def record_steps(self, steps: dict[str, int], now: float) -> None:
        """Note whether the oldest attempt has made a step; ``steps`` are counted by shard id."""
        found = steps.get(self.held[0].shard.shard_id, 0) if self.held else self.steps
        if found != self.steps:
            self.steps, self.last_step_at = found, now

    def _watch_oldest(self, now: float) -> None:
        self.oldest_since, self.last_step_at, self.steps = now, now, 0


@dataclass
class ShardHistory:
    """Number of attempts at a shard, and how they ended."""

    attempts: int = 0
    failures: int = 0
    """Deaths of workers that held this shard alone."""
    isolations: int = 0
    """Deaths of workers while the shard's images were isolated."""


@dataclass
class Scheduler:
    """State of the uncommitted shards of a run, until each is committed or set aside.

    ``handle`` takes every event; ``overdue``, ``assign`` and ``release_idle`` say what to do next,
    and record it as done.
    """

    waiting: deque[Shard]
    max_attempts: int
    stall_timeout: StallTimeout
    clock: Callable[[], float] = time.monotonic
    retry_alone: deque[Shard] = field(default_factory=deque)
    isolating: deque[Shard] = field(default_factory=deque)
    workers: dict[str, Worker] = field(default_factory=dict)
    """Ready workers by name."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Reason by id of each shard that this session will not try again."""
    history: defaultdict[str, ShardHistory] = field(
        default_factory=lambda: defaultdict(ShardHistory)
    )
    is_stopped: bool = False
    failed_starts: int = 0
    """Workers in a row that died before they were ready, while no other was ready."""

    @classmethod
    def of(cls, left: list[Shard], errors: ErrorsConfig, storage: StorageConfig) -> "Scheduler":
        """Create a scheduler with all shards waiting, the largest first."""
        waiting = deque(sorted(left, key=lambda shard: (-shard.bytes, shard.shard_id)))
        least_s = max(storage.deadline_s + errors.stall_s, 3 * HEARTBEAT_S)
        return cls(waiting, errors.max_attempts, StallTimeout(least_s))

    @property
    def open_shards(self) -> int:
        """Shards that are neither committed nor set aside."""
        return self._queued + sum(len(worker.held) for worker in self.workers.values())

    @property
    def max_useful_workers(self) -> int:
        """Number of workers that hold a shard or could get one."""
        return self._queued + sum(bool(worker.held) for worker in self.workers.values())

    @property
    def _queued(self) -> int:
        return len(self.waiting) + len(self.retry_alone) + len(self.isolating)

    def stop(self) -> None:
        """Begin no further shard; those in flight are completed."""
        self.is_stopped = True
        for queue in (self.waiting, self.retry_alone, self.isolating):
            queue.clear()

    def handle(self, event: Event) -> None:
        """Update the state for one event."""
        match event:
            case Ready(name):
                self.workers[name] = Worker()
                self.failed_starts = 0
            case Heartbeat(name, steps) if worker := self.workers.get(name):
                worker.record_steps(steps, self.clock())
            case Done(name, attempt):
                worker, now = self.workers[name], self.clock()
                if attempt == worker.held[0] and not attempt.is_isolation:
                    self.stall_timeout.record_duration(attempt.shard, now - worker.oldest_since)
                worker.remove(attempt, now)
            case Refused(name, attempt, reason):
                self.workers[name].remove(attempt, self.clock())
                self.set_aside[attempt.shard.shard_id] = reason
            case Died(name) if name in self.workers:
                held = self.workers.pop(name).held
                for attempt in held if not self.is_stopped else ():
                    self._retry_or_isolate(attempt, event, was_alone=len(held) == 1)
            case Died(node_lost=False) if not self.workers:
                self.failed_starts += 1

    def exclude_pause(self, seconds: float) -> None:
        """Exclude a pause of the loop, during which no event was received, from all timeouts."""
        for worker in self.workers.values():
            worker.oldest_since += seconds
            worker.last_step_at += seconds

    def overdue(self) -> Iterator[tuple[str, str]]:
        """Yield each worker whose oldest attempt has made no step for too long, with the reason;
        the same one again only after another timeout.
        """
        for name, worker in [item for item in self.workers.items() if item[1].held]:
            oldest = worker.held[0]
            limit_s = self.stall_timeout.limit_s(oldest.shard)
            limit_s *= ISOLATION_SLACK if oldest.is_isolation else 1.0
            if self.clock() - worker.last_step_at > limit_s:
                worker.last_step_at = self.clock()
                yield name, f"shard {oldest.shard.name} has made no step for {limit_s:.0f} s"

    def assign(self, started_workers: int = 0) -> Iterator[tuple[str, Attempt]]:
        """Begin attempts on ready workers, as many as each may hold; yields worker and attempt.
        ``started_workers`` counts those that are not ready yet, too.
        """
        for name, worker in self.workers.items():
            while (queue := self._queue_for(worker, started_workers)) is not None:
                yield name, self._begin(worker, queue)

    def release_idle(self) -> list[str]:
        """Remove the ready workers that no shard is left for; returns their names."""
        idle = [] if self._queued else [name for name, w in self.workers.items() if not w.held]
        for name in idle:
            del self.workers[name]
        return idle

    def _queue_for(self, worker: Worker, started_workers: int) -> deque[Shard] | None:
        """Return the queue of the next shard for a worker; None if it shall not get one."""
        if not worker.can_hold_another:
            return None
        if not worker.held:
            return next(filter(None, (self.isolating, self.retry_alone, self.waiting)), None)
        is_near_end = len(self.waiting) < max(started_workers, len(self.workers))
        return None if is_near_end else self.waiting

    def _begin(self, worker: Worker, queue: deque[Shard]) -> Attempt:
        shard = queue.popleft()
        history = self.history[shard.shard_id]
        history.attempts += 1
        timeout_s = self.stall_timeout.limit_s(shard) if queue is self.isolating else None
        attempt = Attempt(shard, history.attempts, queue is not self.waiting, timeout_s)
        worker.add(attempt, self.clock())
        return attempt

    def _retry_or_isolate(self, attempt: Attempt, event: Died, was_alone: bool) -> None:
        """Count a failure only if the shard was alone in flight; one that stalls alone is isolated
        at once. While isolated, the worker itself may have died for another reason.
        """
        shard, history = attempt.shard, self.history[attempt.shard.shard_id]
        if attempt.is_isolation:
            history.isolations += not event.node_lost
            if history.isolations < MAX_ISOLATIONS:
                self.isolating.append(shard)
            else:
                self.set_aside[shard.shard_id] = (
                    f"it still crashes workers after its images were isolated: {event.reason}"
                )
        elif event.node_lost:
            self.waiting.appendleft(shard)
        else:
            history.failures += was_alone
            is_due = was_alone and (event.is_overdue or history.failures >= self.max_attempts)
            (self.isolating if is_due else self.retry_alone).append(shard)
