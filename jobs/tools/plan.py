"""``unet-jobs plan``: a look at what a run would do. Writes nothing."""

import os
from dataclasses import dataclass

from jobs.backends import session
from jobs.backends.placement import resolve_placement
from jobs.job import prepare
from unet_core.config.predict import PredictConfig
from unet_core.inputs.shards import images_in
from unet_core.runs.shard_plan import plan_shards


@dataclass(frozen=True)
class Plan:
    """Work that ``predict`` would do with a config now."""

    uri: str
    input: str
    format: str
    shards: int
    shards_left: int
    """Shards that are not committed."""
    images: int | None
    """Number in the whole input; None where only reading tells."""
    bytes: int
    bytes_left: int
    is_finished: bool
    passed_over: dict[str, int]
    """Files that are no images of the format, by their endings, when the input was listed."""
    workers: str


def plan(config: PredictConfig) -> Plan:
    """Look at input, run folder and cluster; raises what ``predict`` would raise."""
    job = prepare(config)
    with plan_shards(job.run, job.source) as made:
        return Plan(
            uri=job.run.uri,
            input=config.input.uri,
            format=job.source.format,
            shards=len(made.shards),
            shards_left=len(made.left),
            images=images_in(made.shards),
            bytes=sum(shard.bytes for shard in made.shards),
            bytes_left=sum(shard.bytes for shard in made.left),
            is_finished=made.is_finished,
            passed_over=made.passed_over,
            workers=_describe_workers(config),
        )


def _describe_workers(config: PredictConfig) -> str:
    if session.is_inline(config.workers):
        return f"inline, {session.local_cpus(config.workers):g} CPU cores"
    if not session.is_cluster_named():
        count = config.workers.count
        each = "one actor per GPU" if count == "auto" else f"{count} actors"
        return f"{each} on a local Ray cluster"
    with session.connected():
        placement = resolve_placement(config.workers, session.available_resources(config.workers))
    at_most = "up to " if config.workers.max != "auto" else ""
    return (
        f"{at_most}{placement.actors} actors of {placement.gpus:g} GPU, {placement.cpus:g} CPU on "
        f"{os.environ['RAY_ADDRESS']}"
    )
