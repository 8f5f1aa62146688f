"""The verbs that look at what is there: status, verify, evaluate, report."""

import json
import sys
from typing import TYPE_CHECKING

import click

from jobs.verbs.arguments import OVERRIDES, REACH, STORAGE, run_config, storage_of, stored_run
from jobs.verbs.show import (
    harmless,
    json_option,
    only_document,
    show,
    show_changed,
    show_json,
    show_problems,
    show_scored,
    show_set_aside,
    show_totals,
    warn_of_one_class,
)
from unet_core.errors import ConfigError

if TYPE_CHECKING:
    from unet_core.verify import Findings

TRUTH = ("input.masks", "input.label_map", "input.ignore_index")
"""What may be said anew of a run that is done."""
PROBLEMS_SHOWN = 10


@click.command()
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar=STORAGE)
@json_option
def status(run: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show how a run stands."""
    storage = storage_of(overrides)
    from jobs.inspect import TrainingStatus
    from jobs.inspect import status as read_status

    found = read_status(run, storage)
    if as_json:
        show_json(found)
        if not isinstance(found, TrainingStatus):
            warn_of_one_class(found.totals, found.class_names)
        return
    if isinstance(found, TrainingStatus):
        state = "finished" if found.is_finished else "not finished: run train again to continue"
        at = found.position
        show(training=found.uri, state=state, saved=f"{at.step:,} of {found.steps:,} steps")
        if at.best is not None:
            show(best=f"val {found.metric} {at.best:.4f} after step {at.best_step:,}")
        return
    state = "finished" if found.is_finished else "not finished: run predict again to continue"
    if not found.is_finished and found.committed == found.shards:
        state = "every shard is done, but it is not finished: run predict again to see why"
    show(run=found.uri, state=state, shards=f"{found.committed:,} of {found.shards:,} committed")
    show_totals(found.totals, found.class_names)
    if found.seconds.shares:
        shares = [f"{what} {share:.0%}" for what, share in found.seconds.shares.items()]
        show(device=", ".join(shares))


@click.command()
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar=STORAGE)
@click.option("--deep", is_flag=True, help="Also recount the input and every mask.")
@json_option
def verify(run: str, overrides: tuple[str, ...], deep: bool, as_json: bool) -> None:
    """Check digests, reconciliation and orphans. Exit code 1 if anything is off."""
    storage = storage_of(overrides)
    from unet_core.storage.store import Store
    from unet_core.training.run import is_training
    from unet_core.verify import verify as check

    if is_training(Store(run, storage)):
        raise ConfigError(
            f"{run} is a training, and verify is of runs; unet-jobs status {run} tells how it "
            f"stands, unet-jobs report {run} shows it"
        )
    findings = check(run, deep, storage)
    if as_json:
        show_json(findings, uri=run, is_deep=deep)
        warn_of_one_class(findings.totals, findings.class_names)
    else:
        _show_findings(run, findings, deep)
    if findings.problems:
        sys.exit(1)


def _show_findings(run: str, findings: "Findings", deep: bool) -> None:
    show(run=run, shards=f"{findings.committed:,} of {findings.shards:,} committed")
    show_totals(findings.totals, findings.class_names)
    for note in findings.notes:
        click.echo(harmless(f"note: {note}"))
    for problem in findings.problems:
        click.echo(harmless(f"problem: {problem}"))
    if not findings.problems:
        click.echo("verified: nothing is off" + (", recounted from the input" if deep else ""))


@click.command()
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES)
@click.option("--truth", metavar="WHERE", help="As input.masks: truth/, mask.png, _mask, a column.")
@click.option("--against", metavar="RUN2", help="An earlier run of the same images.")
@click.option("--name", default="", help="Of the folder RUN/evaluation/NAME.")
@json_option
def evaluate(
    run: str,
    overrides: tuple[str, ...],
    truth: str | None,
    against: str | None,
    name: str,
    as_json: bool,
) -> None:
    """Compare a run with truth, or with an earlier run. Run it again to continue."""
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override}: write --truth {override}, or --against {override}")
    if bool(truth) == bool(against):
        raise ConfigError("say what to compare with: one of --truth WHERE and --against RUN2")
    results = stored_run(run, overrides)
    from jobs import evaluate as task

    with only_document(as_json):
        if against:
            config = run_config(results, overrides, REACH)
            outcome = task.compare(results, stored_run(against, overrides), config, name)
        else:
            given = (*overrides, f"input.masks={json.dumps(truth)}")
            outcome = task.evaluate(results, run_config(results, given, REACH + TRUTH), name)
    if as_json:
        show_json(outcome.document)
    elif against:
        show_changed(outcome.document)
    else:
        show_scored(outcome.document)
    show_set_aside(outcome.set_aside, "evaluated")
    if outcome.set_aside:
        sys.exit(1)
    if not as_json:
        show(report=f"unet-jobs report {run} shows it too")


@click.command(options_metavar="[OPTIONS]")
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar=STORAGE)
@click.option("--previews", metavar="DIR", help="Write PNG overlays of images there instead.")
@click.option("--ids", metavar="ID", multiple=True, help="With --previews: this image; repeatable.")
@click.option(
    "--worst",
    type=click.IntRange(min=1),
    help="With --previews: so many, lowest IoU (or confidence) first; else 20 by chance.",
)
def report(
    run: str,
    overrides: tuple[str, ...],
    previews: str | None,
    ids: tuple[str, ...],
    worst: int | None,
) -> None:
    """Write RUN/report.html: a run or a training on one page."""
    storage = storage_of(overrides)
    if (ids or worst) and not previews:
        raise ConfigError("--ids and --worst go with --previews DIR")
    if ids and worst:
        raise ConfigError("--ids and --worst exclude each other; give one of them")
    from jobs.previews import write_previews
    from jobs.report import write_report

    if previews is None:
        show(report=write_report(run, storage))
        return
    done = write_previews(run, previews, list(ids), worst or 0, storage)
    show(previews=f"{previews}, {done.written:,} images")
    show_problems(done.problems, "not drawn", PROBLEMS_SHOWN)
    if done.problems:
        sys.exit(1)
