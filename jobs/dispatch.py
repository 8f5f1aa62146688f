"""Which shard goes to which actor, and what a failed attempt means. Knows nothing of Ray.

An actor holds at most two shards: one computes while the next is read; the last ones are shared
out instead. When an actor dies with two shards, either may be guilty, so neither is charged: both
become suspects and run alone. Only a death alone counts, and a shard that has been charged
``max_attempts`` times is set aside.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from unet_core.compute import Compute
from unet_core.errors import WorkersError
from unet_core.inputs.shards import Shard
from unet_core.timings import ShardResult

PREFETCH = 2
MAX_ATTEMPTS = 2
MAX_FAILED_STARTS = 3


@dataclass(frozen=True)
class Attempt:
    """One try at one shard."""

    shard: Shard
    number: int
    alone: bool


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


@dataclass(frozen=True)
class Released:
    """An actor was ended because nothing was left for it."""

    actor: str


Event = Ready | Done | Died | Released


class Workers(Protocol):
    """Actors of any kind."""

    def probe(self) -> Compute:
        """The ``compute`` section of the first one that is loaded."""
        ...

    def configure(self, compute: Compute, footer: dict[str, str]) -> None:
        """Fix what the run has decided; only then does any become ready."""
        ...

    def submit(self, actor: str, attempt: Attempt) -> None:
        """Let a ready actor begin a shard."""
        ...

    def want(self, actors: int, shards: int) -> None:
        """So many shards are open, and at most so many actors can have one."""
        ...

    def release(self, actor: str) -> None:
        """End an actor that nothing is left for; somebody else may need its GPU."""
        ...

    def events(self) -> Iterator[Event]:
        """Wait a moment and give what happened; an endless loop calls this.

        Raises whatever error of this project an actor met: such errors stop a run.
        """
        ...


@dataclass
class Board:
    """The shards of a plan on their way from waiting to committed."""

    waiting: deque[Shard]
    max_attempts: int = MAX_ATTEMPTS
    suspects: deque[Shard] = field(default_factory=deque)
    in_flight: dict[str, list[Attempt]] = field(default_factory=dict)
    """By actor; an actor that is absent here is not ready."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Shard id → why nobody will try it again in this session."""
    charged: dict[str, int] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: list[Shard]) -> "Board":
        """All shards of a plan waiting, the largest first."""
        return cls(deque(sorted(plan, key=lambda shard: (-shard.bytes, shard.shard_id))))

    @property
    def is_done(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self.waiting and not self.suspects and not any(self.in_flight.values())

    @property
    def open(self) -> int:
        """Shards that are neither committed nor set aside."""
        return len(self.waiting) + len(self.suspects) + sum(map(len, self.in_flight.values()))

    @property
    def useful(self) -> int:
        """How many actors can have something to do: what an actor holds, no other can begin."""
        busy = sum(bool(held) for held in self.in_flight.values())
        return len(self.waiting) + len(self.suspects) + busy

    def has_use_for(self, actor: str) -> bool:
        """Whether an actor holds a shard or may get one."""
        return bool(self.waiting or self.suspects or self.in_flight[actor])

    def next_for(self, actor: str) -> Attempt | None:
        """What a ready actor should begin now, if anything."""
        held = self.in_flight[actor]
        if any(attempt.alone for attempt in held) or len(held) >= PREFETCH:
            return None
        if held and len(self.waiting) < len(self.in_flight):
            return None
        if not held and self.suspects:
            return self._begin(actor, self.suspects.popleft(), alone=True)
        if self.waiting:
            return self._begin(actor, self.waiting.popleft(), alone=False)
        return None

    def done(self, actor: str, shard_id: str) -> Attempt:
        """A shard was committed; returns the attempt that did it."""
        held = self.in_flight[actor]
        attempt = next(a for a in held if a.shard.shard_id == shard_id)
        held.remove(attempt)
        return attempt

    def died(self, event: Died) -> None:
        """Take back what a dead actor held, and judge it."""
        held = self.in_flight.pop(event.actor, [])
        for attempt in held:
            shard = attempt.shard
            if len(held) == 1 and not event.blameless:
                self.charged[shard.shard_id] = self.charged.get(shard.shard_id, 0) + 1
            if self.charged.get(shard.shard_id, 0) >= self.max_attempts:
                self.set_aside[shard.shard_id] = event.reason
            elif event.blameless:
                self.waiting.appendleft(shard)
            else:
                self.suspects.append(shard)

    def _begin(self, actor: str, shard: Shard, alone: bool) -> Attempt:
        number = self.attempts.get(shard.shard_id, 0) + 1
        self.attempts[shard.shard_id] = number
        attempt = Attempt(shard, number, alone)
        self.in_flight[actor].append(attempt)
        return attempt


def dispatch(
    board: Board,
    workers: Workers,
    on_done: Callable[[ShardResult, Attempt, str], None],
    on_event: Callable[[Event], None] = lambda event: None,
    on_tick: Callable[[], None] = lambda: None,
) -> None:
    """Run the board until nothing is left to try; ``on_tick`` is called about once a second.

    Raises WorkersError when actors die again and again before they are ready.
    """
    failed_starts = 0
    while not board.is_done:
        for event in workers.events():
            on_event(event)
            match event:
                case Ready(actor):
                    board.in_flight[actor] = []
                    failed_starts = 0
                case Done(actor, shard_id, result):
                    on_done(result, board.done(actor, shard_id), actor)
                case Died(actor, reason):
                    failed_starts += actor not in board.in_flight and not event.blameless
                    board.died(event)
                    if failed_starts >= MAX_FAILED_STARTS and not board.in_flight:
                        raise WorkersError(f"{failed_starts} actors died while starting: {reason}")
        on_tick()
        workers.want(board.useful, board.open)
        for actor in list(board.in_flight):
            while (attempt := board.next_for(actor)) is not None:
                workers.submit(actor, attempt)
            if not board.has_use_for(actor):
                del board.in_flight[actor]
                workers.release(actor)
                on_event(Released(actor))
