"""Contents of a run's report, gathered once; the page only lays them out."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from unet_core.arrays import Array
from unet_core.evaluation.aggregate import counted
from unet_core.evaluation.evaluation import EVALUATION_JSON, FOLDER
from unet_core.images.decoder import DecodedImage
from unet_core.metrics import RATIOS, Scores, Totals, mean, ratio
from unet_core.report.activity import Activity
from unet_core.report.charts import Plot, histogram
from unet_core.report.panels import Panel, panels
from unet_core.report.run_images import fetch
from unet_core.report.scores import LARGEST, RANDOM, Pick, RunScores
from unet_core.runs.compact import batches
from unet_core.runs.failures import causes
from unet_core.runs.reader import Results
from unet_core.runs.timings import read_timings
from unet_core.storage.store import Store

SHOWN = 8
"""Images of a sheet."""
MOST_BYTES = 8 * 2**30
"""Bytes of tars and the like read for the images of a page: about a minute at 1 Gbit/s."""
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
    """Share of all pixels in the masks; None is undefined."""
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


class RunFacts:
    """Everything on the page of a run; its rows are read once."""

    def __init__(self, results: Results) -> None:
        run, record, totals = results.run, results.record, results.totals
        measured = RunScores(batches(run.store), len(results.class_names), SHOWN)
        self.uri, self.is_finished, self.totals = run.uri, run.is_finished, totals
        self.shards = len(run.manifest() or [])
        self.classes = classes_of(results, totals)
        """The most frequent ones, if there are very many."""
        self.class_count = len(results.class_names)
        self.mean = {
            name: mean(getattr(score, name) for score in totals.scores)
            for name in RATIOS
            if totals.with_truth
        }
        """Means of the defined scores of all classes; empty without truth."""
        matrix_KK = measured.confusion_KK
        self.confusion = matrix_KK.tolist() if matrix_KK is not None else []
        """Pixels, truth × mask; empty where there is none, or too many classes."""
        self.plots = distributions(measured)
        self.sizes, self.size_count = sizes_of(measured)
        self.sheets = sheets(measured)
        self.panels, self.reasons = _panels(results, self.sheets)
        """Panels of the images of the sheets by id, and the reasons where there are none."""
        self.causes = causes(run, totals) if totals.failed else []
        self.evaluations = list(evaluations(run.store, totals))
        timings = read_timings(run.store, TIMING_FILES)
        self.activity = Activity(timings) if timings.num_rows else None
        self.warnings = list(_warnings(results, self.is_finished, self.shards))
        compute, self.config = record.compute.model_dump(exclude={"versions"}), record.config
        self.versions = {"unet-jobs": record.version, **compute, **record.compute.versions}
        self.identity = {"fingerprint": record.fingerprint, **record.identity}


def classes_of(results: Results, totals: Totals) -> list[ClassRow]:
    """Return the most frequent classes, as many as a table can show, in the order of their ids."""
    nothing = [None] * len(results.class_names)
    pixels, scores = totals.class_pixels or nothing, totals.scores or nothing
    classes = zip(results.class_names, results.palette, pixels, scores, strict=True)
    rows = [
        ClassRow(name, "rgb({} {} {})".format(*color), ratio(count or 0, totals.pixels), score)
        for name, color, count, score in classes
    ]
    order = sorted(range(len(rows)), key=lambda at: -(rows[at].share or 0.0))[:MOST_CLASSES]
    return [rows[at] for at in sorted(order)]


def distributions(measured: RunScores) -> list[Plot]:
    """Histograms over images, of what is defined."""
    found = (
        histogram(title, measured.values[name].to_numpy()) for name, title in DISTRIBUTIONS.items()
    )
    return [plot for plot in found if plot is not None]


def sizes_of(measured: RunScores) -> tuple[list[Row], int]:
    """The most frequent sizes, and how many there are."""
    order = [("count_all", "descending"), ("height", "ascending"), ("width", "ascending")]
    counts = measured.values.group_by(["height", "width"]).aggregate([([], "count_all")])
    return counts.sort_by(order).slice(0, MOST_SIZES).to_pylist(), counts.num_rows


def sheets(measured: RunScores) -> list[Sheet]:
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
    """Draw the panels of all images by id, or say why not; the first ones of each sheet first."""
    by_rank = chain(*zip_longest(*(sheet.picks for sheet in sheets)))
    picks = {pick.image_id: pick for pick in by_rank if pick is not None}
    ignore_index = results.config.input.ignore_index

    def draw(decoded: DecodedImage, mask_HW: Array) -> tuple[Panel, ...]:
        return panels(decoded, mask_HW, results.palette, ignore_index)

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
