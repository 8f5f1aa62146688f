"""Commands on runs: status, verify, evaluate, report, export."""

import json
import sys

import click

from jobs.commands import show
from jobs.commands.arguments import (
    ENVIRONMENT_KEYS,
    OVERRIDES_METAVAR,
    Arguments,
    run_config,
    storage_of,
    stored_run,
)
from unet_core.config.sections import StorageConfig
from unet_core.errors import ConfigError

TRUTH = ("input.masks", "input.label_map", "input.ignore_index", "input.on_missing_mask")
"""Keys that ``evaluate`` may override."""
storage_argument = click.argument(
    "storage",
    nargs=-1,
    metavar="[STORAGE.KEY=VALUE]...",
    callback=lambda _context, _parameter, overrides: storage_of(overrides),
)


@click.command()
@click.argument("run")
@storage_argument
@show.json_option
def status(run: str, storage: StorageConfig, as_json: bool) -> None:
    """Show how a run stands."""
    from jobs.results import status as task

    found = task.status(run, storage)
    if as_json:
        show.document(found)
        if isinstance(found, task.Status):
            show.warn_of_one_class(found.totals, found.class_names)
    elif isinstance(found, task.TrainingStatus):
        state = "finished" if found.is_finished else "not finished: run train again to continue"
        at = found.position
        show.lines(
            training=found.uri,
            state=state,
            saved=f"{at.step:,} of {found.steps:,} steps",
            best=(
                f"val {found.metric} {show.score_text(at.best)} after step {at.best_step:,}"
                if at.best_step
                else ""
            ),
        )
    else:
        state = "finished" if found.is_finished else "not finished: run predict again to continue"
        if not found.is_finished and found.committed == found.shards:
            state = "every shard is done, but it is not finished: run predict again to see why"
        show.lines(
            run=found.uri, state=state, shards=f"{found.committed:,} of {found.shards:,} committed"
        )
        show.totals(found.totals, found.class_names)
        show.lines(device=show.shares(found.seconds.shares))


@click.command()
@click.argument("run")
@storage_argument
@click.option("--deep", is_flag=True, help="Also count every mask and the images of tars again.")
@show.json_option
def verify(run: str, storage: StorageConfig, deep: bool, as_json: bool) -> None:
    """Check digests, reconciliation and orphans. Exit code 1 if anything is off."""
    from unet_core.runs.verify import verify as check
    from unet_core.storage.store import Store
    from unet_core.training.training_run import is_training

    if is_training(Store(run, storage)):
        raise ConfigError(
            f"{run} is a training folder; verify works on prediction runs; "
            f"try unet-jobs status {run} or unet-jobs report {run}"
        )
    findings = check(run, deep, storage)
    if as_json:
        show.document(findings, uri=run, is_deep=deep)
        show.warn_of_one_class(findings.totals, findings.class_names)
    else:
        show.lines(run=run, shards=f"{findings.committed:,} of {findings.shards:,} committed")
        show.totals(findings.totals, findings.class_names)
        for note in findings.notes:
            click.echo(show.harmless(f"note: {note}"))
        for problem in findings.problems:
            click.echo(show.harmless(f"problem: {problem}"))
        if not findings.problems:
            again = "; every mask was counted again" if deep else ""
            click.echo(f"verified: nothing is off{again}")
    sys.exit(1 if findings.problems else 0)


@click.command()
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES_METAVAR)
@click.option("--truth", metavar="WHERE", help="As input.masks: truth/, mask.png, _mask, a column.")
@click.option("--against", metavar="RUN2", help="An earlier run of the same images.")
@click.option("--name", default="", help="Of the folder RUN/evaluation/NAME.")
@show.json_option
def evaluate(
    run: str, overrides: Arguments, truth: str | None, against: str | None, name: str, as_json: bool
) -> None:
    """Compare a run with truth, or with an earlier run. Run it again to continue."""
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override}: write --truth {override}, or --against {override}")
    if bool(truth) == bool(against):
        raise ConfigError("say what to compare with: one of --truth WHERE and --against RUN2")
    results = stored_run(run, overrides)
    from jobs.results import evaluate as task

    with show.only_document(as_json):
        if against:
            config = run_config(results, overrides, ENVIRONMENT_KEYS)
            outcome = task.compare(results, stored_run(against, overrides), config, name)
        else:
            given = (*overrides, f"input.masks={json.dumps(truth)}")
            outcome = task.evaluate(
                results, run_config(results, given, ENVIRONMENT_KEYS + TRUTH), name
            )
    if as_json:
        show.document(outcome.document)
    elif against:
        show.changed(outcome.document)
    else:
        show.scored(outcome.document)
    show.problems(outcome.set_aside.items(), "not evaluated: shard", most=None)
    if not (as_json or outcome.set_aside):
        show.lines(report=f"unet-jobs report {run} shows it too")
    sys.exit(1 if outcome.set_aside else 0)


@click.command(options_metavar="[OPTIONS]")
@click.argument("run")
@storage_argument
@click.option("--previews", metavar="DIR", help="Write PNG overlays of images there instead.")
@click.option("--ids", metavar="ID", multiple=True, help="With --previews: this image; repeatable.")
@click.option(
    "--worst",
    type=click.IntRange(min=1),
    help="With --previews: so many, lowest IoU (or confidence) first; else 20 by chance.",
)
def report(
    run: str, storage: StorageConfig, previews: str | None, ids: Arguments, worst: int | None
) -> None:
    """Write RUN/report.html: a run or a training on one page."""
    if (ids or worst) and not previews:
        raise ConfigError("--ids and --worst go with --previews DIR")
    if ids and worst:
        raise ConfigError("--ids and --worst exclude each other; give one of them")
    from jobs.results.report import write_previews, write_report

    if previews is None:
        show.lines(report=write_report(run, storage))
        return
    written, problems = write_previews(run, previews, list(ids), worst or 0, storage)
    show.lines(previews=f"{previews}, {written:,} images")
    show.problems(problems, "not drawn")
    sys.exit(1 if problems else 0)


@click.command(options_metavar="[OPTIONS]")
@click.argument("source", metavar="RUN|CHECKPOINT")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES_METAVAR)
@click.option("--format", "kind", type=click.Choice(["png", "tiff", "coco", "onnx"]))
@click.option("--out", default="", help="The folder to write; with onnx, the file.")
@click.option(
    "--objects",
    type=click.Choice(["components", "watershed"]),
    help="Objects instead of classes; watershed cuts those apart that touch.",
)
@click.option("--polygons", is_flag=True, help="With coco: outlines instead of run lengths.")
@click.option("--factory", help="With onnx: the function that a checkpoint names, if you trust it.")
def export(
    source: str,
    overrides: Arguments,
    kind: str | None,
    out: str,
    objects: str | None,
    polygons: bool,
    factory: str | None,
) -> None:
    """Write a run's masks as images or COCO, its objects as rows, its network as ONNX.

    Run it again to continue. With --objects alone, rows of objects go to RUN/objects, or to --out.
    Object numbers in 16-bit PNG look black in plain viewers; napari, QuPath and ImageJ show them.
    """
    if kind and not out:
        raise ConfigError(f"export --format {kind}: say where it goes with --out")
    if not kind and not objects:
        raise ConfigError("export: say what to write with --format, or with --objects alone")
    given = {"--objects": objects, "--polygons": polygons, "--factory": factory}
    fitting = {"onnx": ["--factory"], "coco": ["--objects", "--polygons"]}
    for option, value in given.items():
        if value and option not in fitting.get(kind or "", ["--objects"]):
            raise ConfigError(f"{option} does not go with --format {kind}")
    if kind == "onnx":
        storage = storage_of(overrides)
        from jobs.results.export import export_onnx

        size = export_onnx(source, out, storage, factory or "")
        show.lines(wrote=f"{out} (onnx, {size / 1e6:.1f} MB); the same logits under onnxruntime")
        return
    results = stored_run(source, overrides)
    config = run_config(results, overrides, ENVIRONMENT_KEYS)
    from jobs.results.export import export_run
    from unet_core.export.task import Options

    exported = export_run(results, config, Options(kind or "", objects or "", polygons), out)
    if objects and not exported.task.has_input:
        click.echo("note: the run's input is gone, so mean_intensity is null")
    if not results.run.is_finished:
        click.echo("note: the run is not finished; export again for what is still to come")
    written, failed = exported.images["ok"], exported.images["failed"]
    without = f", {failed:,} have no mask" if failed else ""
    what = f"{kind or 'rows of objects'}, {written:,} images{without}"
    show.lines(wrote=f"{exported.task.store.uri()} ({what})")
    show.problems(exported.problems, "not written")
    show.problems(exported.shards_refused.items(), "not done: shard")
    sys.exit(1 if exported.problems or exported.shards_refused else 0)
