"""Commands around a run or a training: predict, train, plan, submit, bench, pack, doctor, demo."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.commands import show
from jobs.commands.arguments import (
    OVERRIDES_METAVAR,
    Arguments,
    from_arguments,
    predict_config,
    recipe,
    train_config,
)
from unet_core.config.loading import load
from unet_core.config.predict import PredictConfig
from unet_core.config.train import TrainConfig
from unet_core.errors import ConfigError, StoppedError

if TYPE_CHECKING:
    from jobs.submission.job_server import JobServer

DISCARDED_OUTPUT = "memory://nowhere"
DEMO = """\
[input]
uri = "{folder}/images"
masks = "mask.png"            # each KEY.png has its truth in KEY.mask.png

[model]
checkpoint = "builtin:nuclei"

[output]
uri = "{folder}/run"

[workers]
count = 2
cpus = 1
"""


@click.command(options_metavar="[OPTIONS]")
@click.argument("source", metavar="CONFIG.toml|IMAGES")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES_METAVAR)
@click.option("--model", help="Checkpoint, where IMAGES is given.  [default: builtin:nuclei]")
@click.option("--out", help="Run folder, where IMAGES is given.")
@click.option("--retry-failed", is_flag=True, help="Do shards with failed images again.")
@click.option("--refresh", is_flag=True, help="Add images that are new in the input.")
def predict(
    source: str, overrides: Arguments, model: str | None, out: str | None, **flags: bool
) -> None:
    """Segment everything that is not committed yet. Run it again to continue."""
    config = predict_config(source, overrides, model, out)
    from jobs.predict import predict as run_predict

    outcome = run_predict(config, **flags)
    show.outcome(outcome)
    if outcome.too_many_failed:
        show.causes(outcome, config)
    sys.exit(0 if outcome.is_complete else 1)


@click.command()
@click.argument("source", metavar="CONFIG.toml|IMAGES [MASKS]")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES_METAVAR)
@click.option("--out", help="Folder of the training, where IMAGES and MASKS are given.")
def train(source: str, overrides: Arguments, out: str | None) -> None:
    """Train a network on images with masks. Run it again to continue."""
    config = train_config(source, list(overrides), out)
    from jobs.train import train as run_train

    trained = run_train(config)
    if trained.was_finished:
        click.echo(f"{config.output.uri} is finished already; nothing was written")
    at = trained.position
    show.lines(
        steps=f"{at.step:,}, the best after {at.best_step:,}",
        best=f"{trained.best} (val {config.train.best} {show.score_text(at.best)})",
        report=trained.report,
        predict=f"unet-jobs predict IMAGES --model {trained.best} --out RUN",
    )


@click.command(options_metavar="[OPTIONS]")
@click.argument("source", metavar="CONFIG.toml|IMAGES")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES_METAVAR)
@click.option("--model", help="Checkpoint, where IMAGES is given.")
@click.option("--out", help="Run folder, where IMAGES is given.")
@click.option("--cost", is_flag=True, help="Segment a few shards to tell what the rest will take.")
@click.option("--price", type=click.FloatRange(min=0), help="With --cost: of an hour of one GPU.")
@show.json_option
def plan(
    source: str,
    overrides: Arguments,
    model: str | None,
    out: str | None,
    cost: bool,
    price: float | None,
    as_json: bool,
) -> None:
    """Show what predict would do. Leaves nothing behind."""
    if price is not None and not cost:
        raise ConfigError("--price goes with --cost")
    config = predict_config(source, overrides, model, out)
    from jobs.tools.cost import estimate
    from jobs.tools.plan import plan as make_plan

    with show.only_document(as_json):
        made = make_plan(config)
        if not as_json:
            show.plan(made)
        found = estimate(config, price) if cost else None
    if as_json:
        show.document(made, cost=found)
    elif found is not None:
        show.cost(found)


@click.command(options_metavar="[OPTIONS]")
@click.argument("verb", type=click.Choice(["predict", "train"]), metavar="predict|train")
@click.argument("path", metavar="CONFIG.toml")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES_METAVAR)
@click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="Ray's job server, e.g. http://localhost:8265.  [env: RAY_API_SERVER_ADDRESS]",
)
@click.option("--follow", is_flag=True, help="Show its progress until it ends, and exit as it did.")
@click.option("--retry-failed", is_flag=True, help="As for predict.")
@click.option("--refresh", is_flag=True, help="As for predict.")
def submit(
    verb: str, path: str, overrides: Arguments, address: str, follow: bool, **given: bool
) -> None:
    """Run predict or train as a job on a Ray cluster.

    Submitted again, a run is followed where it is at work, and continued where it ended.
    """
    flags = tuple(f"--{name.replace('_', '-')}" for name in sorted(given) if given[name])
    if flags and verb != "predict":
        raise ConfigError(f"{flags[0]} goes with predict")
    if verb == "train":
        path = recipe(path)
    kind: type[PredictConfig | TrainConfig] = PredictConfig if verb == "predict" else TrainConfig
    config = load(kind, path, list(overrides))
    from jobs.submission.job_server import JobServer, run_name, stop_command
    from jobs.submission.package import pack as pack_job

    package = pack_job(verb, path, list(overrides), config, flags)
    name = run_name(verb, config)
    show.lines(job=name)
    server = JobServer(address)
    job = server.submit(name, package, config)
    if job.before:
        click.echo(f"{job.before}; the same run goes on as {job.id}")
    if not job.is_new:
        click.echo(f"{job.id} is at work already")
    if follow:
        sys.exit(_follow(server, job.id))
    show.lines(
        follow="the same command with --follow",
        stop=stop_command(address, job.id),
    )


def _follow(server: "JobServer", job_id: str) -> int:
    """Show a job until it ends; Ctrl-C asks whether to stop it or to leave it alone."""
    from jobs.progress import FollowedProgress
    from jobs.submission.job_server import Follower

    shown = FollowedProgress()
    follower = Follower(server, job_id, shown.on_line)
    while True:
        try:
            with shown:
                code, how = follower.follow()
            click.echo(how)
            return code
        except KeyboardInterrupt:
            answer = "d"
            if sys.stdin.isatty():
                answer = click.prompt(
                    "\n[s]top the job, [d]etach and let it run, or [f]ollow on?",
                    default="f",
                    type=click.Choice(["s", "d", "f"]),
                )
            if answer == "d":
                click.echo(f"{job_id} runs on; the same command follows it again", err=True)
                return StoppedError.exit_code
            if answer == "s":
                server.stop(job_id)


@click.command(options_metavar="[OPTIONS]")
@click.argument("source", metavar="CONFIG.toml|IMAGES")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES_METAVAR)
@click.option("--model", help="Checkpoint, where IMAGES is given.")
@show.json_option
def bench(source: str, overrides: Arguments, model: str | None, as_json: bool) -> None:
    """Measure what this machine allows, its model and the whole job. Keeps nothing."""
    config = predict_config(source, overrides, model, None, DISCARDED_OUTPUT)
    from jobs.tools.bench import bench as measure

    measured = measure(config)
    if as_json:
        show.document(measured)
    else:
        show.bench(measured)


@click.command()
@click.argument("source")
@click.argument("destination")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES_METAVAR)
@click.option("--format", "kind", type=click.Choice(["webdataset", "parquet"]), required=True)
@click.option(
    "--shard-mb",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Size of a shard in megabytes.",
)
def pack(source: str, destination: str, overrides: Arguments, kind: str, shard_mb: int) -> None:
    """Pack loose images, and their masks (input.masks=...), into balanced shards."""
    config = from_arguments(
        PredictConfig, overrides, input={"uri": source}, output={"uri": destination}
    )
    from jobs.tools.pack import pack as run_pack

    packed = run_pack(config, kind, shard_mb * 10**6)
    show.lines(
        shards=f"{packed.shards:,} new, {packed.kept:,} were there already",
        images=f"{packed.images:,}, {packed.masks:,} with a mask",
        packed_into=destination,
    )


@click.command()
@click.argument("source", metavar="[CONFIG.toml|IMAGES]", default="")
@click.argument("overrides", nargs=-1, metavar=OVERRIDES_METAVAR)
@show.json_option
def doctor(source: str, overrides: Arguments, as_json: bool) -> None:
    """Check this machine, its cluster, and with a config or a place of images whether they can be
    reached. Exit code 1 if anything is wrong.

    With IMAGES, output.uri=RUN checks that a run could be written there.
    """
    config = predict_config(source, overrides, None, None, DISCARDED_OUTPUT) if source else None
    from jobs.tools.doctor import diagnose

    with show.only_document(as_json):
        found = diagnose(config)
    is_ok = all(check.is_ok for check in found)
    if as_json:
        show.document({"checks": found}, is_ok=is_ok)
    else:
        show.checks(found)
    sys.stdout.flush()
    if any(check.hangs for check in found):
        os._exit(1)  # what it waits for may never come
    sys.exit(0 if is_ok else 1)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default="demo")
def demo(folder: Path) -> None:
    """Try it: sample images, a run on two local Ray actors, a report."""
    from jobs.predict import predict as run_predict
    from unet_core.synthetic import write_webdataset

    write_webdataset(folder / "images", images=64, shards=8)
    config = folder / "predict.toml"
    config.write_text(DEMO.format(folder=folder.as_posix()), encoding="utf-8")
    show.outcome(run_predict(load(PredictConfig, str(config), [])))
    show.lines(config=str(config))
