"""``unet-jobs predict``, top to bottom: the same story on a laptop and on a cluster."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from jobs import session
from jobs.dispatch import Attempt, Board, Workers, dispatch
from jobs.job import Job, prepare
from jobs.progress import RunProgress
from unet_core.config import PredictConfig
from unet_core.inputs import list_shards
from unet_core.metrics import Totals
from unet_core.run import Run
from unet_core.timings import ShardResult, TimingsLog


@dataclass(frozen=True)
class Outcome:
    """How a run stands when ``predict`` returns."""

    run: Run
    totals: Totals
    was_finished: bool = False
    """There was nothing to do: an earlier session had finished the run."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Shards that killed their actors, with the reason; not committed."""


def predict(config: PredictConfig) -> Outcome:
    """Segment what is not committed yet, and finish the run when nothing is left.

    Raises an error of ``unet_core.errors`` for a config, checkpoint, run folder or store that
    cannot be used. Interrupted anyhow, the same call continues.
    """
    job = prepare(config)
    run = job.run
    if run.is_finished:
        return Outcome(run, run.finished_totals(), was_finished=True)
    shards = run.manifest() or list_shards(job.source)
    committed = run.committed() & {shard.shard_id for shard in shards}
    totals = run.totals(committed)
    plan = [shard for shard in shards if shard.shard_id not in committed]
    board = Board.of(plan)
    if plan or run.record is None:
        timings = TimingsLog(run.store)
        with RunProgress(shards, plan, totals) as progress, _workers(job, progress) as workers:
            record = run.record or run.establish(job.record(workers.probe()))
            run.make_manifest(shards)
            workers.configure(record.compute, job.footer(record))

            def on_done(result: ShardResult, attempt: Attempt, actor: str) -> None:
                nonlocal totals
                totals += result.totals
                timings.add(result, attempt.number, actor)
                progress.on_done(result)

            try:
                dispatch(board, workers, on_done, progress.on_event, progress.tick)
            finally:
                timings.flush()
    if not board.set_aside:
        run.finish(totals)
    return Outcome(run, totals, set_aside=board.set_aside)


@contextlib.contextmanager
def _workers(job: Job, progress: RunProgress) -> Iterator[Workers]:
    """Threads of this process, or actors of a Ray cluster."""
    workers = job.config.workers
    if session.is_inline(workers):
        from jobs.inline import InlineWorkers

        inline = InlineWorkers(job.replica(session.local_cpus(workers)), progress.on_image)
        try:
            yield inline
        finally:
            inline.close()
    else:
        from jobs.actors import RayActors

        with session.connected():
            placement = session.place(workers)
            actors = RayActors(job.replica(placement.cpus), placement)
            try:
                yield actors
            finally:
                actors.close()
