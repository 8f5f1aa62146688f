"""``plan --cost``: the time and size of the rest of a run, from a few shards that are segmented."""

import contextlib
import statistics
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from jobs.backends import session
from jobs.backends.placement import resolve_placement
from jobs.job import prepare
from jobs.tools.scratch import scratch_run
from unet_core.config.predict import PredictConfig
from unet_core.errors import ConfigError
from unet_core.inputs.shards import Shard, images_in
from unet_core.runs.manifest import with_members
from unet_core.runs.run import Run
from unet_core.runs.shard_plan import plan_shards
from unet_core.runs.timings import read_timings

SAMPLE = 6
"""Shards in the sample, of all sizes; more take longer but hardly narrow the estimate."""
LEAST_SPREAD = 0.1
"""Least relative error of an estimate: machines and inputs vary as much."""


@dataclass(frozen=True)
class Cost:
    """Rates of one actor in a sample, and the time and size of the rest at these rates."""

    device: str
    images: int
    """Images in the sample."""
    shards: int
    images_per_s: float
    """Rate of one actor once it runs."""
    spread: float
    """Half the range of the estimate, as a share: two standard errors over shards."""
    images_left: int
    is_counted: bool
    """True where ``images_left`` is known, False where it is estimated by bytes."""
    hours: float
    """Hours of one actor for all that is left."""
    gpus: float
    """GPUs of one actor; 1 also where it has none."""
    output_bytes: int
    """Size of the masks and metrics of the rest."""
    price: float | None = None
    """Price of an hour of one GPU, or of a CPU's actor."""

    def hours_on(self, actors: int) -> tuple[float, float]:
        """Return the least and the most hours for a number of actors."""
        return self._range(self.hours / actors)

    @property
    def device_hours_per_million(self) -> tuple[float, float]:
        """GPU-hours for a million images, or the hours of actors without a GPU."""
        return self._range(1e6 / self.images_per_s / 3600 * self.gpus)

    @property
    def price_per_million(self) -> tuple[float, float] | None:
        """Price of a million images, where that of an hour is known."""
        low, high = self.device_hours_per_million
        return None if self.price is None else (low * self.price, high * self.price)

    def _range(self, hours: float) -> tuple[float, float]:
        return hours * max(0.0, 1 - self.spread), hours * (1 + self.spread)


def estimate(config: PredictConfig, price: float | None = None) -> Cost:
    """Segment a sample on one actor, and scale the time between its commits by bytes.

    ``price``: of an hour of one GPU, or of a CPU's actor.
    Raises what ``predict`` raises, and ConfigError if too little is left to measure.
    """
    job, workers = prepare(config), config.workers
    with plan_shards(job.run, job.source) as plan:
        left, draft = plan.left, plan.draft
        read = draft.with_members if draft is not None else partial(with_members, job.run.store)
        by_size = sorted(left, key=lambda shard: (shard.bytes, shard.shard_id))
        count = min(SAMPLE, len(left))
        ranks = ((2 * n + 1) * len(left) // (2 * count) for n in range(count))
        sample = [read(by_size[rank]) for rank in ranks]
    _require_several(len(sample), "are left")
    with contextlib.ExitStack() as stack:
        if not session.is_inline(workers):
            stack.enter_context(session.connected())
            each = resolve_placement(workers, session.available_resources(workers))
            workers = workers.model_copy(
                update={"count": "auto", "max": 1, "gpus": each.gpus, "cpus": each.cpus}
            )
        run = stack.enter_context(scratch_run(job, sample, workers))
        gpus = 1.0 if workers.gpus == "auto" else workers.gpus or 1.0
        return _scaled(run, sample, left, gpus, price)


def _require_several(shards: int, which: str) -> None:
    if shards < 2:
        raise ConfigError(
            f"{shards} shards {which}: too few to measure anything by; a smaller "
            "input.shard_images or input.shard_mb makes more of loose images"
        )


def _scaled(
    run: Run, sample: list[Shard], left: list[Shard], gpus: float, price: float | None
) -> Cost:
    """Scale the sample to all that is left; loading and the first shard are not counted."""
    rows = sorted(read_timings(run.store, SAMPLE).to_pylist(), key=lambda row: row["finished"])
    images = sum(row["images"] for row in rows)
    _require_several(len(rows), "of the sample were segmented")
    if not images:
        raise ConfigError("the shards of the sample hold no images: nothing to measure by")
    has_sizes = all(shard.bytes for shard in left)  # some lists have none
    weights = {s.shard_id: s.bytes if has_sizes else s.count or 1 for s in left}
    spans = [
        max((later["finished"] - earlier["finished"]).total_seconds(), 1e-3)
        for earlier, later in pairwise(rows)
    ]
    done = [weights[row["shard_id"]] for row in rows[1:]]
    rates = [span / weight for span, weight in zip(spans, done, strict=True)]
    s_per_weight, still = sum(spans) / sum(done), sum(weights.values())
    error = statistics.stdev(rates) / len(rates) ** 0.5 if len(rates) > 1 else 0.0
    times_sample = still / sum(weights[shard.shard_id] for shard in sample)
    counted = images_in(left)
    written = sum(e.bytes for folder in ("masks", "metrics") for e in run.store.list(folder))
    return Cost(
        device=run.record.compute.device if run.record is not None else "",
        images=images,
        shards=len(sample),
        images_per_s=max(1, images - rows[0]["images"]) / sum(spans),
        spread=max(LEAST_SPREAD, 2 * error / s_per_weight),
        images_left=round(images * times_sample) if counted is None else counted,
        is_counted=counted is not None,
        hours=s_per_weight * still / 3600,
        gpus=gpus,
        output_bytes=round(written * times_sample),
        price=price,
    )
