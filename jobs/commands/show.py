"""Output of the commands: names and texts in two columns, problems on standard error."""

import contextlib
import dataclasses
import json
import math
import re
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from unet_core.config.predict import PredictConfig

if TYPE_CHECKING:
    from jobs.predict import Outcome
    from jobs.tools.bench import Bench
    from jobs.tools.cost import Cost
    from jobs.tools.doctor import Check
    from jobs.tools.plan import Plan
    from unet_core.metrics import Totals

ACTORS_SHOWN = (1, 8, 64)
LOOKING = """\
all of them:  import pyarrow.dataset as ds
              rows = ds.dataset("{run}/metrics").to_table(filter=ds.field("status") == "failed")
              print(rows.to_pandas()[["image_id", "error_message"]])
go on with a larger budget, e.g. errors.max_failed_images={enough} (a share; or a number)
if the cause is gone (what was missing is back, memory is free): --retry-failed
if images were mended: they are others now, and need a new run"""
SCORES = {"dice": "Dice", "iou": "IoU", "precision": "precision", "recall": "recall"}
UNDEFINED = "–: the class is in no truth (recall), in no mask (precision), or in neither"
WITHOUT_SCORE = {
    "without_truth": "without truth",
    "failed": "failed when they were segmented",
    "unusable_truth": "whose truth is of no use",
}
NOT_COMPARED = {
    "only_here": "only in this run",
    "only_there": "only in the other",
    "failed_there": "failed only in the other",
    "failed_here": "failed only in this run",
    "unusable_there": "cannot be compared",
}
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def document(value: Any, **more: Any) -> None:
    """Print one JSON document: fields and properties of a dataclass, or a dict, and more keys."""
    click.echo(json.dumps({**_plain(value), **_plain(more)}, indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    """Convert a value to JSON's types; NaN and infinities become null."""
    if dataclasses.is_dataclass(value):
        derived = [name for name, what in vars(type(value)).items() if isinstance(what, property)]
        names = [field.name for field in dataclasses.fields(value)] + derived
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def only_document(as_json: bool) -> contextlib.redirect_stdout[TextIO]:
    """Send other output, such as that of Ray's actors, to standard error if ``as_json``."""
    return contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout)


def checks(checks: "list[Check]") -> None:
    """Print a line for each check."""
    width = max(len(check.name) for check in checks) + 1
    for check in checks:
        mark = "ok   " if check.is_ok else "WRONG"
        click.echo(f"{mark} {check.name + ':':<{width}} {harmless(check.says)}")


def plan(plan: "Plan") -> None:
    """Print the plan of a run."""
    from unet_core.inputs.shards import described

    lines(
        run=plan.uri + (" (finished)" if plan.is_finished else ""),
        input=f"{plan.input} ({plan.format})",
        shards=f"{plan.shards:,}, {plan.shards_left:,} left, work for as many workers at most",
        images="known when the tars are read" if plan.images is None else f"{plan.images:,}",
        bytes=f"{plan.bytes / 1e9:.3f} GB, {plan.bytes_left / 1e9:.3f} GB left",
        workers=plan.workers,
        passed_over=described(plan.passed_over),
    )


def bench(bench: "Bench") -> None:
    """Print the rates of the device, the model, the stages and the job."""
    lines(
        machine=f"{bench.device}, {bench.lanes} lanes",
        sample=f"{bench.images:,} images, {bench.megapixels:,.2f} Mpx in {bench.shards} shards",
        limit=f"{bench.matrix_gflop_per_s:,.0f} GFLOP/s at {bench.gflop_per_megapixel:,.1f} "
        f"GFLOP/Mpx: {bench.limit:,.2f} Mpx/s",
        model=f"{bench.model:,.2f} Mpx/s, {bench.model_over_limit:.2f} of the limit",
        stages=f"read {bench.read:,.3g}, decode {bench.decode:,.3g}, encode {bench.encode:,.3g}, "
        f"write {bench.write:,.3g} Mpx/s on one thread each",
        job=f"{bench.job:,.2f} Mpx/s ({bench.images_per_s:,.1f} images/s), "
        f"{bench.job_over_model:.2f} of the model, {bench.job_over_work:.2f} of model, decoding "
        "and encoding",
        device=shares(bench.waited),
        memory=f"{bench.peak_memory_bytes / 1e6:,.0f} MB at most",
    )


def shares(shares: dict[str, float]) -> str:
    """Return shares of a device's time as text."""
    return ", ".join(f"{what} {share:.0%}" for what, share in shares.items())


def cost(cost: "Cost") -> None:
    """Print time and size of the rest of a run, and the hours of a million images."""
    about = "" if cost.is_counted else "about "
    unit = "actor-hours" if cost.device.startswith("cpu") else "GPU-hours"
    prices = cost.price_per_million
    money = "" if prices is None else f", at {cost.price:g} each: {_span(prices)}"
    lines(
        measured=f"{cost.images:,} images in {cost.shards} shards, {cost.images_per_s:,.1f} "
        f"images/s (± {cost.spread:.0%}) on one actor, {cost.device}",
        left=f"{about}{cost.images_left:,} images; masks and metrics {cost.output_bytes / 1e9:,.3g}"
        " GB",
        time="; ".join(f"{n} actor{'s' * (n > 1)} {_time(cost.hours_on(n))}" for n in ACTORS_SHOWN),
        million=f"{_span(cost.device_hours_per_million)} {unit}{money}",
    )


def _time(hours: tuple[float, float]) -> str:
    units = {"h": 1.0, "min": 60.0, "s": 3600.0}
    unit = next((u for u, each in units.items() if hours[1] * each >= 2), "s")
    return f"{_span(hours, units[unit])} {unit}"


def _span(values: tuple[float, float], factor: float = 1.0) -> str:
    return " to ".join(f"{value * factor:,.3g}" for value in values)


def outcome(outcome: "Outcome") -> None:
    """Print the state of a run after ``predict``."""
    from unet_core.inputs.shards import described

    run, record = outcome.run.uri, outcome.run.record
    if outcome.was_finished:
        click.echo(f"{run} is finished already; nothing was written")
    lines(
        again=f"{outcome.retried:,} shards with failed images" if outcome.retried else "",
        added=f"{outcome.added:,} shards of new objects" if outcome.added else "",
    )
    totals(outcome.totals, record.class_names if record else ())
    lines(
        masks=f"{run}/masks/*.parquet",
        metrics=f"{run}/metrics/*.parquet",
        report=outcome.report,
        passed_over=described(outcome.passed_over),
    )
    problems(outcome.set_aside.items(), "not committed: shard", most=None)


def causes(outcome: "Outcome", config: PredictConfig) -> None:
    """Print the causes of failed images, and what can be done."""
    from unet_core.runs.failures import causes

    totals, run, most = outcome.totals, outcome.run.uri, config.errors.max_failed_images
    budget = f"{most:,}" if isinstance(most, int) else f"{100 * most:g} %"
    click.echo(
        f"error: {totals.failed:,} of {totals.images_seen:,} images failed, "
        f"errors.max_failed_images is {budget}; most frequent:",
        err=True,
    )
    for cause in causes(outcome.run, totals):
        click.echo(f"  {cause.images:,} x {cause.code}", err=True)
        for image_id, message in cause.examples:
            click.echo(harmless(f"    {image_id}: {message}"), err=True)
    enough = math.ceil(10 * totals.failed / totals.images_seen) / 10
    click.echo(LOOKING.format(run=run, enough=enough), err=True)


def problems(problems: Collection[tuple[str, str]], what: str, most: int | None = 10) -> None:
    """Print the first problems, each a name and a reason, and the number of the others."""
    for name, reason in list(problems)[:most]:
        click.echo(harmless(f"{what}: {name}: {reason}"), err=True)
    if most is not None and len(problems) > most:
        click.echo(f"{what}: {len(problems) - most:,} more", err=True)


def totals(totals: "Totals", class_names: tuple[str, ...]) -> None:
    """Print sums, failures by code, and scores where there is truth."""
    balance = "=" if totals.is_reconciled else "≠"
    lines(
        images=f"{totals.images_seen:,} seen {balance} {totals.ok:,} ok + {totals.failed:,} failed"
    )
    for code, count in totals.errors.items():
        line("", f"{count:,} x {code}")
    if totals.invalid_pixels:
        share = totals.invalid_pixels / totals.pixels
        lines(nodata=f"{share:.2%} of all pixels are no data: nodata values, alpha or masks")
    if totals.extrapolated:
        lines(
            extrapolated=f"{totals.extrapolated:,} of {totals.ok:,} images: a stretch far beyond "
            "those of training, as empty ones have (is_extrapolated in the metrics)"
        )
    warn_of_one_class(totals, class_names)
    if totals.with_truth:
        lines(truth=f"{totals.with_truth:,} of {totals.ok:,} images")
        for name, score in zip(class_names, totals.scores, strict=True):
            both = f"Dice {score_text(score.dice)}, IoU {score_text(score.iou)}"
            line("", f"{name}: {'– (in no truth and no mask)' if score.iou is None else both}")


def warn_of_one_class(totals: "Totals", class_names: tuple[str, ...]) -> None:
    """Warn if all masks are the same class everywhere: the model hardly fits these images."""
    if (only := totals.only_class(class_names)) is not None:
        click.echo(
            f"warning: every pixel of all {totals.ok:,} images is {only!r}; is this the model "
            "for these images? See model.threshold, and what the model was trained on",
            err=True,
        )


def scored(document: dict[str, Any]) -> None:
    """Print an evaluation against truth."""
    counts = document["images"]
    lines(
        images=f"{counts['compared']:,} of {counts['ok']:,} compared with truth in "
        f"{document['of']['truth']}"
    )
    if background := counts.get("as_background"):
        line("", f"{background:,} of them without a mask, as background")
    _show_left_out(document, WITHOUT_SCORE)
    if document["classes"]:
        _show_scores(document)
    if ignored := document["ignored_pixels"]:
        lines(
            ignored=f"{ignored:,} pixels of truth are {document['of']['input.ignore_index']} "
            "(input.ignore_index)"
        )
    if "warning" in document:
        click.echo(harmless(f"warning: {document['warning']}"), err=True)
    if document["classes"] and not document["worst"]:
        lines(worst="– (no image has foreground in its truth or mask)")
    for number, image in enumerate(document["worst"][:5]):
        line("" if number else "worst:", f"IoU {image['iou']:.4f} {image['image_id']}")
    _show_state(document)


def _show_scores(document: dict[str, Any]) -> None:
    rows = [
        *((score["class"], score, f"{score['images']:,}") for score in document["classes"]),
        ("mean", document["mean"], ""),
    ]
    width = max(len(name) for name, _, _ in rows)
    heads = "".join(f"  {name:<14}" for name in SCORES.values())
    line("", f"{'':{width}}{heads}  images")
    line("", f"{'':{width}}" + (f"  {'micro':<6}  {'macro':<6}" * len(SCORES)).rstrip())
    for name, score, images in rows:
        values = (score[kind][ratio] for ratio in SCORES for kind in ("micro", "macro"))
        line("", f"{name:<{width}}{''.join(map(_cell, values))}  {images}".rstrip())
    if any(None in score["micro"].values() for _, score, _ in rows):
        line("", UNDEFINED)


def score_text(value: float | None) -> str:
    """Format with four decimals, or as a dash where it is undefined."""
    return "–" if value is None else f"{value:.4f}"


def _cell(value: float | None) -> str:
    return f"  {score_text(value):<6}"


def changed(document: dict[str, Any]) -> None:
    """Print a comparison with an earlier run."""
    lines(images=f"{document['images']['compared']:,} compared with {document['of']['against']}")
    _show_left_out(document, NOT_COMPARED)
    if document["classes"]:
        share = _share(document["changed"], 4)
        lines(changed=f"{share} of {document['pixels']:,} pixels")
        width = max(len(score["class"]) for score in document["classes"])
        line("", f"{'':{width}}  before    after     IoU")
        for score in document["classes"]:
            shares = "".join(f"  {_share(score[when], 3):<8}" for when in ("before", "after"))
            line("", f"{score['class']:<{width}}{shares}{_cell(score['iou'])}".rstrip())
    for number, image in enumerate(document["flipped"]):
        line("" if number else "most:", f"{image['changed']:.3%} {image['image_id']}")
    _show_state(document)


def _share(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}%}"


def _show_state(document: dict[str, Any]) -> None:
    lines(written=document["evaluation"])
    if not document["is_finished"]:
        click.echo("the run is not finished; this is of the shards that are committed", err=True)


def _show_left_out(document: dict[str, Any], reasons: dict[str, str]) -> None:
    """Print numbers of images by the reason, and the examples that the document has."""
    for key, what in reasons.items():
        if count := document["images"][key]:
            line("", f"{count:,} {what}")
        for example in document.get(key, ()):
            line("", f"  {example}")


def table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns as wide as their widest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{text:<{width}}" for text, width in zip(row, widths, strict=True))
        click.echo(harmless("  ".join(cells).rstrip()))


def lines(**texts: str) -> None:
    """Print lines of a name and a text each; none where the text is empty."""
    for name, text in texts.items():
        if text:
            line(f"{name.replace('_', ' ')}:", text)


def line(name: str, text: str) -> None:
    """Print a line in two columns."""
    click.echo(f"{name:<9} {harmless(text)}")


def harmless(text: str) -> str:
    """Escape control characters, so that names cannot move the cursor or begin another line."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
