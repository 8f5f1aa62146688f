"""Prometheus metrics of a run, counted by the driver and exported by Ray.

Ray puts ``ray_`` before these names and ``_total`` behind those of counters.
"""

from ray.util.metrics import Counter, Gauge, Histogram

from jobs.scheduler.events import Attempt
from unet_core.runs.timings import Seconds, ShardResult

BOUNDARIES_S = [0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0]


class PrometheusMetrics:
    """Counters, gauges and histograms of one run."""

    def __init__(self, run: str) -> None:
        self._images = Counter("unet_jobs_images", "Images accounted for", ("run", "status"))
        self._bytes = Counter("unet_jobs_bytes", "Bytes of committed shards", ("run",))
        self._attempts = Counter("unet_jobs_attempts", "Attempts that ended", ("run", "outcome"))
        self._open = Gauge("unet_jobs_open_shards", "Shards that are not committed", ("run",))
        self._ready = Gauge("unet_jobs_ready_actors", "Actors that take shards", ("run",))
        self._busy = Gauge("unet_jobs_device_busy", "Share of its time", ("run", "actor"))
        self._stages = Counter("unet_jobs_stage_seconds", "Time, over threads", ("run", "stage"))
        self._shards = Histogram(
            "unet_jobs_shard_seconds", "A shard's time at the device", BOUNDARIES_S, ("run",)
        )
        for metric in vars(self).values():
            metric.set_default_tags({"run": run})

    def ready(self, actors: int) -> None:
        """Set the number of ready actors."""
        self._ready.set(actors)

    def done(self, actor: str, total: Seconds, attempt: Attempt, result: ShardResult) -> None:
        """Count a committed shard; ``total`` is the time that all shards of the actor took."""
        _add(self._attempts, 1, outcome="committed")
        _add(self._bytes, attempt.shard.bytes)
        _add(self._images, result.totals.ok, status="ok")
        _add(self._images, result.totals.failed, status="failed")
        for stage, seconds in vars(result.seconds).items():
            _add(self._stages, seconds, stage=stage)
        self._shards.observe(result.seconds.at_device)
        self._busy.set(total.shares.get("busy", 0.0), {"actor": actor})

    def open(self, shards: int) -> None:
        """Set the number of shards that are neither committed nor set aside."""
        self._open.set(shards)

    def lost(self, attempts: int) -> None:
        """Count attempts without a commit: their actor died, or the shard was refused."""
        _add(self._attempts, attempts, outcome="lost")

    def gone(self, actor: str, ready: int) -> None:
        """Set an actor that ended to idle; ``ready`` others are left."""
        self._busy.set(0, {"actor": actor})
        self.ready(ready)


def _add(counter: Counter, value: float, **tags: str) -> None:
    if value > 0:  # Ray's counters refuse 0
        counter.inc(value, tags)
