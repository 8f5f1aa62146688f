"""``unet-jobs predict``, top to bottom: the same story on a laptop and on a cluster."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from jobs.backends import session
from jobs.backends.paths import require_shared, with_absolute_paths, worker_paths
from jobs.backends.placement import resolve_placement
from jobs.job import Job, prepare
from jobs.progress import RunProgress
from jobs.scheduler.dispatch import Workers, dispatch
from jobs.scheduler.scheduler import Attempt, Scheduler
from unet_core.config.predict import PredictConfig
from unet_core.config.uris import is_remote
from unet_core.errors import RunMismatchError
from unet_core.inputs.formats import is_there, list_shards
from unet_core.inputs.shards import Shard
from unet_core.metrics import Totals
from unet_core.runs import manifest
from unet_core.runs.run import Run
from unet_core.runs.timings import ShardResult, TimingsLog


@dataclass(frozen=True)
class Outcome:
    """How a run stands when ``predict`` returns."""

    run: Run
    totals: Totals
    was_finished: bool = False
    """There was nothing to do: an earlier session had finished the run."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Shards that could not be done, by path or id, with the reason; not committed."""
    done_again: int = 0
    """Shards whose commits were taken back for their failed images."""
    added: int = 0
    """Shards of objects that were new in the input."""
    too_many_failed: bool = False
    """More images failed than ``errors.max_failed_images`` puts up with: the run is not
    finished."""
    report: str = ""
    """Where the page about the run is, if there is one."""

    @property
    def is_complete(self) -> bool:
        """Whether every image is accounted for, within the budget."""
        return not self.set_aside and not self.too_many_failed and self.totals.is_reconciled


def predict(config: PredictConfig, retry_failed: bool = False, refresh: bool = False) -> Outcome:
    """Segment what is not committed yet, finish the run when nothing is left, and write its report.

    ``retry_failed`` takes back the commits of shards with failed images first; ``refresh`` adds
    what the input has of new objects. Raises an error of ``unet_core.errors`` for a config,
    checkpoint, run folder or store that cannot be used. Interrupted anyhow, the same call
    continues.
    """
    outcome = _predicted(prepare(config), retry_failed, refresh)
    if not config.output.report:
        return outcome
    from jobs.results.report import (
        ending_report,  # templates, charts, pictures: half a second
    )

    report = ending_report(config.output, config.storage, not outcome.was_finished)
    return replace(outcome, report=report)


def _predicted(job: Job, retry_failed: bool, refresh: bool) -> Outcome:
    run = job.run
    known = run.manifest()
    again = run.forget_failed(known, partial(is_there, job.source)) if known and retry_failed else 0
    new = _new_shards(job, known) if known and refresh else []
    if run.is_finished:
        if known is not None and run.has_all(known):
            return Outcome(run, run.finished_totals(), was_finished=True)
        run.reopen()  # somebody has taken commits away
    if known is None:
        with manifest.draft(list_shards(job.source)) as draft:
            return segment(job, draft.heads, draft)
    return replace(segment(job, [*known, *new]), done_again=again, added=len(new))


def segment(job: Job, shards: list[Shard], draft: manifest.Draft | None = None) -> Outcome:
    """Place workers, and let them do what is left of the shards."""
    run, errors = job.run, job.config.errors
    committed = run.committed() & {shard.shard_id for shard in shards}
    totals = run.totals(committed)
    plan = [shard for shard in shards if shard.shard_id not in committed]
    scheduler = Scheduler.of(plan, errors, job.config.storage)
    if errors.are_too_many(totals.failed, totals.images_seen):
        scheduler.stop()
    if not scheduler.is_done or draft is not None:
        timings = TimingsLog(run.store)
        progress = RunProgress(shards, plan, totals)
        with progress, _workers(job, len(plan), progress) as workers:
            record = run.record or run.create_or_join(job.record(workers.probe()))
            if draft is not None:
                run.publish_manifest(draft)
            workers.configure(record.compute, job.footer(record))

            def on_done(result: ShardResult, attempt: Attempt, actor: str) -> None:
                nonlocal totals
                totals += result.totals
                timings.add(result, attempt.number, actor)
                progress.on_done(attempt.shard, result.totals)
                if errors.are_too_many(totals.failed, totals.images_seen):
                    scheduler.stop()

            with timings:
                dispatch(
                    scheduler, workers, on_done, lambda: progress.tick(len(scheduler.in_flight))
                )
    is_done = totals.shards == len(shards)
    exceeded = scheduler.is_stopped
    if is_done:
        exceeded = errors.are_too_many(totals.failed, totals.images_seen, at_end=True)
    if is_done and not exceeded:
        if not run.has_all(shards):
            raise RunMismatchError(
                f"{run.store.uri()}: another driver has added shards or taken commits back "
                "meanwhile; run the same command again"
            )
        run.finish(totals)
    why = scheduler.set_aside
    set_aside = {s.uri or s.shard_id: why[s.shard_id] for s in plan if s.shard_id in why}
    return Outcome(run, totals, set_aside=set_aside, too_many_failed=exceeded)


def _new_shards(job: Job, known: list[Shard]) -> list[Shard]:
    """Add what the input has of new objects to the manifest of the run; returns their shards.

    What was written again since it was listed is no new object.
    """
    names = manifest.names(job.run.store, known)
    generation = 1 + max(shard.generation for shard in known)
    with manifest.draft(list_shards(job.source, names), generation) as draft:
        if draft.heads:
            job.run.reopen()
            job.run.publish_manifest(draft)
        return draft.heads


@contextlib.contextmanager
def _workers(job: Job, shards: int, progress: RunProgress) -> Iterator[Workers]:
    workers = job.config.workers
    if session.is_inline(workers):
        from jobs.backends.inline import InlineWorkers

        spec = job.replica(session.local_cpus(workers))
        with contextlib.closing(InlineWorkers(spec, progress.on_image)) as inline:
            yield inline
        return
    from jobs.backends.actors import RayActors

    with session.connected():
        storage, needed = job.config.storage, worker_paths(job.config)
        require_shared(needed, storage, session.node_count())
        only_here = not storage.shared and not all(map(is_remote, needed.values()))
        placement = resolve_placement(workers, session.available_resources(workers, only_here))
        spec = replace(job.replica(placement.cpus), config=with_absolute_paths(job.config))
        with contextlib.closing(RayActors(spec, placement, shards, only_here)) as actors:
            yield actors
