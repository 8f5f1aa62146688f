"""The command line: the only place that reads arguments and prints. Imports stay inside the verbs,
so that ``--help`` and a wrong config cost less than a second.
"""

import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.session import LOG_FORMAT
from jobs.show import READING, show, show_causes, show_cost, show_outcome, show_totals
from unet_core import __version__
from unet_core.config import (
    ImportConfig,
    PredictConfig,
    StorageConfig,
    build,
    load,
)
from unet_core.errors import ConfigError, StoppedError, UnetJobsError
from unet_core.train_config import TrainConfig

if TYPE_CHECKING:
    from jobs.submit import JobServer

RECIPES = Path(__file__).parent / "recipes"
"""A recipe's name alone means the shipped one, if there is no such file here."""
OVERRIDES = "[SECTION.KEY=VALUE]..."


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="unet-jobs")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens to shards and actors.")
def cli(verbose: bool) -> None:
    """Segment images with a U-Net, on this machine or on a Ray cluster, into Parquet."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format=LOG_FORMAT,
    )


def main() -> None:
    """Run a verb; errors of this project become one message and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except StoppedError as error:
        click.echo(f"{error}; the same command continues there", err=True)
        sys.exit(error.exit_code)
    except UnetJobsError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command continues where this one ended", err=True)
        sys.stdout.flush()
        os._exit(StoppedError.exit_code)  # without waiting for threads that may hang for ever


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@cli.command(options_metavar="[OPTIONS]")
@click.argument("source", metavar="CONFIG.toml|IMAGES")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES)
@click.option("--model", help="Checkpoint, where IMAGES is given.  [default: builtin:nuclei]")
@click.option("--out", help="Run folder, where IMAGES is given.")
@click.option("--retry-failed", is_flag=True, help="Do shards with failed images again.")
@click.option("--refresh", is_flag=True, help="Add images that are new in the input.")
def predict(
    source: str,
    overrides: tuple[str, ...],
    model: str | None,
    out: str | None,
    retry_failed: bool,
    refresh: bool,
) -> None:
    """Segment everything that is not committed yet. Run it again to continue."""
    config = _predict_config(source, overrides, model, out)
    from jobs.predict import predict as run_predict

    outcome = run_predict(config, retry_failed, refresh)
    show_outcome(outcome)
    if outcome.too_many_failed:
        show_causes(outcome, config)
    if not outcome.is_complete:
        sys.exit(1)


@cli.command(options_metavar="[OPTIONS]")
@click.argument("source", metavar="CONFIG.toml|IMAGES")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES)
@click.option("--model", help="Checkpoint, where IMAGES is given.")
@click.option("--out", help="Run folder, where IMAGES is given.")
@click.option("--cost", is_flag=True, help="Segment a few shards to tell what the rest will take.")
@click.option("--price", type=click.FloatRange(min=0), help="With --cost: of an hour of one GPU.")
def plan(
    source: str,
    overrides: tuple[str, ...],
    model: str | None,
    out: str | None,
    cost: bool,
    price: float | None,
) -> None:
    """Show what predict would do. Leaves nothing behind."""
    if price is not None and not cost:
        raise ConfigError("--price goes with --cost")
    config = _predict_config(source, overrides, model, out)
    from jobs.inspect import plan as make_plan

    made = make_plan(config)
    size = sum(shard.bytes for shard in made.shards)
    left = sum(shard.bytes for shard in made.left)
    show(
        run=made.uri + (" (finished)" if made.is_finished else ""),
        input=f"{config.input.uri} ({made.format})",
        shards=f"{len(made.shards):,}, {len(made.left):,} left",
        images="known when the tars are read" if made.images is None else f"{made.images:,}",
        bytes=f"{size / 1e9:.3f} GB, {left / 1e9:.3f} GB left",
        workers=made.workers,
    )
    if cost:
        from jobs.cost import estimate

        show_cost(estimate(config), price)


@cli.command(options_metavar="[OPTIONS]")
@click.argument("verb", type=click.Choice(["predict", "train"]), metavar="predict|train")
@click.argument("path", metavar="CONFIG.toml")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES)
@click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="Ray's job server, e.g. http://localhost:8265.  [env: RAY_API_SERVER_ADDRESS]",
)
@click.option("--follow", is_flag=True, help="Show its progress until it ends, and exit as it did.")
@click.option("--retry-failed", is_flag=True, help="As of predict.")
@click.option("--refresh", is_flag=True, help="As of predict.")
def submit(
    verb: str,
    path: str,
    overrides: tuple[str, ...],
    address: str,
    follow: bool,
    retry_failed: bool,
    refresh: bool,
) -> None:
    """Run predict or train as a job on a Ray cluster.

    Submitted again, a run is followed where it is at work, and continued where it ended.
    """
    config: PredictConfig | TrainConfig
    given = {"--retry-failed": retry_failed, "--refresh": refresh}
    flags = tuple(flag for flag, is_given in given.items() if is_given)
    if flags and verb != "predict":
        raise ConfigError(f"{flags[0]} goes with predict")
    if verb == "predict":
        config = load(PredictConfig, path, list(overrides))
    else:
        path = _recipe(path)
        config = load(TrainConfig, path, list(overrides))
    from jobs.package import pack as pack_job

    is_verbose = logging.getLogger().isEnabledFor(logging.INFO)
    packed = pack_job(verb, path, list(overrides), config)
    package = replace(packed, is_verbose=is_verbose, flags=flags)
    from jobs.submit import JobServer, run_name

    name = run_name(verb, config)
    show(job=name)
    server = JobServer(address)
    job = server.submit(name, package, config)
    if job.before:
        click.echo(f"{job.before} as {job.id}")
    if not job.is_new:
        click.echo(f"{job.id} is at work already")
    if follow:
        sys.exit(_follow(server, job.id))
    show(follow="the same command with --follow")
    show(stop=f"ray job stop --address {address} {job.id}")


def _follow(server: "JobServer", job_id: str) -> int:
    """Show a job until it ends; Ctrl-C asks whether to stop it or to leave it alone."""
    from jobs.progress import FollowedProgress
    from jobs.submit import Follower

    shown = FollowedProgress()
    follower = Follower(server, job_id, shown.show)
    while True:
        try:
            with shown:
                code, how = follower.follow()
            click.echo(how)
            return code
        except KeyboardInterrupt:
            answer = "d"
            if sys.stdin.isatty():
                question = "\n[s]top the job, [d]etach and let it run, or [f]ollow on?"
                answer = click.prompt(question, default="f", type=click.Choice(["s", "d", "f"]))
            if answer == "d":
                click.echo(f"{job_id} runs on; the same command follows it again", err=True)
                return StoppedError.exit_code
            if answer == "s":
                server.stop(job_id)


@cli.command()
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[STORAGE.KEY=VALUE]...")
def status(run: str, overrides: tuple[str, ...]) -> None:
    """Show how a run stands."""
    storage = _storage(overrides)
    from jobs.inspect import TrainingStatus
    from jobs.inspect import status as read_status

    found = read_status(run, storage)
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


@cli.command()
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[STORAGE.KEY=VALUE]...")
@click.option("--deep", is_flag=True, help="Also recount the input and every mask.")
def verify(run: str, overrides: tuple[str, ...], deep: bool) -> None:
    """Check digests, reconciliation and orphans. Exit code 1 if anything is off."""
    storage = _storage(overrides)
    from unet_core.verify import verify as check

    findings = check(run, deep, storage)
    show(run=run, shards=f"{findings.committed:,} of {findings.shards:,} committed")
    show_totals(findings.totals, findings.class_names)
    for note in findings.notes:
        click.echo(f"note: {note}")
    for problem in findings.problems:
        click.echo(f"problem: {problem}")
    if findings.problems:
        sys.exit(1)
    click.echo("verified: nothing is off" + (", recounted from the input" if deep else ""))


@cli.command()
@click.argument("source")
@click.argument("destination")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES)
@click.option("--format", "kind", type=click.Choice(["webdataset", "parquet"]), required=True)
@click.option(
    "--shard-mb",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Size of a shard in megabytes.",
)
def pack(
    source: str, destination: str, overrides: tuple[str, ...], kind: str, shard_mb: int
) -> None:
    """Pack loose images, and their masks (input.masks=...), into balanced shards."""
    table = {"input": {"uri": source}, "output": {"uri": destination}}
    config = build(PredictConfig, table, list(overrides), source="command line")
    from jobs.pack import pack as run_pack

    packed = run_pack(config, kind, shard_mb * 10**6)
    show(shards=f"{packed.shards:,} new, {packed.kept:,} were there already")
    show(images=f"{packed.images:,}, {packed.masks:,} with a mask", packed_into=destination)


@cli.command()
@click.argument("source", metavar="CONFIG.toml|IMAGES [MASKS]")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES)
@click.option("--out", help="Folder of the training, where IMAGES and MASKS are given.")
def train(source: str, overrides: tuple[str, ...], out: str | None) -> None:
    """Train a network on images with masks. Run it again to continue."""
    config = _train_config(source, list(overrides), out)
    from jobs.train import train as run_train

    trained = run_train(config)
    if trained.was_finished:
        click.echo(f"{config.output.uri} is finished already; nothing was written")
    value = "–" if trained.value is None else f"{trained.value:.4f}"
    show(steps=f"{trained.step:,}, the best after {trained.best_step:,}")
    show(best=f"{trained.best} (val {trained.metric} {value})")
    show(predict=f"unet-jobs predict IMAGES --model {trained.best} --out RUN")


@cli.command(options_metavar="[OPTIONS]")
@click.argument("name", metavar="[PRESET|CHECKPOINT]", default="")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--factory", default="", help="The function that a checkpoint names, if you trust it."
)
def model(name: str, options: tuple[str, ...], factory: str) -> None:
    """Show all presets, or one network layer by layer: shapes, parameters, GFLOP, what it sees.

    Options are those of a preset (width=32 depth=3 in_channels=1 classes=2 ...) and side=PIXELS.
    """
    from rich.console import Console

    from jobs.describe import describe, layers_table, presets_table, sentences

    if not name:
        Console().print(presets_table())
        return
    described = describe(name, list(options), factory)
    Console().print(layers_table(described))
    show(**sentences(described.tiling))


@cli.command("import-weights")
@click.argument("source")
@click.argument("destination")
@click.argument("overrides", nargs=-1, metavar="[MODEL.KEY=VALUE]...")
@click.option("--layout", help="Which published U-Net, where the keys fit several.")
@click.option("--factory", help="package.module:function that makes another network.")
def import_weights(
    source: str,
    destination: str,
    overrides: tuple[str, ...],
    layout: str | None,
    factory: str | None,
) -> None:
    """Make a checkpoint of weights from elsewhere: .pt, .pth or .safetensors.

    Say what the network was trained on with model.color=rgb, model.normalisation=range (pixels to
    0..1) or others, and model.classes='["background", "cell"]'.
    """
    chosen = {"layout": layout, "factory": factory}
    table = {
        "source": source,
        "destination": destination,
        "model": {key: value for key, value in chosen.items() if value},
    }
    config = build(ImportConfig, table, list(overrides), source="command line")
    from unet_core.networks.weights import import_weights as run_import

    header = run_import(config)
    wanted, tiling = header.preprocessing, header.tiling
    kind = "exact tiles" if tiling.is_exact else "blended tiles"
    show(
        wrote=destination,
        network=f"{header.network.in_channels} channels, {', '.join(header.class_names)}",
        images=f"{wanted.color}, {wanted.normalisation}",
        tiles=f"{kind}, halo {tiling.halo}, sides {tiling.sides}",
    )


@cli.command(options_metavar="[OPTIONS]")
@click.argument("source", metavar="RUN|CHECKPOINT")
@click.argument("overrides", nargs=-1, metavar="[STORAGE.KEY=VALUE]...")
@click.option("--format", "kind", type=click.Choice(["onnx"]), required=True)
@click.option("--out", required=True, help="The file to write.")
@click.option(
    "--factory", default="", help="The function that a checkpoint names, if you trust it."
)
def export(source: str, overrides: tuple[str, ...], kind: str, out: str, factory: str) -> None:
    """Write a run's or a checkpoint's network as ONNX, with its logits compared."""
    storage = _storage(overrides)
    from jobs.export import export_onnx

    size = export_onnx(source, out, storage, factory)
    show(wrote=f"{out} ({kind}, {size / 1e6:.1f} MB); the same logits under onnxruntime")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), default="demo")
@click.option("--data-only", is_flag=True, help="Write the sample data and its config, no more.")
def demo(folder: Path, data_only: bool) -> None:
    """Try it: sample images, a run on two local Ray actors, a picture."""
    from jobs.demo import demo as run_demo
    from jobs.demo import write_data

    if data_only:
        click.echo(f"wrote {folder}/images and {write_data(folder)}")
        return
    shown = run_demo(folder)
    show_outcome(shown.outcome)
    show(config=str(shown.config), look_at=str(shown.sheet))
    click.echo(READING.format(run=shown.outcome.run.uri))


def _predict_config(
    source: str, overrides: tuple[str, ...], model: str | None, out: str | None
) -> PredictConfig:
    if source.endswith(".toml"):
        if model or out:
            raise ConfigError(f"--model and --out go with IMAGES; {source} has keys for both")
        return load(PredictConfig, source, list(overrides))
    if not out and not any(o.startswith("output.uri=") for o in overrides):
        raise ConfigError(f"predict {source}: say where the run goes with --out RUN")
    table: dict[str, Any] = {"input": {"uri": source}, "output": {}}
    if model:
        table["model"] = {"checkpoint": model}
    if out:
        table["output"]["uri"] = out
    return build(PredictConfig, table, list(overrides), source="command line")


def _train_config(source: str, overrides: list[str], out: str | None) -> TrainConfig:
    if source.endswith(".toml"):
        if out:
            raise ConfigError(f"--out goes with IMAGES MASKS; {source} has output.uri")
        return load(TrainConfig, _recipe(source), overrides)
    if not overrides or "=" in overrides[0] or not out:
        raise ConfigError("write: train IMAGES MASKS --out FOLDER, or: train CONFIG.toml")
    masks = overrides.pop(0)
    pair = {"uri": source, "masks": masks if "/" in masks else f"./{masks}"}
    table: dict[str, Any] = {"data": {"train": pair}, "output": {"uri": out}}
    return build(TrainConfig, table, overrides, source="command line")


def _recipe(path: str) -> str:
    """A file as it is, or the shipped recipe of that name."""
    shipped = RECIPES / path
    return str(shipped) if not Path(path).exists() and shipped.is_file() else path


def _storage(overrides: tuple[str, ...]) -> StorageConfig:
    """The storage section that overrides make."""
    for override in overrides:
        if not override.startswith("storage."):
            raise ConfigError(f"{override}: only storage.key=value goes here")
    places = {"input": {"uri": "input"}, "output": {"uri": "output"}}
    return build(PredictConfig, places, list(overrides), source="command line").storage
