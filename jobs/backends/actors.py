"""Workers on a Ray cluster: actors, placed as nodes have room and replaced when they die."""

import logging
import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.backends import session
from jobs.backends.placement import Placement, wanted
from jobs.backends.prometheus import PrometheusMetrics
from jobs.backends.segment_actor import SegmentActor
from jobs.backends.version import code_version, require_same_code
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
from unet_core.errors import ShardError, UnetJobsError
from unet_core.runs.compute import RecordRun, ReplicaSpec
from unet_core.runs.timings import Seconds

log = logging.getLogger(__name__)

WAIT_S = 1.0  # for an answer: the progress display moves once a second
NODE_COUNT_S = 5.0  # between two counts of the cluster's nodes: fast enough for autoscaling
PLACING_WARNINGS_S = (10.0, 30.0)
"""Seconds until the first warning that no worker is ready, and between further ones."""
UNREACHABLE_S = 60.0  # before an actor is removed: most networks are back by then
MOST_HEARTBEATS = 50  # a second: a driver of 500 actors asks each every ten seconds
JOIN, LOAD, CONFIGURE, PING, HEARTBEAT = "join", "load", "configure", "ping", "heartbeat"
DEATHS = (ray.exceptions.RayError, session.CrashError)
NODE_DIED = "its node has died"  # Ray, of an actor that died before it reported its node


@dataclass(eq=False)
class Actor:
    """An actor, and all that the driver knows of it."""

    name: str
    handle: Any
    node: str = ""
    """Id of its node, empty until it is placed."""
    is_ready: bool = False
    """It is loaded, has what the run recorded, and takes shards."""
    unreachable_since: float = math.inf
    """Time since when it cannot be reached; infinite while it can."""
    seconds: Seconds = field(default_factory=Seconds)
    """Time that its shards have taken."""


class RayActors:
    """All actors of a run; their number follows the nodes of the cluster.

    ``only_here``: place them on the driver's node alone.
    """

    def __init__(
        self, spec: ReplicaSpec, placement: Placement, shards: int, only_here: bool,
        record_run: RecordRun,
    ) -> None:  # fmt: skip
        self._spec, self._placement, self._record_run = spec, placement, record_run
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
        self._actors: dict[str, Actor] = {}
        self._placed = 0
        """Number of actors so far, for their names."""
        self._calls: dict[Any, tuple[Actor, str | Attempt]] = {}
        """Calls without an answer, by Ray's reference: the actor, and the method or the attempt."""
        self._last_node_count_at = self._last_heartbeat_at = time.monotonic()
        self._warn_at = time.monotonic() + PLACING_WARNINGS_S[0]
        self._capacity, self._useful = placement.actors, shards
        self._grow()

    def events(self) -> Iterator[Event]:
        """Wait up to a second and yield what happened, commits before deaths."""
        self._grow()
        self._ask_for_heartbeats()
        calls = list(self._calls)
        ready, _ = ray.wait(calls, num_returns=1, timeout=WAIT_S)
        if ready:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
            self._warn_at = time.monotonic() + PLACING_WARNINGS_S[0]
        elif not self._ready and time.monotonic() > self._warn_at:
            log.warning("no actor is ready: %d wait for room on the cluster, %d load the model",
                        len(self._actors) - self._with_node, self._with_node)  # fmt: skip
            self._warn_at = time.monotonic() + PLACING_WARNINGS_S[1]
        answers = [(reference, session.get_result(reference)) for reference in ready]
        answers.sort(key=lambda found: isinstance(found[1], DEATHS))
        for reference, answer in answers:
            if reference in self._calls:  # else its actor was removed
                yield from self._receive(*self._calls.pop(reference), answer)

    def submit(self, worker: str, attempt: Attempt) -> None:
        """Begin a shard on a ready actor."""
        log.debug("submit shard=%s attempt=%d actor=%s",
                  attempt.shard.shard_id, attempt.number, worker)  # fmt: skip
        actor = self._actors[worker]
        self._calls[actor.handle.segment.remote(attempt)] = (actor, attempt)

    def scale(self, useful_workers: int, open_shards: int) -> int:
        """Place actors as far as nodes have room and shards are open."""
        self._prometheus.open(open_shards)
        self._useful = useful_workers
        surplus = max(0, len(self._actors) - useful_workers)
        for actor in [a for a in self._actors.values() if not a.node][:surplus]:
            self._end(actor)  # its pending placement would add a node for nothing
        self._grow()
        return self._with_node

    def stop_idle(self, worker: str) -> None:
        """End an actor that no shard is left for."""
        log.info("release run=%s actor=%s", self._run, worker)
        self._end(self._actors[worker])

    def kill_stalled(self, worker: str, reason: str) -> Died:
        """End an actor whose attempt makes no step."""
        return replace(self._report_death(self._actors[worker], reason), is_overdue=True)

    def close(self) -> None:
        """End all actors; shards in flight are abandoned."""
        for actor in self._actors.values():
            ray.kill(actor.handle, no_restart=True)

    @property
    def _ready(self) -> int:
        return sum(actor.is_ready for actor in self._actors.values())

    @property
    def _with_node(self) -> int:
        return sum(bool(actor.node) for actor in self._actors.values())

    def _grow(self) -> None:
        """Place missing actors; nodes may have joined."""
        if time.monotonic() - self._last_node_count_at > NODE_COUNT_S:
            self._last_node_count_at = time.monotonic()
            nodes = session.available_resources(self._workers, self._only_here)
            self._capacity = wanted(self._workers, self._placement.room(nodes))
        while len(self._actors) < min(self._capacity, self._useful):
            self._placed += 1
            name = f"actor-{self._placed}"
            remote = self._remote.options(name=f"{self._dashboard_name}-{name}")
            self._actors[name] = Actor(name, remote.remote(self._spec, self._run))
            self._call(self._actors[name], JOIN, log.getEffectiveLevel())

    def _ask_for_heartbeats(self) -> None:
        """Request heartbeats from busy actors, at the rate of ``MOST_HEARTBEATS``."""
        now = time.monotonic()
        if now - self._last_heartbeat_at < max(HEARTBEAT_S, len(self._actors) / MOST_HEARTBEATS):
            return
        self._last_heartbeat_at = now
        asked = {actor for actor, call in self._calls.values() if call == HEARTBEAT}
        busy = {actor for actor, call in self._calls.values() if isinstance(call, Attempt)}
        for actor in busy - asked:
            self._call(actor, HEARTBEAT)

    def _call(self, actor: Actor, method: str, *arguments: Any) -> None:
        self._calls[getattr(actor.handle, method).remote(*arguments)] = (actor, method)

    def _receive(self, actor: Actor, call: str | Attempt, answer: Any) -> Iterator[Event]:
        """Yield the event that an answer means, or begin the next stage of a start."""
        if call == HEARTBEAT:
            if isinstance(answer, dict):  # else the call of its attempt reports the failure
                yield Heartbeat(actor.name, answer)
        elif isinstance(answer, ray.exceptions.ActorUnavailableError):
            yield from self._check_unreachable(actor, str(answer))
        elif isinstance(answer, DEATHS):
            yield self._report_death(actor, str(answer), getattr(answer, "preempted", False))
        elif isinstance(answer, ShardError) and isinstance(call, Attempt):
            self._prometheus.lost(1)
            yield Refused(actor.name, call, str(answer))
        elif isinstance(answer, UnetJobsError):
            raise answer
        elif isinstance(call, Attempt):
            actor.seconds += answer.seconds
            self._prometheus.done(actor.name, actor.seconds, call, answer)
            yield Done(actor.name, call, answer)
        elif call == JOIN:
            actor.node, code = answer
            require_same_code(code_version(), code, f"node {actor.node[:12]}")
            self._call(actor, LOAD)
        elif call == LOAD:
            self._call(actor, CONFIGURE, self._record_run(answer))
        elif call == CONFIGURE:
            actor.is_ready = True
            self._prometheus.ready(self._ready)
            yield Ready(actor.name)
        elif call == PING:
            yield self._report_death(actor, "it was out of reach for a while", node_lost=True)

    def _check_unreachable(self, actor: Actor, reason: str) -> Iterator[Died]:
        """Ping an unreachable actor until Ray tells that it died, it answers, or ``UNREACHABLE_S``
        have passed: only a death that is known may count as a failure of a shard.
        """
        actor.unreachable_since = min(actor.unreachable_since, time.monotonic())
        self._drop_calls(actor)
        if time.monotonic() - actor.unreachable_since < UNREACHABLE_S:
            self._call(actor, PING)
        else:
            yield self._report_death(actor, reason, node_lost=True)

    def _report_death(self, actor: Actor, reason: str, node_lost: bool = False) -> Died:
        """Kill an actor; return its death, and whether its node is gone. The next count of nodes
        places another if one is needed.
        """
        self._end(actor)
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        is_gone = NODE_DIED in reason or bool(actor.node and actor.node not in alive)
        text = (
            f"node {actor.node[:12] or '?'} is gone" if is_gone else " ".join(reason.split())[:300]
        )
        log.warning("actor died run=%s actor=%s reason=%s", self._run, actor.name, text)
        self._last_node_count_at = 0.0
        return Died(actor.name, text, node_lost or is_gone)

    def _end(self, actor: Actor) -> None:
        """Kill and forget an actor."""
        ray.kill(self._actors.pop(actor.name).handle, no_restart=True)
        self._drop_calls(actor)
        self._prometheus.gone(actor.name, self._ready)

    def _drop_calls(self, actor: Actor) -> None:
        lost = [call for called, call in self._calls.values() if called is actor]
        self._prometheus.lost(sum(isinstance(call, Attempt) for call in lost))
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] is not actor}
