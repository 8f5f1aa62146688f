"""What there is to say of a run, gathered once; the page only lays it out."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np

from unet_core.arrays import Array
from unet_core.compact import batches
from unet_core.config import PredictConfig, build
from unet_core.failures import Cause, causes
from unet_core.metrics import RATIOS, Totals, mean, ratio
from unet_core.report.activity import Activity, activity
from unet_core.report.charts import Plot, histogram
from unet_core.report.command import command, toml
from unet_core.report.evaluations import Compared, evaluations
from unet_core.report.images import fetch
from unet_core.report.measured import LARGEST, RANDOM, Measured, Pick, measure
from unet_core.report.pictures import PANEL, Panel, panels, view
from unet_core.results import Results
from unet_core.timings import read_timings

SHOWN = 8
"""Images of a sheet."""
MOST_BYTES = 8 * 2**30
"""Of tars and the like, read for the images of a page: about a minute at 1 Gbit/s."""
MOST_CLASSES = 64
MOST_SIZES = 8
TIMING_FILES = 2880
"""About two days at work."""


@dataclass(frozen=True)
class ClassRow:
    """One class over all images; None is undefined."""

    name: str
    color: str
    share: float | None
    """Of all pixels in the masks."""
    dice: float | None
    iou: float | None
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class Size:
    """Images of one size."""

    text: str
    images: int
    width: float | None
    """Percent of the longest bar; None where a bar would say nothing."""


@dataclass(frozen=True)
class Entry:
    """One image of a sheet: its panels, or why there are none."""

    pick: Pick
    panels: tuple[Panel, ...]
    reason: str


@dataclass(frozen=True)
class Sheet:
    """Images that were picked for one reason."""

    anchor: str
    name: str
    about: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class RunFacts:
    """Everything on the page of a run."""

    uri: str
    is_finished: bool
    shards: int
    totals: Totals
    classes: tuple[ClassRow, ...]
    """The most frequent ones, if there are very many."""
    class_count: int
    mean_row: ClassRow | None
    """Mean of the defined values of all classes."""
    confusion: tuple[list[int], ...]
    """Pixels, truth × mask; empty where there is none, or too many classes."""
    plots: tuple[Plot, ...]
    sizes: tuple[Size, ...]
    sheets: tuple[Sheet, ...]
    causes: tuple[Cause, ...]
    evaluations: tuple[Compared, ...]
    activity: Activity | None
    warnings: tuple[str, ...]
    command: str
    config: str
    versions: dict[str, str]
    identity: dict[str, str]


def run_facts(results: Results) -> RunFacts:
    """Read the rows of a run once, and its images that are worth a look."""
    record, totals = results.record, results.totals
    measured = measure(batches(results.run.store), len(results.class_names), SHOWN)
    shards, matrix_KK = results.run.manifest() or [], measured.confusion_KK
    compute = record.compute.model_dump(exclude={"versions"})
    rows = class_rows(results, totals)
    is_finished = results.run.is_finished
    return RunFacts(
        uri=results.run.uri,
        is_finished=is_finished,
        shards=len(shards),
        totals=totals,
        classes=most_frequent(rows),
        class_count=len(rows),
        mean_row=_mean_row(rows) if totals.with_truth else None,
        confusion=tuple(matrix_KK.tolist()) if matrix_KK is not None else (),
        plots=distributions(measured),
        sizes=sizes_of(measured.sizes),
        sheets=sheets(results, measured),
        causes=tuple(causes(results.run, totals)) if totals.failed else (),
        evaluations=evaluations(results.run.store, totals),
        activity=activity(read_timings(results.run.store, TIMING_FILES)),
        warnings=tuple(_warnings(results, is_finished, len(shards))),
        command=command_of(results),
        config=toml(record.config),
        versions={"unet-jobs": record.version, **_texts(compute), **record.compute.versions},
        identity={"fingerprint": record.fingerprint, **_texts(record.identity)},
    )


def class_rows(results: Results, totals: Totals) -> list[ClassRow]:
    """Every class, by its id."""
    nothing = [None] * len(results.class_names)
    pixels, scores = totals.class_pixels or nothing, totals.scores or nothing
    classes = zip(results.class_names, results.palette, pixels, scores, strict=True)
    return [
        ClassRow(
            name,
            "rgb({} {} {})".format(*color),
            ratio(count or 0, totals.pixels),
            **{kind: getattr(score, kind, None) for kind in RATIOS},
        )
        for name, color, count, score in classes
    ]


def most_frequent(rows: list[ClassRow]) -> tuple[ClassRow, ...]:
    """As many classes as a table can show, in the order of their ids."""
    order = sorted(range(len(rows)), key=lambda at: -(rows[at].share or 0.0))[:MOST_CLASSES]
    return tuple(rows[at] for at in sorted(order))


def _mean_row(rows: list[ClassRow]) -> ClassRow:
    means = {name: mean(getattr(row, name) for row in rows) for name in RATIOS}
    return ClassRow("mean of classes", "", None, **means)


def distributions(measured: Measured) -> tuple[Plot, ...]:
    """Histograms over images, of what is defined."""
    values = {
        "IoU of an image, mean over its classes": measured.iou,
        "Dice of an image, mean over its classes": measured.dice,
        "Mean confidence of an image": measured.confidence,
        "Foreground share of an image": measured.foreground,
    }
    plots = (histogram(title, of_images) for title, of_images in values.items())
    return tuple(plot for plot in plots if plot is not None)


def sizes_of(sizes: Array) -> tuple[Size, ...]:
    """The most frequent sizes, and how many have others."""
    known, counts = np.unique(sizes, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    kept = order if len(order) <= MOST_SIZES else order[: MOST_SIZES - 1]
    most = int(counts.max(initial=1))
    found = [
        Size(f"{height:,} × {width:,}", images, 100 * images / most if most > 1 else None)
        for (height, width), images in zip(known[kept], counts[kept].tolist(), strict=True)
    ]
    others = order[len(kept) :]
    if len(others):
        found.append(Size(f"{len(others):,} other sizes", int(counts[others].sum()), None))
    return tuple(found)


def sheets(results: Results, measured: Measured) -> tuple[Sheet, ...]:
    """Random, worst and largest images; all of them on one sheet if there are few."""
    drawn = measured.picks[RANDOM]
    chosen = [("all", "All images", "in no order", drawn)]
    if len(measured.iou) > SHOWN:
        by = "IoU" if measured.has_truth else "mean confidence"
        chosen = [
            ("random", "Random images", "drawn by chance", drawn),
            ("worst", "Worst images", f"lowest {by} first", measured.worst),
            ("largest", "Largest foreground", "by share of pixels", measured.picks[LARGEST]),
        ]
    palette, ignore_index = results.palette, results.config.input.ignore_index
    by_rank = chain(*zip_longest(*(of_sheet for *_, of_sheet in chosen)))
    picks = {pick.image_id: pick for pick in by_rank if pick is not None}
    made, reasons = fetch(
        results, list(picks.values()),
        lambda fetched: panels(view(fetched, PANEL), palette, ignore_index), MOST_BYTES,
    )  # fmt: skip

    def entry(pick: Pick) -> Entry:
        return Entry(pick, made.get(pick.image_id, ()), reasons.get(pick.image_id, ""))

    return tuple(
        Sheet(anchor, name, about, tuple(map(entry, of_sheet)))
        for anchor, name, about, of_sheet in chosen
        if of_sheet
    )


def _warnings(results: Results, is_finished: bool, shards: int) -> Iterable[str]:
    totals = results.totals
    if not is_finished:
        how = "run predict again to continue"
        if totals.shards == shards:
            how = "run predict again to see what keeps it from ending"
        errors = results.config.errors
        if errors.are_too_many(totals.failed, totals.images_seen, at_end=True):
            most = errors.max_failed_images
            how = f"more images failed than errors.max_failed_images = {most} lets pass"
        yield f"Not finished: {totals.shards:,} of {shards:,} shards are committed; {how}."
    if not totals.is_reconciled:
        yield (
            f"Not reconciled: {totals.images_seen:,} images were seen, but {totals.ok:,} + "
            f"{totals.failed:,} have a row; run verify to see where."
        )
    if totals.failed:
        share = totals.failed / max(1, totals.images_seen)
        yield f"{totals.failed:,} images failed ({share:.2%}); see failures below."
    if unusable := totals.errors.get("truth", 0):
        yield f"The truth of {unusable:,} images could not be used; they have no scores."
    if (only := totals.only_class(results.class_names)) is not None:
        yield (
            f"Every pixel of all {totals.ok:,} images is {only!r}: is this the model for these "
            "images? See model.threshold, and what the model was trained on."
        )


def command_of(results: Results) -> str:
    """The command that continues or repeats a run."""
    config, run = results.config, results.run.uri
    places = {"input": {"uri": config.input.uri}, "output": {"uri": run}}
    defaults = build(PredictConfig, places, []).model_dump(mode="json")
    verb = ["predict", config.input.uri, "--model", config.model.checkpoint, "--out", run]
    told = {"input.uri", "model.checkpoint", "output.uri"}
    return command(verb, config.model_dump(mode="json"), defaults, told)


def _texts(table: dict[str, object]) -> dict[str, str]:
    return {key: _text(value) or "–" for key, value in table.items()}


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} = {v}" for k, v in value.items() if v is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
