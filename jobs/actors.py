"""The workers of a Ray cluster: one replica in each actor, placed at once, replaced when it dies.

An actor raises only bugs: what stops a run, or makes the actor useless, travels back as a record,
since exceptions that do not pickle lose their cause.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from jobs.dispatch import MAX_FAILED_STARTS, PREFETCH, Attempt, Died, Done, Event, Ready
from jobs.session import Placement
from unet_core import errors
from unet_core.compute import Compute, ReplicaSpec
from unet_core.errors import UnetJobsError, WorkersError
from unet_core.shards import Shard
from unet_core.timings import ShardResult

if TYPE_CHECKING:
    from unet_core.replica import Replica

log = logging.getLogger(__name__)

WAIT_S = 1.0
PLACING_WARNING_S = 30.0
START, CONFIGURE = "start", "configure"

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Failure:
    """An error of this project that stops the run, as a plain record."""

    kind: str
    message: str

    def raise_again(self) -> None:
        """Raise it where it is understood."""
        raise getattr(errors, self.kind)(self.message)


@dataclass(frozen=True)
class Crash:
    """Something went wrong with the process rather than with the run: memory, or the device."""

    reason: str


@dataclass(frozen=True)
class Started:
    """What an actor says when its replica is loaded."""

    compute: Compute
    node_id: str
    pid: int


class SegmentActor:
    """A replica behind Ray's calls."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._spec = spec
        self._replica: Replica | None = None

    def start(self) -> Started | Failure | Crash:
        """Load the model."""

        def load() -> Started:
            from unet_core.replica import Replica  # torch: for the actor, not for the driver

            self._replica = Replica(self._spec)
            node = ray.get_runtime_context().get_node_id()
            return Started(self._replica.probe(), node, os.getpid())

        return _recorded(load)

    def configure(self, compute: Compute, footer: dict[str, str]) -> Failure | Crash | None:
        """Fix what the run has decided."""
        assert self._replica is not None
        replica = self._replica
        return _recorded(lambda: replica.configure(compute, footer))

    def segment(self, shard: Shard) -> ShardResult | Failure | Crash:
        """Segment and commit one shard."""
        assert self._replica is not None
        replica = self._replica
        return _recorded(lambda: replica.segment(shard))


def _recorded(call: Callable[[], ResultT]) -> ResultT | Failure | Crash:
    try:
        return call()
    except UnetJobsError as error:
        return Failure(type(error).__name__, str(error))
    except (MemoryError, RuntimeError) as error:  # torch's device errors are RuntimeErrors
        log.exception("the actor cannot go on")
        return Crash(f"{type(error).__name__}: {error}")


class RayActors:
    """All actors of a run. A dead one is replaced, and gets work only once it is ready again."""

    def __init__(self, spec: ReplicaSpec, placement: Placement) -> None:
        self._spec = spec
        self._remote = ray.remote(
            num_gpus=placement.gpus,
            num_cpus=placement.cpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=PREFETCH,
        )(SegmentActor)
        self._placed = 0
        self._handles: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}
        self._calls: dict[Any, tuple[str, str]] = {}
        """Every call under way: its reference → (actor, shard id, or the step of its start)."""
        self._started: dict[str, Started] = {}
        self._decided: tuple[Compute, dict[str, str]] | None = None
        self._heard = time.monotonic()
        for _ in range(placement.actors):
            self._place()

    def probe(self) -> Compute:
        """The ``compute`` section of the first actor that is loaded.

        Raises WorkersError if actors die while loading.
        """
        deaths = 0
        while not self._started:
            for event in self.events():
                if isinstance(event, Died):
                    deaths += 1
                    if deaths >= MAX_FAILED_STARTS:
                        raise WorkersError(
                            f"{deaths} actors died while loading the model: {event.reason}"
                        )
        return next(iter(self._started.values())).compute

    def configure(self, compute: Compute, footer: dict[str, str]) -> None:
        """Fix what the run has decided, for the actors of today and for their replacements."""
        self._decided = (compute, footer)
        for name in self._started:
            self._call(name, CONFIGURE, "configure", compute, footer)

    def submit(self, actor: str, attempt: Attempt) -> None:
        """Let a ready actor begin a shard."""
        log.debug("submit shard=%s attempt=%d actor=%s",
                  attempt.shard.shard_id, attempt.number, actor)  # fmt: skip
        self._call(actor, attempt.shard.shard_id, "segment", attempt.shard)

    def events(self) -> Iterator[Event]:
        """Wait up to a second and give what happened."""
        calls = list(self._calls)
        ready, _ = ray.wait(calls, num_returns=1, timeout=WAIT_S)
        if ready:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
            self._heard = time.monotonic()
        elif not self._nodes and time.monotonic() - self._heard > PLACING_WARNING_S:
            log.warning("no actor is ready yet: %d are being placed or loaded",
                        len(self._handles))  # fmt: skip
            self._heard = time.monotonic()
        for reference in ready:
            if reference in self._calls:
                yield from self._receive(reference)

    def close(self) -> None:
        """End all actors; what they had not committed is done again next time."""
        for handle in self._handles.values():
            ray.kill(handle, no_restart=True)

    def _place(self) -> None:
        self._placed += 1
        name = f"actor-{self._placed}"
        self._handles[name] = self._remote.remote(self._spec)
        self._call(name, START, "start")

    def _call(self, name: str, what: str, method: str, *arguments: Any) -> None:
        reference = getattr(self._handles[name], method).remote(*arguments)
        self._calls[reference] = (name, what)

    def _receive(self, reference: Any) -> Iterator[Event]:
        name, what = self._calls[reference]
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayTaskError:
            raise  # a bug of ours: its traceback is the message
        except ray.exceptions.RayError as error:
            yield self._bury(name, str(error))
            return
        del self._calls[reference]
        if isinstance(answer, Failure):
            answer.raise_again()
        elif isinstance(answer, Crash):
            ray.kill(self._handles[name], no_restart=True)
            yield self._bury(name, answer.reason)
        elif what == START:
            self._started[name] = answer
            self._nodes[name] = answer.node_id
            if self._decided is not None:
                self._call(name, CONFIGURE, "configure", *self._decided)
        elif what == CONFIGURE:
            yield Ready(name)
        else:
            yield Done(name, what, answer)

    def _bury(self, name: str, reason: str) -> Died:
        """Forget a dead actor and place another."""
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != name}
        del self._handles[name]
        self._started.pop(name, None)
        node = self._nodes.pop(name, None)
        alive = {n["NodeID"] for n in ray.nodes() if n["Alive"]}
        reason = " ".join(reason.split())[:300]
        log.warning("actor died actor=%s reason=%s", name, reason)
        self._place()
        return Died(name, reason, blameless=node is not None and node not in alive)
