"""Which shard goes to which actor, and what a failed attempt means. Knows nothing of Ray.

An actor holds at most two shards: one computes while the next is read; the last ones are shared out
instead, also with those that are still starting. When an actor dies with two shards, either may be
guilty, so neither is charged: both become suspects and run alone. Only a death alone counts. A
shard that has been charged ``max_attempts`` times, or that stands still alone, goes on trial: its
images are tried one by one, and the guilty ones become failed rows. One that cannot be done even so
is set aside.
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
MAX_TRIALS = 2
TRIAL_SLACK = 10.0
"""How many times as long as an attempt a trial may stand still: its child has to load the model,
and every image may take as long as an attempt."""
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
    trial_s: float | None = None
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
    blameless: bool = False
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
class Patience:
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
class Watch:
    """Over the oldest attempt of an actor."""

    since: float
    """When it became that."""
    heard: float
    """When it made its last step."""
    steps: int = 0
    """How far it was then."""


@dataclass
class Board:
    """The shards of a plan on their way from waiting to committed."""

    waiting: deque[Shard]
    max_attempts: int
    patience: Patience
    clock: Callable[[], float] = time.monotonic
    suspects: deque[Shard] = field(default_factory=deque)
    on_trial: deque[Shard] = field(default_factory=deque)
    in_flight: dict[str, list[Attempt]] = field(default_factory=dict)
    """By actor, the oldest first; an actor that is absent here is not ready."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Shard id → why nobody will try it again in this session."""
    charged: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    is_stopped: bool = False
    failed_starts: int = 0
    """Actors that died before they were ready, one after the other, while none was."""
    _trials: Counter[str] = field(default_factory=Counter)
    _watches: dict[str, Watch] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: list[Shard], errors: ErrorsConfig, storage: StorageConfig) -> "Board":
        """All shards of a plan waiting, the largest first."""
        waiting = deque(sorted(plan, key=lambda shard: (-shard.bytes, shard.shard_id)))
        least_s = max(storage.deadline_s + errors.stall_s, 3 * HEARTBEAT_S)
        return cls(waiting, errors.max_attempts, Patience(least_s))

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
        return len(self.waiting) + len(self.suspects) + len(self.on_trial)

    def has_use_for(self, actor: str) -> bool:
        """Whether an actor holds a shard or may get one."""
        return bool(self._left or self.in_flight[actor])

    def stop(self) -> None:
        """Begin nothing any more; what is under way comes to its end."""
        self.is_stopped = True
        for line in (self.waiting, self.suspects, self.on_trial):
            line.clear()

    def next_for(self, actor: str, actors: int = 0) -> Attempt | None:
        """What a ready actor should begin now, if anything; of ``actors``, some may be starting."""
        held = self.in_flight[actor]
        if any(attempt.alone for attempt in held) or len(held) >= PREFETCH:
            return None
        if held and len(self.waiting) < max(actors, len(self.in_flight)):
            return None
        if not held and self.on_trial:
            return self._begin(actor, self.on_trial.popleft(), alone=True, on_trial=True)
        if not held and self.suspects:
            return self._begin(actor, self.suspects.popleft(), alone=True)
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
                watch, now = self._watches[actor], steps.get(held[0].shard.shard_id, 0)
                if now != watch.steps:
                    watch.steps, watch.heard = now, self.clock()
            case Died():
                self.died(event)

    def done(self, actor: str, shard_id: str) -> Attempt:
        """A shard was committed; returns the attempt that did it."""
        since = self._watches[actor].since
        attempt, was_oldest = self._take_back(actor, shard_id)
        if was_oldest and attempt.trial_s is None:
            self.patience.learn(attempt.shard, self.clock() - since)
        return attempt

    def forgive(self, seconds: float) -> None:
        """Nobody was listened to for so long."""
        for watch in self._watches.values():
            watch.since += seconds
            watch.heard += seconds

    def overdue(self) -> Iterator[tuple[str, str]]:
        """Actors whose oldest attempt stands still, and what to say of it."""
        for actor, held in list(self.in_flight.items()):
            if not held:
                continue
            limit_s = self.patience.limit_s(held[0].shard)
            limit_s *= TRIAL_SLACK if held[0].trial_s is not None else 1.0
            if self.clock() - self._watches[actor].heard > limit_s:
                self._watches[actor].heard = self.clock()
                name = held[0].shard.uri or held[0].shard.shard_id
                yield actor, f"shard {name} has made no step for {limit_s:.0f} s"

    def died(self, event: Died) -> None:
        """Take back what a dead actor held, and judge it."""
        is_failed_start = event.actor not in self.in_flight and not event.blameless
        held = self.in_flight.pop(event.actor, [])
        if is_failed_start and not self.in_flight:
            self.failed_starts += 1
        for attempt in held if not self.is_stopped else ():
            self._judge(attempt, event, was_alone=len(held) == 1)

    def _judge(self, attempt: Attempt, event: Died, was_alone: bool) -> None:
        """A death alone counts, and what hangs alone is no accident; on trial the actor may have
        died for another reason.
        """
        shard, name = attempt.shard, attempt.shard.shard_id
        if attempt.trial_s is not None:
            self._trials[name] += not event.blameless
            if self._trials[name] < MAX_TRIALS:
                self.on_trial.append(shard)
            else:
                reason = f"its images were tried one by one, and even so: {event.reason}"
                self.set_aside[name] = reason
        elif event.blameless:
            self.waiting.appendleft(shard)
        elif was_alone:
            self.charged[name] += self.max_attempts if event.is_overdue else 1
            is_due = self.charged[name] >= self.max_attempts
            (self.on_trial if is_due else self.suspects).append(shard)
        else:
            self.suspects.append(shard)

    def _begin(self, actor: str, shard: Shard, alone: bool, on_trial: bool = False) -> Attempt:
        self.attempts[shard.shard_id] += 1
        trial_s = self.patience.limit_s(shard) if on_trial else None
        attempt = Attempt(shard, self.attempts[shard.shard_id], alone, trial_s)
        if not self.in_flight[actor]:
            self._watches[actor] = Watch(self.clock(), self.clock())
        self.in_flight[actor].append(attempt)
        return attempt

    def _take_back(self, actor: str, shard_id: str) -> tuple[Attempt, bool]:
        """The attempt, and whether it was the oldest; then the next one is."""
        held = self.in_flight[actor]
        place = next(n for n, a in enumerate(held) if a.shard.shard_id == shard_id)
        if place == 0:
            self._watches[actor] = Watch(self.clock(), self.clock())
        return held.pop(place), place == 0
