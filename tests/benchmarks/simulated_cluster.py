"""How the dispatcher scales where the work is only waiting.

    python -m tests.benchmarks.simulated_cluster [--lanes 1 4 16 64 256] [--plot scaling.png]

The dispatcher and the Ray actors' own event loop of ``predict`` drive up to 256 lanes, as if each
were an actor with a GPU: eight Ray processes without torch hold 32 lanes each, and a shard sleeps
two seconds. Prints efficiency (the time that perfect lanes would need, over the time taken) and the
driver's CPU time for each shard.
"""

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray

from jobs.backends import session
from jobs.backends.actors import JOIN, Actor, RayActors
from jobs.backends.placement import Placement
from jobs.backends.version import code_version
from jobs.scheduler.dispatch import dispatch
from jobs.scheduler.events import Attempt, Done, Event, Ready
from jobs.scheduler.scheduler import Scheduler
from unet_core.config.loading import build
from unet_core.config.predict import ErrorsConfig, PredictConfig
from unet_core.config.sections import StorageConfig
from unet_core.inputs.shards import Shard, Source
from unet_core.metrics import Totals
from unet_core.runs.compute import Compute, ReplicaSpec, RunSettings
from unet_core.runs.timings import Seconds, ShardResult, TimingsLog
from unet_core.storage.store import Store

HOSTS = 8
SHARD_S = 2.0
SHARDS_PER_LANE = 15
COMPUTE = Compute(device="none", precision="", backend="", batch_pixels=1, versions={})


class Host:
    """Many lanes that each do one shard at a time, as an actor's device does."""

    def __init__(self) -> None:
        self._lanes: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def join(self, lane: str, level: int) -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), code_version()

    async def load(self, lane: str) -> Compute:
        return COMPUTE

    async def configure(self, lane: str, settings: RunSettings) -> None:
        return None

    async def heartbeat(self, lane: str) -> dict[str, int]:
        return {}

    async def segment(self, lane: str, attempt: Attempt) -> ShardResult:
        async with self._lanes[lane]:
            await asyncio.sleep(SHARD_S)
        return ShardResult(attempt.shard.shard_id, Totals(shards=1, images_seen=1, ok=1), Seconds())


class Lanes(RayActors):
    """Actors of which 32 share a process."""

    def __init__(self, lanes: int, hosts: list[Any]) -> None:
        self._hosts = hosts
        self.ready, self.started, self.cpu = 0, 0.0, 0.0
        places = {"input": {"uri": "in"}, "output": {"uri": "simulated"}}
        config = build(PredictConfig, places, [])
        spec = ReplicaSpec(config, Source(config.input, "webdataset", Store("in")), "", None, 1)
        super().__init__(
            spec, Placement(lanes, 0, 0), lanes, False, lambda found: RunSettings(found, {})
        )

    def _grow(self) -> None:
        while self._placed < self._placement.actors:
            lane = f"actor-{self._placed}"
            self._actors[lane] = Actor(lane, Lane(self._hosts[self._placed % HOSTS], lane))
            self._placed += 1
            self._call(self._actors[lane], JOIN, 30)

    def events(self) -> Iterator[Event]:
        for event in super().events():
            self.ready += isinstance(event, Ready)
            if self.ready and not self.started:
                self.started, self.cpu = time.perf_counter(), time.process_time()
            yield event

    def stop_idle(self, worker: str) -> None:
        del self._actors[worker]


class Lane:
    """The handle of an actor: calls of the host, with the lane's name."""

    def __init__(self, host: Any, lane: str) -> None:
        self._host, self._lane = host, lane

    def __getattr__(self, method: str) -> Any:
        remote = getattr(self._host, method).remote
        return SimpleNamespace(remote=partial(remote, self._lane))


def run(lanes: int, hosts: list[Any]) -> tuple[float, float]:
    """Efficiency, and the driver's CPU seconds for each shard."""
    count = lanes * SHARDS_PER_LANE
    shards = [Shard(f"shard-{n:06d}", f"{n}.tar", 1, "", None, None) for n in range(count)]
    scheduler = Scheduler.of(shards, ErrorsConfig(), StorageConfig())
    workers = Lanes(lanes, hosts)
    timings, totals = TimingsLog(Store("memory://simulated")), Totals()

    def on_done(done: Done) -> None:
        nonlocal totals
        totals += done.result.totals
        timings.add(done.result, done.attempt.number, done.worker)

    dispatch(scheduler, workers, on_done)
    seconds, cpu = time.perf_counter() - workers.started, time.process_time() - workers.cpu
    assert totals.images_seen == count
    assert workers.ready == lanes
    return count * SHARD_S / lanes / seconds, cpu / count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--plot", help="a PNG to write")
    arguments = parser.parse_args()
    found = []
    with session.connected():
        hosts = [ray.remote(num_cpus=0, max_concurrency=128)(Host).remote() for _ in range(HOSTS)]
        ray.get([host.load.remote("") for host in hosts])
        print(f"{'lanes':>6} {'shards':>7} {'efficiency':>11} {'driver CPU per shard':>21}")
        for lanes in arguments.lanes:
            efficiency, cpu = run(lanes, hosts)
            found.append((lanes, efficiency, cpu * 1e3))
            print(
                f"{lanes:>6} {lanes * SHARDS_PER_LANE:>7} {efficiency:>11.3f} {cpu * 1e3:>18.2f} ms"
            )
    if arguments.plot:
        plot(found, arguments.plot)


def plot(found: list[tuple[int, float, float]], path: str) -> None:
    """Efficiency and CPU over lanes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    lanes, efficiency, cpu = zip(*found, strict=True)
    left.semilogx(lanes, efficiency, "o-", base=2)
    left.set(ylim=(0, 1.05), xlabel="lanes", ylabel="efficiency")
    right.semilogx(lanes, cpu, "o-", base=2)
    right.set(ylim=(0, None), xlabel="lanes", ylabel="driver CPU, ms per shard")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
