"""Hands the shards of a board out to workers of any kind, until nothing is left; knows no Ray."""

from collections.abc import Callable, Iterator
from typing import Protocol

from jobs.scheduler.scheduler import Attempt, Board, Died, Done, Event
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
    board: Board,
    workers: Workers,
    on_done: Callable[[ShardResult, Attempt, str], None],
    on_tick: Callable[[], None] = lambda: None,
) -> None:
    """Run the board until nothing is left to try; ``on_tick`` is called about once a second.

    Raises WorkersError when actors die again and again before they are ready.
    """
    awake = board.clock()
    while not board.is_done:
        for event in workers.events():
            if isinstance(event, Done):
                on_done(event.result, board.done(event.actor, event.shard_id), event.actor)
            else:
                board.note(event)
            if board.failed_starts >= MAX_FAILED_STARTS and isinstance(event, Died):
                raise WorkersError(
                    f"{board.failed_starts} actors died while starting: {event.reason}"
                )
        slept, awake = board.clock() - awake, board.clock()
        if slept > PAUSE_S:
            board.forgive(slept)
        for actor, reason in board.overdue():  # its attempt stands still
            if (died := workers.give_up(actor, reason)) is not None:
                board.died(died)
        on_tick()
        actors = workers.want(board.useful, board.open)
        for actor in list(board.in_flight):
            while (attempt := board.next_for(actor, actors)) is not None:
                workers.submit(actor, attempt)
            if not board.has_use_for(actor):
                del board.in_flight[actor]
                workers.release(actor)
