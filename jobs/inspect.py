"""``plan`` and ``status``: what a run would do, and how one stands. They write nothing."""

import os
from dataclasses import dataclass

from jobs import session
from jobs.job import prepare
from jobs.placement import settle
from unet_core.config import PredictConfig, StorageConfig
from unet_core.inputs.formats import list_shards
from unet_core.inputs.shards import images_in
from unet_core.runs.manifest import draft
from unet_core.runs.run import open_existing
from unet_core.runs.timings import Seconds, recent_seconds
from unet_core.scores.metrics import Totals
from unet_core.storage.store import Store
from unet_core.training.run import Position, TrainingRun, is_training


@dataclass(frozen=True)
class Plan:
    """What ``predict`` would do with a config now."""

    uri: str
    input: str
    format: str
    shards: int
    shards_left: int
    """Not committed."""
    images: int | None
    """Of the whole input; None where only reading tells."""
    bytes: int
    bytes_left: int
    is_finished: bool
    workers: str


def plan(config: PredictConfig) -> Plan:
    """Look at input, run folder and cluster; raises what ``predict`` would raise."""
    job = prepare(config)
    shards, committed = job.run.manifest(), job.run.committed()
    if shards is None:
        with draft(list_shards(job.source)) as found:
            shards = found.heads
    left = [shard for shard in shards if shard.shard_id not in committed]
    return Plan(
        uri=job.run.uri,
        input=config.input.uri,
        format=job.source.format,
        shards=len(shards),
        shards_left=len(left),
        images=images_in(shards),
        bytes=sum(shard.bytes for shard in shards),
        bytes_left=sum(shard.bytes for shard in left),
        is_finished=job.run.is_finished,
        workers=_describe_workers(config),
    )


def _describe_workers(config: PredictConfig) -> str:
    if session.is_inline(config.workers):
        return f"inline, {session.local_cpus(config.workers):g} CPU cores"
    if not session.is_cluster_named():
        return f"{config.workers.count} actors on a local Ray cluster"
    with session.connected():
        placement = settle(config.workers, session.offered(config.workers))
    count = f"{'up to ' if config.workers.max != 'auto' else ''}{placement.actors} actors"
    each = f"{placement.gpus:g} GPU, {placement.cpus:g} CPU"
    return f"{count} of {each} on {os.environ['RAY_ADDRESS']}"


@dataclass(frozen=True)
class Status:
    """How a run stands."""

    uri: str
    shards: int
    committed: int
    is_finished: bool
    totals: Totals
    class_names: tuple[str, ...]
    seconds: Seconds
    """Where the time of about the last hour went."""


@dataclass(frozen=True)
class TrainingStatus:
    """How a training stands."""

    uri: str
    steps: int
    position: Position
    is_finished: bool
    metric: str


def status(uri: str, storage: StorageConfig | None = None) -> Status | TrainingStatus:
    """Read the folder of a run or of a training; raises StoreError if it is neither."""
    store = Store(uri, storage)
    if is_training(store):
        training = TrainingRun(store)
        return TrainingStatus(
            uri=store.uri(),
            steps=training.record["data"]["steps"],
            position=training.position(),
            is_finished=training.is_finished,
            metric=training.record["config"]["train"]["best"],
        )
    run, record = open_existing(uri, storage)
    committed = run.committed()
    return Status(
        uri=uri,
        shards=len(run.manifest() or ()),
        committed=len(committed),
        is_finished=run.is_finished,
        totals=run.finished_totals() if run.is_finished else run.totals(committed),
        class_names=record.class_names,
        seconds=recent_seconds(run.store),
    )
