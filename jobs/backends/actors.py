"""Workers on a Ray cluster: one replica in each actor, replaced when it dies.

Expected errors are returned, so that Ray does not wrap them; only bugs are raised.
"""

import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.backends import session
from jobs.backends.placement import Placement, wanted
from jobs.backends.prometheus import PrometheusMetrics
from jobs.backends.version import code_version, require_same_code
from jobs.scheduler.dispatch import MAX_FAILED_STARTS
from jobs.scheduler.events import Attempt, Died, Done, Event, Heartbeat, Ready, Refused
from jobs.scheduler.scheduler import HEARTBEAT_S, MAX_SHARDS_PER_WORKER
from unet_core.errors import ShardError, UnetJobsError, WorkersError
from unet_core.runs.compute import Compute, ReplicaSpec
from unet_core.runs.timings import ShardResult

if TYPE_CHECKING:
    from unet_core.inference.replica import Replica
    from unet_core.inference.shard_segmenter import ShardSegmenter

log = logging.getLogger(__name__)

WAIT_S = 1.0
NODE_COUNT_S = 5.0
"""Seconds between two counts of the cluster's nodes: fast enough for autoscaling."""
PLACING_WARNING_S = 30.0
UNREACHABLE_S = 60.0
"""Seconds that an actor may be unreachable before it is removed."""
JOIN, START, CONFIGURE, PING, HEARTBEAT = "join", "start", "configure", "ping", "heartbeat"
MOST_HEARTBEATS = 50
"""Per second, over all actors: a driver of 500 actors asks each every ten seconds."""
DEATHS = (ray.exceptions.RayError, session.CrashError)
NODE_DIED = "its node has died"
"""Ray's message for an actor that died with its node before it reported the node."""


class SegmentActor:
    """The Ray actor: holds one replica."""

    def __init__(self, spec: ReplicaSpec, run: str) -> None:
        self._spec, self._run = spec, run
        self._replica: Replica
        self._segmenter: ShardSegmenter

    def join(self, level: int) -> tuple[str, str]:
        """Return node id and code version, before anything is loaded; log from ``level`` on."""
        logging.basicConfig(level=level, format=session.LOG_FORMAT, force=True)
        return ray.get_runtime_context().get_node_id(), code_version()

    @session.returns_errors
    def start(self) -> Compute:
        """Load the model; return its ``compute`` section."""
        from unet_core.inference.replica import Replica  # torch: for the actor, not for the driver

        self._replica = Replica(self._spec)
        return self._replica.probe()

    @session.returns_errors
    def configure(self, compute: Compute, footer: dict[str, str]) -> None:
        """Set what the run has recorded."""
        from unet_core.inference.shard_segmenter import ShardSegmenter

        self._segmenter = ShardSegmenter(self._replica, compute, footer)

    def heartbeat(self) -> dict[str, int]:
        """Steps made by each shard in flight."""
        return dict(self._segmenter.steps)

    @session.returns_errors
    def segment(self, attempt: Attempt) -> ShardResult:
        """Segment and commit one shard."""
        log.info("begin run=%s shard=%s attempt=%d",
                 self._run, attempt.shard.shard_id, attempt.number)  # fmt: skip
        poison = {}
        if attempt.isolation_timeout_s is not None:
            from unet_core.inference.isolation import find_poison_images  # torch, again

            poison = find_poison_images(self._segmenter, attempt.shard, attempt.isolation_timeout_s)
        return self._segmenter.segment(attempt.shard, poison)


class RayActors:
    """All actors of a run; their number follows the nodes of the cluster.

    A dead actor is replaced by a new one. ``only_here``: place them on the driver's node alone.
    """

    def __init__(
        self, spec: ReplicaSpec, placement: Placement, shards: int, only_here: bool
    ) -> None:
        self._spec, self._placement = spec, placement
        self._workers, self._only_here = spec.config.workers, only_here
        self._run = spec.config.output.uri.rstrip("/").rpartition("/")[2]
        self._dashboard_name = f"{self._run}-{uuid.uuid4().hex[:4]}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._remote = ray.remote(
            num_gpus=placement.gpus,
            num_cpus=placement.cpus,
            accelerator_type=self._workers.accelerator_type or None,
            scheduling_strategy=here if only_here else "DEFAULT",
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=MAX_SHARDS_PER_WORKER + 1,  # and one thread to say how far they are
        )(SegmentActor)
        self._prometheus = PrometheusMetrics(self._run)
        self._placed = 0
        self._handles: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}
        self._calls: dict[Any, tuple[str, str | Attempt]] = {}
        """Calls in flight: reference → (actor, attempt or stage of its start)."""
        self._computes: dict[str, Compute] = {}
        self._unreachable_since: dict[str, float] = {}
        """Time since when each unreachable actor is unreachable."""
        self._configuration: tuple[Compute, dict[str, str]] | None = None
        self._last_answer_at = self._last_node_count_at = self._last_heartbeat_at = time.monotonic()
        self._capacity = placement.actors
        self._useful = max(1, shards)
        self._grow()

    def probe(self) -> Compute:
        """Return the ``compute`` section of the first actor that is loaded.

        Raises WorkersError if actors die while loading.
        """
        deaths: list[Died] = []
        while not self._computes:
            deaths += [e for e in self.events() if isinstance(e, Died) and not e.node_lost]
            if len(deaths) >= MAX_FAILED_STARTS:
                raise WorkersError(
                    f"{len(deaths)} actors died while loading the model: {deaths[-1].reason}"
                )
        return next(iter(self._computes.values()))

    def configure(self, compute: Compute, footer: dict[str, str]) -> None:
        """Set what the run has recorded, for present actors and their replacements."""
        self._configuration = (compute, footer)
        for name in self._computes:
            self._call(name, CONFIGURE, "configure", compute, footer)

    def submit(self, actor: str, attempt: Attempt) -> None:
        """Begin a shard on a ready actor."""
        log.debug("submit shard=%s attempt=%d actor=%s",
                  attempt.shard.shard_id, attempt.number, actor)  # fmt: skip
        self._call(actor, attempt, "segment", attempt)

    def want(self, actors: int, shards: int) -> int:
        """Place actors as far as nodes have room and shards are open."""
        self._useful = actors
        self._prometheus.open(shards)
        for name in [name for name in self._handles if name not in self._nodes]:
            if len(self._handles) > actors:  # its pending placement would add a node for nothing
                self._end(name)
        self._grow()
        return len(self._nodes)

    def release(self, actor: str) -> None:
        """End an actor that no shard is left for."""
        log.info("release run=%s actor=%s", self._run, actor)
        self._end(actor)

    def give_up(self, actor: str, reason: str) -> Died:
        """End an actor whose attempt makes no step."""
        return replace(self._remove(actor, reason), is_overdue=True)

    def events(self) -> Iterator[Event]:
        """Wait up to a second and yield what happened."""
        self._grow()
        self._ask_for_heartbeats()
        calls = list(self._calls)
        ready, _ = ray.wait(calls, num_returns=1, timeout=WAIT_S)
        if ready:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
            self._last_answer_at = time.monotonic()
        elif not self._computes and time.monotonic() - self._last_answer_at > PLACING_WARNING_S:
            log.warning("no actor is ready: %d wait for room on the cluster, %d load the model",
                        len(self._handles) - len(self._nodes), len(self._nodes))  # fmt: skip
            self._last_answer_at = time.monotonic()
        answers = [(reference, session.get_result(reference)) for reference in ready]
        answers.sort(key=lambda found: isinstance(found[1], DEATHS))
        for reference, answer in answers:  # commits count before deaths
            if reference in self._calls:
                yield from self._receive(*self._calls.pop(reference), answer)

    def close(self) -> None:
        """End all actors; shards in flight are abandoned."""
        for handle in self._handles.values():
            ray.kill(handle, no_restart=True)

    def _grow(self) -> None:
        """Place missing actors; nodes may have joined."""
        if time.monotonic() - self._last_node_count_at > NODE_COUNT_S:
            self._last_node_count_at = time.monotonic()
            nodes = session.available_resources(self._workers, self._only_here)
            self._capacity = wanted(self._workers, self._placement.room(nodes))
        while len(self._handles) < min(self._capacity, self._useful):
            self._placed += 1
            name = f"actor-{self._placed}"
            remote = self._remote.options(name=f"{self._dashboard_name}-{name}")
            self._handles[name] = remote.remote(self._spec, self._run)
            self._call(name, JOIN, "join", log.getEffectiveLevel())

    def _ask_for_heartbeats(self) -> None:
        """Request heartbeats from busy actors, at the rate of ``MOST_HEARTBEATS``."""
        every_s = max(HEARTBEAT_S, len(self._handles) / MOST_HEARTBEATS)
        if time.monotonic() - self._last_heartbeat_at < every_s:
            return
        self._last_heartbeat_at = time.monotonic()
        asked = {name for name, what in self._calls.values() if what == HEARTBEAT}
        busy = {name for name, what in self._calls.values() if isinstance(what, Attempt)}
        for name in busy - asked:
            self._call(name, HEARTBEAT, "heartbeat")

    def _call(self, name: str, what: str | Attempt, method: str, *arguments: Any) -> None:
        reference = getattr(self._handles[name], method).remote(*arguments)
        self._calls[reference] = (name, what)

    def _receive(self, name: str, what: str | Attempt, answer: Any) -> Iterator[Event]:
        if what == HEARTBEAT:
            if isinstance(answer, dict):  # else the call of its attempt reports the failure
                yield Heartbeat(name, answer)
        elif isinstance(answer, ray.exceptions.ActorUnavailableError):
            yield from self._check_unreachable(name, str(answer))
        elif isinstance(answer, DEATHS):
            yield self._remove(name, str(answer), getattr(answer, "preempted", False))
        elif isinstance(answer, ShardError) and isinstance(what, Attempt):
            self._prometheus.lost(1)
            yield Refused(name, what.shard.shard_id, str(answer))
        elif isinstance(answer, UnetJobsError):
            raise answer
        elif isinstance(what, Attempt):
            self._prometheus.done(name, what, answer)
            yield Done(name, what.shard.shard_id, answer)
        elif what == PING:
            yield self._remove(name, "it was out of reach for a while", node_lost=True)
        else:
            yield from self._started(name, what, answer)

    def _started(self, name: str, step: str, answer: Any) -> Iterator[Ready]:
        """Begin the next stage of an actor's start."""
        if step == JOIN:
            self._nodes[name], code = answer
            require_same_code(code_version(), code, f"node {self._nodes[name][:12]}")
            self._call(name, START, "start")
        elif step == START:
            self._computes[name] = answer
            if self._configuration is not None:
                self._call(name, CONFIGURE, "configure", *self._configuration)
        elif step == CONFIGURE:
            self._prometheus.ready(name)
            yield Ready(name)

    def _check_unreachable(self, name: str, reason: str) -> Iterator[Died]:
        """Ping an unreachable actor until it is known whether the actor or its node died: only the
        death of an actor may count as a failure of a shard.
        """
        self._unreachable_since.setdefault(name, time.monotonic())
        self._drop_calls(name)
        if time.monotonic() - self._unreachable_since[name] < UNREACHABLE_S:
            self._call(name, PING, "join", log.getEffectiveLevel())
        else:
            yield self._remove(name, reason, node_lost=True)

    def _remove(self, name: str, reason: str, node_lost: bool = False) -> Died:
        """Kill and forget an actor; the next count of nodes places another if one is needed."""
        node = self._end(name)
        alive = {n["NodeID"] for n in ray.nodes() if n["Alive"]}
        is_gone = NODE_DIED in reason or (node is not None and node not in alive)
        reason = f"node {(node or '?')[:12]} is gone" if is_gone else " ".join(reason.split())[:300]
        log.warning("actor died run=%s actor=%s reason=%s", self._run, name, reason)
        self._last_node_count_at = 0.0
        return Died(name, reason, node_lost or is_gone)

    def _end(self, name: str) -> str | None:
        """Kill an actor and drop its state; return its node."""
        ray.kill(self._handles.pop(name), no_restart=True)
        self._drop_calls(name)
        self._prometheus.gone(name)
        self._computes.pop(name, None)
        self._unreachable_since.pop(name, None)
        return self._nodes.pop(name, None)

    def _drop_calls(self, name: str) -> None:
        lost = [what for actor, what in self._calls.values() if actor == name]
        self._prometheus.lost(sum(isinstance(what, Attempt) for what in lost))
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != name}
