"""The verb that brings a run into the forms of other programs: export."""

import sys
from typing import TYPE_CHECKING

import click

from jobs.verbs.arguments import OVERRIDES, REACH, run_config, storage_of, stored_run
from jobs.verbs.show import show, show_problems
from unet_core.errors import ConfigError

if TYPE_CHECKING:
    from jobs.export import Exported

PROBLEMS_SHOWN = 10


@click.command(options_metavar="[OPTIONS]")
@click.argument("source", metavar="RUN|CHECKPOINT")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES)
@click.option("--format", "kind", type=click.Choice(["png", "tiff", "coco", "onnx"]))
@click.option("--out", default="", help="The folder to write; with onnx, the file.")
@click.option(
    "--objects",
    type=click.Choice(["components", "watershed"]),
    help="Objects instead of classes; watershed cuts those apart that touch.",
)
@click.option("--polygons", is_flag=True, help="With coco: outlines instead of run lengths.")
@click.option(
    "--factory",
    default="",
    help="With onnx: the function that a checkpoint names, if you trust it.",
)
def export(
    source: str,
    overrides: tuple[str, ...],
    kind: str | None,
    out: str,
    objects: str | None,
    polygons: bool,
    factory: str,
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
        _onnx(source, out, overrides, factory)
        return
    results = stored_run(source, overrides)
    config = run_config(results, overrides, REACH)
    from jobs.export import export_run
    from unet_core.export.task import Options

    options = Options(kind or "", objects or "", polygons)
    exported = export_run(results, config, options, out)
    if objects and not exported.has_input:
        click.echo("note: the run's input is gone, so mean_intensity is null")
    if not exported.is_all:
        click.echo("note: the run is not finished; export again for what is still to come")
    _show(exported, kind or "rows of objects")


def _onnx(source: str, out: str, overrides: tuple[str, ...], factory: str) -> None:
    storage = storage_of(overrides)
    from jobs.export import export_onnx

    size = export_onnx(source, out, storage, factory)
    show(wrote=f"{out} (onnx, {size / 1e6:.1f} MB); the same logits under onnxruntime")


def _show(exported: "Exported", what: str) -> None:
    without = f", {exported.failed:,} have no mask" if exported.failed else ""
    show(wrote=f"{exported.uri} ({what}, {exported.written:,} images{without})")
    show_problems(exported.problems, "not written", PROBLEMS_SHOWN)
    show_problems([*exported.shards_refused.items()], "not done: shard", PROBLEMS_SHOWN)
    if exported.problems or exported.shards_refused:
        sys.exit(1)
