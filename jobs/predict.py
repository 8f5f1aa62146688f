"""``unet-jobs predict``, top to bottom: the same story on a laptop and on a cluster."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from jobs import session
from jobs.board import Attempt, Board
from jobs.budget import Budget
from jobs.dispatch import Workers, dispatch
from jobs.job import Job, checkpoint_place, places, prepare, require_reachable
from jobs.progress import RunProgress
from unet_core.config import PredictConfig, is_remote
from unet_core.errors import RunMismatchError
from unet_core.inputs.formats import is_there, list_shards
from unet_core.inputs.shards import Shard
from unet_core.manifest import Draft
from unet_core.manifest import draft as make_draft
from unet_core.manifest import names as known_names
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
    outcome = _predicted(config, retry_failed, refresh)
    output = config.output
    if not output.report:
        return outcome
    from jobs.report import ending_report  # templates, charts, pictures

    was_done = not outcome.was_finished
    report = ending_report(output.uri, config.storage, output.report, was_done)
    return replace(outcome, report=report)


def _predicted(config: PredictConfig, retry_failed: bool, refresh: bool) -> Outcome:
    job = prepare(config)
    run = job.run
    with contextlib.ExitStack() as stack:
        known = run.manifest()
        again = 0
        if retry_failed and known is not None:
            again = run.forget_failed(known, partial(is_there, job.source))
        new = _new_shards(job, known) if refresh and known is not None else []
        if run.is_finished:
            if known is not None and run.has_all(known):
                return Outcome(run, run.finished_totals(), was_finished=True)
            run.reopen()  # somebody has taken commits away
        draft = None
        if known is None:
            draft = stack.enter_context(make_draft(list_shards(job.source)))
        job.source.listing.clear()
        shards = draft.heads if draft is not None else [*(known or []), *new]
        return replace(segment(job, shards, draft), done_again=again, added=len(new))


def segment(job: Job, shards: list[Shard], draft: Draft | None) -> Outcome:
    """Place workers, and let them do what is left of the shards."""
    run, errors, budget = job.run, job.config.errors, Budget.of(job.config.errors)
    committed = run.committed() & {shard.shard_id for shard in shards}
    totals = run.totals(committed)
    plan = [shard for shard in shards if shard.shard_id not in committed]
    board = Board.of(plan, errors, job.config.storage.deadline_s)
    if budget.is_exceeded(totals):
        board.stop()
    if not board.is_done or draft is not None:
        timings = TimingsLog(run.store)
        progress = RunProgress(shards, plan, totals)
        with progress, _workers(job, len(plan), progress) as workers:
            record = run.record or run.establish(job.record(workers.probe()))
            if draft is not None:
                run.publish_manifest(draft)
            workers.configure(record.compute, job.footer(record))

            def on_done(result: ShardResult, attempt: Attempt, actor: str) -> None:
                nonlocal totals
                totals += result.totals
                timings.add(result, attempt.number, actor)
                progress.on_done(result)
                if budget.is_exceeded(totals):
                    board.stop()

            with timings:
                dispatch(board, workers, on_done, progress.on_event, progress.tick)
    is_done = totals.shards == len(shards)
    exceeded = budget.is_exceeded(totals, at_end=True) if is_done else board.is_stopped
    if is_done and not exceeded:
        if not run.has_all(shards):
            raise RunMismatchError(
                f"{run.store.uri()}: another driver has added shards or taken commits back "
                "meanwhile; run the same command again"
            )
        run.finish(totals)
    names = {shard.shard_id: shard.uri or shard.shard_id for shard in plan}
    set_aside = {names[shard_id]: why for shard_id, why in board.set_aside.items()}
    return Outcome(run, totals, set_aside=set_aside, too_many_failed=exceeded)


def _new_shards(job: Job, known: list[Shard]) -> list[Shard]:
    """Add what the input has of new objects to the manifest of the run; returns their shards.

    What was written again since it was listed is no new object.
    """
    names = known_names(job.run.store, known)
    generation = 1 + max(shard.generation for shard in known)
    with make_draft(list_shards(job.source, names), generation) as draft:
        if draft.heads:
            job.run.reopen()
            job.run.publish_manifest(draft)
        return draft.heads


@contextlib.contextmanager
def _workers(job: Job, shards: int, progress: RunProgress) -> Iterator[Workers]:
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
            is_shared = job.config.storage.shared
            needed = places(job.config) | checkpoint_place(job.config, session.has_working_dir())
            require_reachable(needed, session.node_count(), is_shared)
            only_here = not is_shared and not all(map(is_remote, needed.values()))
            placement = session.settle(workers, session.offered(workers, only_here))
            actors = RayActors(job.replica(placement.cpus), placement, shards, only_here)
            try:
                yield actors
            finally:
                actors.close()
