"""``plan --cost``: what the rest of a run will take, from a few of its shards segmented for real.

They go into a folder beside the run's, by the same way as in ``predict``, and are removed.
"""

import contextlib
import logging
import statistics
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from jobs.backends import session
from jobs.backends.placement import resolve_placement
from jobs.job import Job, prepare
from jobs.predict import segment
from unet_core.config.predict import PredictConfig
from unet_core.errors import ConfigError, StoreError
from unet_core.inputs.formats import list_shards
from unet_core.inputs.shards import Shard, images_in
from unet_core.runs.manifest import draft, with_members
from unet_core.runs.run import Run
from unet_core.runs.shard_plan import ShardPlan
from unet_core.runs.timings import read_timings

log = logging.getLogger(__name__)

SAMPLE = 6
LEAST_SPREAD = 0.1
"""Of the estimate: nobody knows better than this."""


@dataclass(frozen=True)
class Cost:
    """What one actor did with a sample, and what that means for the rest."""

    device: str
    images: int
    """In the sample."""
    shards: int
    images_per_s: float
    """Of one actor, once it runs."""
    spread: float
    """Half the range of the estimate, as a share: two standard errors over shards."""
    images_left: int
    is_counted: bool
    """Whether ``images_left`` is known, rather than estimated by bytes."""
    hours: float
    """One actor for all that is left."""
    gpus: float
    """Of one actor; 1 also where it has none."""
    output_bytes: int
    """What the rest will write."""
    price: float | None = None
    """Of an hour of one GPU, or of a CPU's actor."""

    def hours_on(self, actors: int) -> tuple[float, float]:
        """From … to, for so many actors."""
        return self._range(self.hours / actors)

    @property
    def device_hours_per_million(self) -> tuple[float, float]:
        """GPU-hours for a million images, of a CPU's actors their hours."""
        return self._range(1e6 / self.images_per_s / 3600 * self.gpus)

    @property
    def price_per_million(self) -> tuple[float, float] | None:
        """Of a million images, where the price of an hour is known."""
        low, high = self.device_hours_per_million
        return None if self.price is None else (low * self.price, high * self.price)

    def _range(self, hours: float) -> tuple[float, float]:
        return hours * max(0.0, 1 - self.spread), hours * (1 + self.spread)


def estimate(config: PredictConfig, price: float | None = None) -> Cost:
    """Segment a sample on one actor, as ``predict`` would, and scale it by bytes.

    ``price``: of an hour.
    Raises what ``predict`` raises, and ConfigError if too little is left to measure.
    """
    job = prepare(config)
    known = job.run.manifest()
    with draft(list_shards(job.source) if known is None else iter(())) as found:
        heads = known if known is not None else found.heads
        committed = job.run.committed()
        left = [shard for shard in heads if shard.shard_id not in committed]
        read: Callable[[Shard], Shard] = found.with_members
        if known is not None:
            read = partial(with_members, job.run.store)
        by_size = sorted(left, key=lambda shard: (shard.bytes, shard.shard_id))
        count = min(SAMPLE, len(left))
        places = ((2 * n + 1) * len(left) // (2 * count) for n in range(count))  # of all sizes
        sample = [read(by_size[place]) for place in places]
    _require_several(len(sample), "are left")
    with contextlib.ExitStack() as stack:
        if not session.is_inline(config.workers):
            stack.enter_context(session.connected())
        scratch = _scratch(job)
        stack.callback(_remove, scratch)
        with draft(iter(sample)) as small:
            images = segment(scratch, ShardPlan(small.heads, small)).totals.images_seen
        return replace(_scaled(scratch, sample, left, images), price=price)


def _require_several(shards: int, which: str) -> None:
    if shards < 2:
        raise ConfigError(
            f"{shards} shards {which}: too few to measure anything by; a smaller "
            "input.shard_images makes more of loose images"
        )


def _scratch(job: Job) -> Job:
    """The same job on one actor of those it would have, into a folder of its own."""
    config, uri = job.config, job.config.output.uri.rstrip("/")
    if "://" in uri and "/" not in uri.partition("://")[2]:
        raise ConfigError(f"output.uri: {uri} is a whole bucket; name a folder in it")
    output = config.output.model_copy(update={"uri": f"{uri}-cost-{uuid.uuid4().hex[:8]}"})
    workers = config.workers
    if not session.is_inline(workers):
        each = resolve_placement(workers, session.available_resources(workers))
        one = {"count": "auto", "max": 1, "gpus": each.gpus, "cpus": each.cpus}
        workers = workers.model_copy(update=one)
    errors = config.errors.model_copy(update={"max_failed_images": 1.0})  # a sample says nothing
    changed = config.model_copy(update={"output": output, "workers": workers, "errors": errors})
    return replace(job, config=changed, run=Run(output.uri, config.storage))


def _remove(scratch: Job) -> None:
    try:
        scratch.run.store.remove_all()
    except StoreError as error:
        log.warning("%s stays and must be removed by hand: %s", scratch.run.uri, error)


def _scaled(scratch: Job, sample: list[Shard], left: list[Shard], images: int) -> Cost:
    """By the time between one commit and the next: loading and the first shard are left out."""
    store, record = scratch.run.store, scratch.run.record
    rows = sorted(read_timings(store, SAMPLE).to_pylist(), key=lambda row: row["finished"])
    _require_several(len(rows), "of the sample were segmented")
    if not images:
        raise ConfigError("the shards of the sample hold no images: nothing to measure by")
    has_sizes = all(shard.bytes for shard in left)  # some lists say none

    def weigh(shard: Shard) -> int:
        return shard.bytes if has_sizes else shard.count or 1

    weights = {shard.shard_id: weigh(shard) for shard in sample}
    gaps = [later["finished"] - earlier["finished"] for earlier, later in pairwise(rows)]
    spans = [max(gap.total_seconds(), 1e-3) for gap in gaps]
    done = [weights[row["shard_id"]] for row in rows[1:]]
    rates = [span / weight for span, weight in zip(spans, done, strict=True)]
    s_per_weight, still = sum(spans) / sum(done), sum(map(weigh, left))
    error = statistics.stdev(rates) / len(rates) ** 0.5 if len(rates) > 1 else 0.0
    times_sample = still / sum(weights.values())
    counted = images_in(left)
    written = sum(e.bytes for folder in ("masks", "metrics") for e in store.list(folder))
    gpus = scratch.config.workers.gpus
    return Cost(
        device=record.compute.device if record is not None else "",
        images=images,
        shards=len(sample),
        images_per_s=max(1, sum(row["images"] for row in rows[1:])) / sum(spans),
        spread=max(LEAST_SPREAD, 2 * error / s_per_weight),
        images_left=round(images * times_sample) if counted is None else counted,
        is_counted=counted is not None,
        hours=s_per_weight * still / 3600,
        gpus=float(gpus) if gpus not in ("auto", 0) else 1.0,
        output_bytes=round(written * times_sample),
    )
