"""The dispatch loop: hands the scheduler's shards to workers until nothing is left. No Ray."""

from collections.abc import Callable, Iterator
from typing import Protocol

from jobs.scheduler.events import Attempt, Died, Done, Event
from jobs.scheduler.scheduler import Scheduler
from unet_core.errors import WorkersError

MAX_FAILED_STARTS = 3
"""Dead workers in a row that stop a run: a model that does not load, or a node without memory."""
PAUSE_S = 30.0
"""Seconds after which the loop must have been paused (a suspended laptop): no worker is overdue."""


class Backend(Protocol):
    """Workers of one kind."""

    def events(self) -> Iterator[Event]:
        """Wait up to a second and yield what happened; called in a loop.

        Raises any UnetJobsError that a worker raised: such errors stop the run.
        """

    def submit(self, worker: str, attempt: Attempt) -> None:
        """Begin a shard on a ready worker."""

    def scale(self, useful_workers: int, open_shards: int) -> int:
        """Start or end workers, so that as many as can be had of ``useful_workers`` share the open
        shards; return how many have a process, ready or starting.
        """

    def stop_idle(self, worker: str) -> None:
        """End a worker that no shard is left for, which frees its GPU."""

    def kill_stalled(self, worker: str, reason: str) -> Died | None:
        """End a worker whose attempt makes no step; None where that is impossible."""


def dispatch(
    scheduler: Scheduler,
    backend: Backend,
    on_done: Callable[[Done], None],
    on_tick: Callable[[], None] = lambda: None,
) -> None:
    """Run the loop until no shard is open; ``on_tick`` is called about once a second.

    Raises WorkersError after ``MAX_FAILED_STARTS`` workers in a row died before they were ready.
    """
    awake = scheduler.clock()
    while scheduler.open_shards:
        for event in backend.events():
            scheduler.handle(event)
            if isinstance(event, Done):
                on_done(event)
            if isinstance(event, Died) and scheduler.failed_starts >= MAX_FAILED_STARTS:
                raise WorkersError(
                    f"{scheduler.failed_starts} workers died while starting: {event.reason}"
                )
        slept, awake = scheduler.clock() - awake, scheduler.clock()
        if slept > PAUSE_S:
            scheduler.exclude_pause(slept)
        for worker, reason in scheduler.overdue():
            if (died := backend.kill_stalled(worker, reason)) is not None:
                scheduler.handle(died)
        on_tick()
        for worker, attempt in scheduler.assign(
            backend.scale(scheduler.max_useful_workers, scheduler.open_shards)
        ):
            backend.submit(worker, attempt)
        for worker in scheduler.release_idle():
            backend.stop_idle(worker)
