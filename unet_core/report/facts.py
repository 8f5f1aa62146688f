"""What there is to say of a run, gathered once; the page only lays it out."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from unet_core.arrays import Array
from unet_core.images.picture import Picture
from unet_core.report.activity import Activity, activity
from unet_core.report.charts import Plot, histogram
from unet_core.report.command import predict_command, toml
from unet_core.report.images import fetch
from unet_core.report.measured import LARGEST, RANDOM, Measured, Pick, measure
from unet_core.report.pictures import Panel, panels
from unet_core.runs.compact import batches
from unet_core.runs.failures import Cause, causes
from unet_core.runs.results import Results
from unet_core.runs.timings import read_timings
from unet_core.scores.evaluate import EVALUATION_JSON, FOLDER
from unet_core.scores.metrics import RATIOS, Scores, Totals, mean, ratio
from unet_core.scores.tally import counted
from unet_core.storage.store import Store

SHOWN = 8
"""Images of a sheet."""
MOST_BYTES = 8 * 2**30
"""Of tars and the like, read for the images of a page: about a minute at 1 Gbit/s."""
MOST_CLASSES = 64
MOST_SIZES = 8
TIMING_FILES = 2880
"""About two days at work."""
DISTRIBUTIONS = {
    "iou": "IoU of an image, mean over its classes",
    "dice": "Dice of an image, mean over its classes",
    "confidence": "Mean confidence of an image",
    "foreground": "Foreground share of an image",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class ClassRow:
    """One class over all images."""

    name: str
    color: str
    share: float | None
    """Of all pixels in the masks; None is undefined."""
    scores: Scores | None
    """None where there is no truth."""


@dataclass(frozen=True)
class Sheet:
    """Images that were picked for one reason."""

    anchor: str
    name: str
    about: str
    picks: list[Pick]


@dataclass(frozen=True)
class Compared:
    """A later evaluation: against truth that came later, or another run."""

    name: str
    document: Row
    """``evaluation.json``."""
    warnings: list[str]


@dataclass(frozen=True)
class RunFacts:
    """Everything on the page of a run."""

    uri: str
    is_finished: bool
    shards: int
    totals: Totals
    classes: list[ClassRow]
    """The most frequent ones, if there are very many."""
    class_count: int
    mean: dict[str, float | None]
    """Of the defined scores of all classes; empty without truth."""
    confusion: list[list[int]]
    """Pixels, truth × mask; empty where there is none, or too many classes."""
    plots: list[Plot]
    sizes: list[Row]
    """The most frequent ones: height, width, and how many images have it."""
    size_count: int
    sheets: list[Sheet]
    panels: dict[str, tuple[Panel, ...]]
    """Of the images of the sheets,"""
    reasons: dict[str, str]
    """or why there are none."""
    causes: list[Cause]
    evaluations: list[Compared]
    activity: Activity | None
    warnings: list[str]
    command: str
    config: str
    versions: dict[str, Any]
    identity: dict[str, Any]


def run_facts(results: Results) -> RunFacts:
    """Read the rows of a run once, and its images that are worth a look."""
    record, totals = results.record, results.totals
    measured = measure(batches(results.run.store), len(results.class_names), SHOWN)
    shards, matrix_KK = results.run.manifest() or [], measured.confusion_KK
    compute = record.compute.model_dump(exclude={"versions"})
    config, chosen = results.config, sheets(measured)
    drawn, reasons = _panels(results, chosen)
    sizes, size_count = sizes_of(measured)
    is_finished = results.run.is_finished
    return RunFacts(
        uri=results.run.uri,
        is_finished=is_finished,
        shards=len(shards),
        totals=totals,
        classes=classes_of(results, totals),
        class_count=len(results.class_names),
        mean={n: mean(getattr(s, n) for s in totals.scores) for n in RATIOS if totals.with_truth},
        confusion=matrix_KK.tolist() if matrix_KK is not None else [],
        plots=distributions(measured),
        sizes=sizes,
        size_count=size_count,
        sheets=chosen,
        panels=drawn,
        reasons=reasons,
        causes=causes(results.run, totals) if totals.failed else [],
        evaluations=list(evaluations(results.run.store, totals)),
        activity=activity(read_timings(results.run.store, TIMING_FILES)),
        warnings=list(_warnings(results, is_finished, len(shards))),
        command=predict_command(
            config.model_dump(mode="json"), config.model.checkpoint, results.run.uri
        ),
        config=toml(record.config),
        versions={"unet-jobs": record.version, **compute, **record.compute.versions},
        identity={"fingerprint": record.fingerprint, **record.identity},
    )


def classes_of(results: Results, totals: Totals) -> list[ClassRow]:
    """As many as a table can show, the most frequent ones, in the order of their ids."""
    nothing = [None] * len(results.class_names)
    pixels, scores = totals.class_pixels or nothing, totals.scores or nothing
    classes = zip(results.class_names, results.palette, pixels, scores, strict=True)
    rows = [
        ClassRow(name, "rgb({} {} {})".format(*color), ratio(count or 0, totals.pixels), score)
        for name, color, count, score in classes
    ]
    order = sorted(range(len(rows)), key=lambda at: -(rows[at].share or 0.0))[:MOST_CLASSES]
    return [rows[at] for at in sorted(order)]


def distributions(measured: Measured) -> list[Plot]:
    """Histograms over images, of what is defined."""
    found = (
        histogram(title, measured.values[name].to_numpy()) for name, title in DISTRIBUTIONS.items()
    )
    return [plot for plot in found if plot is not None]


def sizes_of(measured: Measured) -> tuple[list[Row], int]:
    """The most frequent sizes, and how many there are."""
    order = [("count_all", "descending"), ("height", "ascending"), ("width", "ascending")]
    counts = measured.values.group_by(["height", "width"]).aggregate([([], "count_all")])
    return counts.sort_by(order).slice(0, MOST_SIZES).to_pylist(), counts.num_rows


def sheets(measured: Measured) -> list[Sheet]:
    """Random, worst and largest images; all of them on one sheet if there are few."""
    drawn = measured.picks[RANDOM]
    if measured.values.num_rows <= SHOWN:
        return [Sheet("all", "All images", "in no order", drawn)] if drawn else []
    by = "IoU" if measured.has_truth else "mean confidence"
    return [
        Sheet("random", "Random images", "drawn by chance", drawn),
        Sheet("worst", "Worst images", f"lowest {by} first", measured.worst),
        Sheet("largest", "Largest foreground", "by share of pixels", measured.picks[LARGEST]),
    ]


def _panels(
    results: Results, sheets: list[Sheet]
) -> tuple[dict[str, tuple[Panel, ...]], dict[str, str]]:
    """Of all images by id, or why there are none; the first ones of each sheet first."""
    by_rank = chain(*zip_longest(*(sheet.picks for sheet in sheets)))
    picks = {pick.image_id: pick for pick in by_rank if pick is not None}
    ignore_index = results.config.input.ignore_index

    def draw(picture: Picture, mask_HW: Array) -> tuple[Panel, ...]:
        return panels(picture, mask_HW, results.palette, ignore_index)

    return fetch(results, list(picks.values()), draw, MOST_BYTES)


def evaluations(store: Store, totals: Totals) -> Iterator[Compared]:
    """All that are complete, by name; one of another version is left out. ``totals``: of the run,
    which may have gone on since.
    """
    for entry in store.list(FOLDER):
        folder, _, name = entry.name.rpartition("/")
        if name == EVALUATION_JSON:
            with suppress(ValueError, KeyError, TypeError):
                document = json.loads(store.read(f"{FOLDER}/{entry.name}"))
                yield Compared(folder, document, list(_warnings_of(document, totals)))


def _warnings_of(document: Row, totals: Totals) -> Iterator[str]:
    if document["counted"] != counted(totals):
        yield "The run has gone on since: this is of masks that it had before. Evaluate again."
    elif not document["is_finished"]:
        yield "The run is not finished: this is of the shards that were committed."
    if "warning" in document:
        yield f"{document['warning'][:1].upper()}{document['warning'][1:]}."


def _warnings(results: Results, is_finished: bool, shards: int) -> Iterator[str]:
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
