"""The dispatch loop: hands the scheduler's shards to workers until nothing is left. No Ray."""

from collections.abc import Callable, Iterator
from typing import Protocol

from jobs.scheduler.scheduler import Attempt, Died, Done, Event, Scheduler
from unet_core.errors import WorkersError
from unet_core.runs.compute import Compute
from unet_core.runs.timings import ShardResult

MAX_FAILED_STARTS = 3
PAUSE_S = 30.0
"""A driver that was stopped for longer has heard nothing meanwhile, and blames nobody for it."""


class Workers(Protocol):
    """Actors of any kind."""

    def probe(self) -> Compute:
        """The ``compute`` section of the first one that is loaded."""

    def configure(self, compute: Compute, footer: dict[str, str]) -> None:
        """Fix what the run has decided; only then does any become ready."""

    def submit(self, actor: str, attempt: Attempt) -> None:
        """Let a ready actor begin a shard."""

    def want(self, actors: int, shards: int) -> int:
        """So many shards are open, and at most so many actors can have one; returns how many have
        a process, ready or starting.
        """

    def release(self, actor: str) -> None:
        """End an actor that nothing is left for; somebody else may need its GPU."""

    def give_up(self, actor: str, reason: str) -> Died | None:
        """End an actor whose attempt does not; None where that cannot be done."""

    def events(self) -> Iterator[Event]:
        """Wait a moment and give what happened; an endless loop calls this.

        Raises whatever error of this project an actor met: such errors stop a run.
        """


def dispatch(
    scheduler: Scheduler,
    workers: Workers,
    on_done: Callable[[ShardResult, Attempt, str], None],
    on_tick: Callable[[], None] = lambda: None,
) -> None:
    """Run the loop until nothing is left to try; ``on_tick`` is called about once a second.

    Raises WorkersError when actors die again and again before they are ready.
    """
    awake = scheduler.clock()
    while not scheduler.is_done:
        for event in workers.events():
            if isinstance(event, Done):
                on_done(event.result, scheduler.done(event.actor, event.shard_id), event.actor)
            else:
                scheduler.note(event)
            if scheduler.failed_starts >= MAX_FAILED_STARTS and isinstance(event, Died):
                raise WorkersError(
                    f"{scheduler.failed_starts} actors died while starting: {event.reason}"
                )
        slept, awake = scheduler.clock() - awake, scheduler.clock()
        if slept > PAUSE_S:
            scheduler.exclude_pause(slept)
        for actor, reason in scheduler.overdue():  # its attempt stands still
            if (died := workers.give_up(actor, reason)) is not None:
                scheduler.died(died)
        on_tick()
        actors = workers.want(scheduler.useful, scheduler.open)
        for actor in list(scheduler.in_flight):
            while (attempt := scheduler.next_for(actor, actors)) is not None:
                workers.submit(actor, attempt)
            if not scheduler.has_use_for(actor):
                del scheduler.in_flight[actor]
                workers.release(actor)
