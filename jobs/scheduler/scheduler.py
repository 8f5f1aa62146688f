"""Which shard goes to which worker, and what a failed attempt means. Knows nothing of Ray.

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

from unet_core.config.predict import ErrorsConfig
from unet_core.config.sections import StorageConfig
from unet_core.inputs.shards import Shard
from unet_core.runs.timings import ShardResult

PREFETCH = 2
MAX_ISOLATIONS = 2
ISOLATION_SLACK = 10.0
"""Factor on the stall timeout while a shard is isolated: its child process loads the model first,
and each image may take as long as a whole attempt."""
HEARTBEAT_S = 2.0
"""How often actors are asked how far they are."""
OVERHEAD_BYTES = 2**20
"""What a shard costs besides its bytes."""


@dataclass(frozen=True)
class Attempt:
    """One try at one shard."""

    shard: Shard
    number: int
    alone: bool
    isolation_timeout_s: float | None = None
    """Try each image by itself first, for at most so long."""


@dataclass(frozen=True)
class Ready:
    """An actor can take shards."""

    actor: str


@dataclass(frozen=True)
class Done:
    """An actor committed a shard."""

    actor: str
    shard_id: str
    result: ShardResult


@dataclass(frozen=True)
class Died:
    """An actor is gone; the workers place another if one is wanted."""

    actor: str
    reason: str
    node_lost: bool = False
    """Its node went, so no shard is to blame."""
    is_overdue: bool = False
    """It was ended because its attempt did not."""


@dataclass(frozen=True)
class Heartbeat:
    """How far the shards of an actor are."""

    actor: str
    steps: dict[str, int]
    """By shard under way: images decoded and batches done, so far."""


@dataclass(frozen=True)
class Refused:
    """A shard cannot be done; the actor lives."""

    actor: str
    shard_id: str
    reason: str


Event = Ready | Done | Refused | Heartbeat | Died


@dataclass
class StallTimeout:
    """How long an attempt may stand still: as long as storage may take until it gives up, a while
    beyond that, and the time that a whole shard of its size takes at the rate of this run.
    """

    least_s: float
    seconds: float = 0.0
    bytes: int = 0

    def limit_s(self, shard: Shard) -> float:
        """After so long without a step an attempt counts as hanging."""
        rate = self.seconds / self.bytes if self.bytes else 0.0
        return self.least_s + rate * (shard.bytes + OVERHEAD_BYTES)

    def learn(self, shard: Shard, seconds: float) -> None:
        """An attempt came to an end after so long."""
        self.seconds += seconds
        self.bytes += shard.bytes + OVERHEAD_BYTES


@dataclass
class Progress:
    """Over the oldest attempt of an actor."""

    since: float
    """When it became that."""
    heard: float
    """When it made its last step."""
    steps: int = 0
    """How far it was then."""


@dataclass
class Scheduler:
    """The shards of a plan on their way from waiting to committed."""

    waiting: deque[Shard]
    max_attempts: int
    stall_timeout: StallTimeout
    clock: Callable[[], float] = time.monotonic
    retry_alone: deque[Shard] = field(default_factory=deque)
    isolating: deque[Shard] = field(default_factory=deque)
    in_flight: dict[str, list[Attempt]] = field(default_factory=dict)
    """By actor, the oldest first; an actor that is absent here is not ready."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Shard id → why nobody will try it again in this session."""
    failure_count: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    is_stopped: bool = False
    failed_starts: int = 0
    """Actors that died before they were ready, one after the other, while none was."""
    _isolation_counts: Counter[str] = field(default_factory=Counter)
    _progress: dict[str, Progress] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: list[Shard], errors: ErrorsConfig, storage: StorageConfig) -> "Scheduler":
        """All shards of a plan waiting, the largest first."""
        waiting = deque(sorted(plan, key=lambda shard: (-shard.bytes, shard.shard_id)))
        least_s = max(storage.deadline_s + errors.stall_s, 3 * HEARTBEAT_S)
        return cls(waiting, errors.max_attempts, StallTimeout(least_s))

    @property
    def is_done(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self.open

    @property
    def open(self) -> int:
        """Shards that are neither committed nor set aside."""
        return self._left + sum(map(len, self.in_flight.values()))

    @property
    def useful(self) -> int:
        """How many actors can have something to do: what an actor holds, no other can begin."""
        return self._left + sum(map(bool, self.in_flight.values()))

    @property
    def _left(self) -> int:
        return len(self.waiting) + len(self.retry_alone) + len(self.isolating)

    def has_use_for(self, actor: str) -> bool:
        """Whether an actor holds a shard or may get one."""
        return bool(self._left or self.in_flight[actor])

    def stop(self) -> None:
        """Begin nothing any more; what is under way comes to its end."""
        self.is_stopped = True
        for line in (self.waiting, self.retry_alone, self.isolating):
            line.clear()

    def next_for(self, actor: str, actors: int = 0) -> Attempt | None:
        """What a ready actor should begin now, if anything; of ``actors``, some may be starting."""
        held = self.in_flight[actor]
        if any(attempt.alone for attempt in held) or len(held) >= PREFETCH:
            return None
        if held and len(self.waiting) < max(actors, len(self.in_flight)):
            return None
        if not held and self.isolating:
            return self._begin(actor, self.isolating.popleft(), alone=True, isolating=True)
        if not held and self.retry_alone:
            return self._begin(actor, self.retry_alone.popleft(), alone=True)
        if self.waiting:
            return self._begin(actor, self.waiting.popleft(), alone=False)
        return None

    def note(self, event: Ready | Refused | Heartbeat | Died) -> None:
        """Something happened to an actor; commits are told to ``done``."""
        match event:
            case Ready(actor):
                self.in_flight[actor] = []
                self.failed_starts = 0
            case Refused(actor, shard_id, reason):  # only the actor could tell
                self._take_back(actor, shard_id)
                self.set_aside[shard_id] = reason
            case Heartbeat(actor, steps) if held := self.in_flight.get(actor):
                progress, now = self._progress[actor], steps.get(held[0].shard.shard_id, 0)
                if now != progress.steps:
                    progress.steps, progress.heard = now, self.clock()
            case Died():
                self.died(event)

    def done(self, actor: str, shard_id: str) -> Attempt:
        """A shard was committed; returns the attempt that did it."""
        since = self._progress[actor].since
        attempt, was_oldest = self._take_back(actor, shard_id)
        if was_oldest and attempt.isolation_timeout_s is None:
            self.stall_timeout.learn(attempt.shard, self.clock() - since)
        return attempt

    def exclude_pause(self, seconds: float) -> None:
        """Nobody was listened to for so long."""
        for progress in self._progress.values():
            progress.since += seconds
            progress.heard += seconds

    def overdue(self) -> Iterator[tuple[str, str]]:
        """Actors whose oldest attempt stands still, and what to say of it."""
        for actor, held in list(self.in_flight.items()):
            if not held:
                continue
            limit_s = self.stall_timeout.limit_s(held[0].shard)
            limit_s *= ISOLATION_SLACK if held[0].isolation_timeout_s is not None else 1.0
            if self.clock() - self._progress[actor].heard > limit_s:
                self._progress[actor].heard = self.clock()
                name = held[0].shard.uri or held[0].shard.shard_id
                yield actor, f"shard {name} has made no step for {limit_s:.0f} s"

    def died(self, event: Died) -> None:
        """Take back what a dead actor held, and judge it."""
        is_failed_start = event.actor not in self.in_flight and not event.node_lost
        held = self.in_flight.pop(event.actor, [])
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
                reason = f"its images were tried one by one, and even so: {event.reason}"
                self.set_aside[name] = reason
        elif event.node_lost:
            self.waiting.appendleft(shard)
        elif was_alone:
            self.failure_count[name] += self.max_attempts if event.is_overdue else 1
            is_due = self.failure_count[name] >= self.max_attempts
            (self.isolating if is_due else self.retry_alone).append(shard)
        else:
            self.retry_alone.append(shard)

    def _begin(self, actor: str, shard: Shard, alone: bool, isolating: bool = False) -> Attempt:
        self.attempts[shard.shard_id] += 1
        isolation_timeout_s = self.stall_timeout.limit_s(shard) if isolating else None
        attempt = Attempt(shard, self.attempts[shard.shard_id], alone, isolation_timeout_s)
        if not self.in_flight[actor]:
            self._progress[actor] = Progress(self.clock(), self.clock())
        self.in_flight[actor].append(attempt)
        return attempt

    def _take_back(self, actor: str, shard_id: str) -> tuple[Attempt, bool]:
        """The attempt, and whether it was the oldest; then the next one is."""
        held = self.in_flight[actor]
        place = next(n for n, a in enumerate(held) if a.shard.shard_id == shard_id)
        if place == 0:
            self._progress[actor] = Progress(self.clock(), self.clock())
        return held.pop(place), place == 0
