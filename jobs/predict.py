"""``unet-jobs predict``, top to bottom: the same code on a laptop and on a cluster."""

import logging
from dataclasses import dataclass, field, replace

from jobs.backends.start import start_workers
from jobs.job import Job, prepare
from jobs.progress import RunProgress
from jobs.scheduler.dispatch import dispatch
from jobs.scheduler.events import Done
from jobs.scheduler.scheduler import Scheduler
from unet_core.config.predict import PredictConfig
from unet_core.errors import RunMismatchError, few
from unet_core.inputs.formats import nothing_inside
from unet_core.metrics import Totals
from unet_core.runs.compute import Compute, RunSettings
from unet_core.runs.run import Run
from unet_core.runs.shard_plan import ShardPlan, plan_shards
from unet_core.runs.timings import TimingsLog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """State of a run when ``predict`` returns."""

    run: Run
    totals: Totals
    was_finished: bool = False
    """An earlier session had finished the run; nothing was done."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Shards that could not be committed, by name, with the reason."""
    retried: int = 0
    """Shards whose commits were removed because images in them had failed."""
    added: int = 0
    """Shards of objects that were new in the input."""
    too_many_failed: bool = False
    """More images failed than ``errors.max_failed_images`` allows; the run is not finished."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Files of the input that are no images of its format, by their endings."""
    report: str = ""
    """Path of the HTML report, if one was written."""

    @property
    def is_complete(self) -> bool:
        """True if every image has a row and the error budget is kept."""
        return not self.set_aside and not self.too_many_failed and self.totals.is_reconciled


def predict(config: PredictConfig, retry_failed: bool = False, refresh: bool = False) -> Outcome:
    """Segment every shard that is not committed; finish the run if all are, and write its report.

    ``retry_failed`` first removes the commits of shards with failed images; ``refresh`` adds
    objects that are new in the input. After an interruption the same call continues the run.
    Raises a UnetJobsError for a config, checkpoint, run folder or store that cannot be used.
    """
    job = prepare(config)
    if retry_failed or refresh:
        job.run.require_current_schema()
    with plan_shards(job.run, job.source, retry_failed, refresh) as plan:
        if plan.is_finished:
            totals, passed_over = job.run.finished_totals(), plan.passed_over
            outcome = Outcome(job.run, totals, was_finished=True, passed_over=passed_over)
        else:
            job.run.require_current_schema()
            if plan.draft is not None:
                job = job.with_sampled_limits(plan.draft)
            outcome = segment(job, plan)
    if not config.output.report:
        return outcome
    from jobs.results.report import ending_report  # templates, charts, pictures: half a second

    return replace(
        outcome, report=ending_report(config.output, config.storage, not outcome.was_finished)
    )


def segment(job: Job, plan: ShardPlan) -> Outcome:
    """Dispatch the uncommitted shards to workers; finish the run if all of it is committed."""
    run, errors, shards, left = job.run, job.config.errors, plan.shards, plan.left
    if run.is_finished:
        run.reopen()  # commits were removed by hand
    totals = run.totals({s.shard_id for s in shards} - {s.shard_id for s in left})
    without_images: list[str] = []
    scheduler = Scheduler.of(left, errors, job.config.storage)
    if errors.are_too_many(totals.failed, totals.images_seen):
        scheduler.stop()
    if scheduler.open_shards:
        draft = plan.draft

        def record_run(compute: Compute) -> RunSettings:
            nonlocal draft
            record = run.record or run.begin(job.make_record(compute))
            if not job.config.workers.mixed_devices:
                record.compute.require(compute)
            if draft is not None:
                run.publish_manifest(draft)
                draft = None
            return job.settings(record)

        def on_done(done: Done) -> None:
            nonlocal totals
            totals += done.result.totals
            if not done.result.totals.images_seen:
                without_images.append(done.attempt.shard.name)
            timings.add(done.result, done.attempt.number, done.worker)
            progress.on_done(done.attempt.shard, done.result.totals)
            if errors.are_too_many(totals.failed, totals.images_seen):
                scheduler.stop()

        with (
            RunProgress(shards, left, totals) as progress,
            start_workers(job, len(left), progress.on_image, record_run) as backend,
            TimingsLog(run.store) as timings,
        ):
            dispatch(scheduler, backend, on_done, lambda: progress.tick(len(scheduler.workers)))
    is_done = totals.shards == len(shards)
    if is_done and not totals.images_seen:
        raise nothing_inside(job.source, shards)
    if without_images:
        log.warning("shards without images: %s", few(without_images))
    exceeded = (
        errors.are_too_many(totals.failed, totals.images_seen, at_end=True)
        if is_done
        else scheduler.is_stopped
    )
    if is_done and not exceeded:
        if not run.has_all(shards):
            raise RunMismatchError(
                f"{run.store.uri()}: another driver has added shards or removed commits in the "
                "meantime; run the same command again"
            )
        run.finish(totals)
    why = scheduler.set_aside
    set_aside = {shard.name: why[shard.shard_id] for shard in left if shard.shard_id in why}
    return Outcome(
        run,
        totals,
        set_aside=set_aside,
        retried=plan.retried,
        added=plan.added,
        too_many_failed=exceeded,
        passed_over=plan.passed_over,
    )
