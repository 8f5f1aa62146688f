"""What the verbs tell: names and texts in two columns, problems on standard error."""

import re
from typing import TYPE_CHECKING

import click

from unet_core.config import PredictConfig

if TYPE_CHECKING:
    from jobs.cost import Cost
    from jobs.predict import Outcome
    from unet_core.metrics import Totals

ACTORS_SHOWN = (1, 8, 64)
READING = """\
read it:  import pyarrow.dataset as ds
          print(ds.dataset("{run}/metrics").to_table().to_pandas())"""
LOOKING = """\
all of them:  import pyarrow.dataset as ds
              print(ds.dataset("{run}/metrics").to_table(filter=ds.field("status") == "failed"))
go on with a larger budget: errors.max_failed_images=0.2
if the cause is gone (what was missing is back, memory is free): --retry-failed
if images were mended: they are others now, and need a new run"""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def show_cost(cost: "Cost", price: float | None) -> None:
    """What the rest of a run will take, and what a million images do."""
    about = "" if cost.is_counted else "about "
    show(
        measured=f"{cost.images:,} images in {cost.shards} shards, {cost.images_per_s:,.1f} "
        f"images/s (± {cost.spread:.0%}) on one actor, {cost.device}",
        left=f"{about}{cost.images_left:,} images; masks and metrics {cost.output_bytes / 1e9:,.3g}"
        " GB",
        time="; ".join(f"{n} actor{'s' * (n > 1)} {_time(cost.hours_on(n))}" for n in ACTORS_SHOWN),
    )
    hours = cost.device_hours_per_million
    unit = "actor-hours" if cost.device.startswith("cpu") else "GPU-hours"
    money = f", at {price:g} each: {_span(hours, price)}" if price is not None else ""
    show(million=f"{_span(hours)} {unit}{money}")


def _time(hours: tuple[float, float]) -> str:
    units = {"h": 1.0, "min": 60.0, "s": 3600.0}
    unit = next((u for u, each in units.items() if hours[1] * each >= 2), "s")
    return f"{_span(hours, units[unit])} {unit}"


def _span(values: tuple[float, float], factor: float = 1.0) -> str:
    return " to ".join(f"{value * factor:,.3g}" for value in values)


def show_outcome(outcome: "Outcome") -> None:
    """How a run stands after ``predict``."""
    run, record = outcome.run.uri, outcome.run.record
    if outcome.was_finished:
        click.echo(f"{run} is finished already; nothing was written")
    if outcome.done_again:
        show(again=f"{outcome.done_again:,} shards with failed images")
    if outcome.added:
        show(added=f"{outcome.added:,} shards of new objects")
    show_totals(outcome.totals, record.class_names if record else ())
    show(masks=f"{run}/masks/*.parquet", metrics=f"{run}/metrics/*.parquet")
    for shard, reason in outcome.set_aside.items():
        click.echo(_harmless(f"not committed: shard {shard}: {reason}"), err=True)


def show_causes(outcome: "Outcome", config: PredictConfig) -> None:
    """Why too many images failed, and what to do."""
    from jobs.budget import Budget
    from unet_core.failures import causes

    totals, run = outcome.totals, outcome.run.uri
    click.echo(
        f"error: {totals.failed:,} of {totals.images_seen:,} images failed, "
        f"errors.max_failed_images is {Budget.of(config.errors)}; most frequent:",
        err=True,
    )
    for cause in causes(outcome.run, totals):
        click.echo(f"  {cause.images:,} x {cause.code}", err=True)
        for example in cause.examples:
            click.echo(_harmless(f"    {example.image_id}: {example.message}"), err=True)
    click.echo(LOOKING.format(run=run), err=True)


def show_problems(problems: list[tuple[str, str]], what: str, most: int) -> None:
    """The first of those that something could not be done with, and how many more there are."""
    for name, reason in problems[:most]:
        click.echo(_harmless(f"{what}: {name}: {reason}"), err=True)
    if len(problems) > most:
        click.echo(f"{what}: {len(problems) - most:,} more", err=True)


def show_totals(totals: "Totals", class_names: tuple[str, ...]) -> None:
    """Sums, failures by code, and scores where there is truth."""
    balance = "=" if totals.is_reconciled else "≠"
    show(
        images=f"{totals.images_seen:,} seen {balance} {totals.ok:,} ok + {totals.failed:,} failed"
    )
    for code, count in totals.errors.items():
        click.echo(f"{'':<10}{count:,} x {code}")
    if totals.ok > 1 and sum(count > 0 for count in totals.class_pixels) == 1:
        only = next(name for name, n in zip(class_names, totals.class_pixels, strict=True) if n)
        click.echo(
            f"warning: every pixel of all {totals.ok:,} images is {only!r}; is this the model "
            "for these images? See model.threshold, and what the model was trained on",
            err=True,
        )
    if totals.with_truth:
        show(truth=f"{totals.with_truth:,} of {totals.ok:,} images")
        for name, score in zip(class_names, totals.scores, strict=True):
            if score.iou is not None and score.dice is not None:
                click.echo(f"{'':<10}{name}: Dice {score.dice:.4f}, IoU {score.iou:.4f}")


def show(**lines: str) -> None:
    """Lines of a name and a text each."""
    for name, text in lines.items():
        click.echo(f"{name.replace('_', ' ') + ':':<10}{text}")


def _harmless(text: str) -> str:
    """A line in which names from elsewhere cannot move the cursor or begin another line."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
