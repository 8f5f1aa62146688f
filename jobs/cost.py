"""``plan --cost``: what the rest of a run will take, from a few of its shards segmented for real.

They go into a folder beside the run's, by the same way as in ``predict``, and are removed.
"""

import statistics
import uuid
from dataclasses import dataclass
from itertools import pairwise

from jobs.job import Job, prepare
from jobs.predict import segment
from unet_core.config import PredictConfig, build
from unet_core.errors import ConfigError
from unet_core.inputs import list_shards
from unet_core.manifest import Draft, draft, with_members
from unet_core.run import MANIFEST_NAME
from unet_core.shards import Shard
from unet_core.timings import read_timings

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

    def hours_on(self, actors: int) -> tuple[float, float]:
        """From … to, for so many actors."""
        return self._range(self.hours / actors)

    @property
    def device_hours_per_million(self) -> tuple[float, float]:
        """GPU-hours for a million images, of a CPU's actors their hours."""
        return self._range(1e6 / self.images_per_s / 3600 * self.gpus)

    def _range(self, hours: float) -> tuple[float, float]:
        return hours * max(0.0, 1 - self.spread), hours * (1 + self.spread)


def estimate(config: PredictConfig) -> Cost:
    """Segment a sample on one actor, as ``predict`` would, and scale it by bytes.

    Raises what ``predict`` raises, and ConfigError if too little is left to measure.
    """
    job = prepare(config)
    known = job.run.manifest()
    with draft(list_shards(job.source) if known is None else iter(())) as found:
        heads = known if known is not None else found.heads
        committed = job.run.committed()
        left = [shard for shard in heads if shard.shard_id not in committed]
        sample = [_whole(job, found, known is not None, head) for head in _spread(left)]
    if len(sample) < 2:
        raise ConfigError(f"{len(left)} shards are left: too few to measure anything by")
    scratch = _scratch(config)
    try:
        with draft(iter(sample)) as small:
            images = segment(scratch, small.heads, small).totals.images_seen
        return _scaled(scratch, sample, left, images)
    finally:
        scratch.run.store.remove_all()


def _spread(left: list[Shard]) -> list[Shard]:
    """A sample of all sizes."""
    by_size = sorted(left, key=lambda shard: (shard.bytes, shard.shard_id))
    count = min(SAMPLE, len(by_size))
    return [by_size[(2 * n + 1) * len(by_size) // (2 * count)] for n in range(count)]


def _whole(job: Job, found: Draft, is_published: bool, head: Shard) -> Shard:
    if not head.has_members:
        return head
    if is_published:
        return with_members(job.run.store, MANIFEST_NAME, head)
    return found.with_members(head)


def _scratch(config: PredictConfig) -> Job:
    """The same job on one actor, into a folder of its own."""
    table = config.model_dump(exclude_unset=True)
    table["output"]["uri"] = f"{config.output.uri.rstrip('/')}-cost-{uuid.uuid4().hex[:8]}"
    if config.workers.count != "inline":
        table["workers"] = {**table.get("workers", {}), "count": "auto", "max": 1}
    return prepare(build(PredictConfig, table, []))


def _scaled(scratch: Job, sample: list[Shard], left: list[Shard], images: int) -> Cost:
    """By the time between one commit and the next: loading and the first shard are left out."""
    store = scratch.run.store
    rows = read_timings(store, SAMPLE).to_pylist()
    rows.sort(key=lambda row: row["finished"])
    sizes = {shard.shard_id: shard.bytes for shard in sample}
    spans = [
        (later["finished"] - earlier["finished"]).total_seconds()
        for earlier, later in pairwise(rows)
    ]
    counted = rows[1:]
    seconds, measured = max(sum(spans), 1e-3), sum(sizes[row["shard_id"]] for row in counted)
    rates = [span / sizes[row["shard_id"]] for span, row in zip(spans, counted, strict=True)]
    error = statistics.stdev(rates) / len(rates) ** 0.5 if len(rates) > 1 else 0.0
    bytes_left = sum(shard.bytes for shard in left)
    counts = [shard.count for shard in left]
    is_counted = None not in counts
    images_left = (
        sum(count or 0 for count in counts)
        if is_counted
        else round(images * bytes_left / sum(sizes.values()))
    )
    written = sum(e.bytes for folder in ("masks", "metrics") for e in store.list(folder))
    record = scratch.run.record
    return Cost(
        device=record.compute.device if record is not None else "",
        images=images,
        shards=len(sample),
        images_per_s=sum(row["images"] for row in counted) / seconds,
        spread=max(LEAST_SPREAD, 2 * error / (seconds / measured)),
        images_left=images_left,
        is_counted=is_counted,
        hours=seconds / measured * bytes_left / 3600,
        gpus=scratch.config.workers.gpus or 1.0 if scratch.config.workers.gpus != "auto" else 1.0,
        output_bytes=round(written * bytes_left / sum(sizes.values())),
    )
