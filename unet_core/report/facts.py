"""Contents of a run's report, gathered once; the page lays them out and words them."""

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from unet_core.arrays import Array
from unet_core.evaluation.aggregate import counted
from unet_core.evaluation.evaluation import EVALUATION_JSON, FOLDER
from unet_core.images.decoder import DecodedImage
from unet_core.metrics import RATIOS, Totals, mean, ratio
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
"""Number of images on a sheet."""
MOST_BYTES = 8 * 2**30
"""Bytes of tars and the like read for the images of a page: about a minute at 1 Gbit/s."""
MOST_CLASSES = 64
TIMING_FILES = 2880
"""About two days at work."""
DISTRIBUTIONS = {
    "iou": "IoU of an image, mean over its foreground classes",
    "dice": "Dice of an image, mean over its foreground classes",
    "confidence": "Mean confidence of an image",
    "foreground": "Foreground share of an image",
}

Row = dict[str, Any]


class RunFacts:
    """Everything on the page of a run; its rows are read once."""

    def __init__(self, results: Results) -> None:
        run, record, totals = results.run, results.record, results.totals
        measured = RunScores(
            batches(run.store), len(results.class_names), SHOWN, record.first_foreground
        )
        self.uri, self.is_finished, self.totals = run.uri, run.is_finished, totals
        self.shards, self.class_count = len(run.manifest() or []), len(results.class_names)
        self.classes = classes_of(results, totals)
        """The most frequent classes, if there are very many."""
        self.mean = {
            name: mean(getattr(score, name) for score in totals.scores)
            for name in RATIOS
            if totals.with_truth
        }
        """Means of the defined scores of all classes; empty without truth."""
        self.confusion = measured.confusion_KK.tolist()
        """Pixels, truth × mask; empty without truth, or for too many classes."""
        self.plots = list(distributions(measured))
        self.sizes, self.size_count = sizes_of(measured)
        self.sheets = sheets(measured)
        self.panels, self.reasons = _panels(results, self.sheets)
        """Panels of the sheets' images by id, and the reasons where there are none."""
        self.causes = causes(run, totals) if totals.failed else []
        self.evaluations = dict(evaluations(run.store, totals))
        timings = read_timings(run.store, TIMING_FILES)
        self.activity = Activity(timings) if timings.num_rows else None
        self.only_class = totals.only_class(results.class_names)
        self.errors, self.config = results.config.errors, record.config
        self.versions = {
            "unet-jobs": record.version,
            **record.compute.model_dump(exclude={"versions"}),
            **record.compute.versions,
        }
        self.identity = {"fingerprint": record.fingerprint, **record.identity}


def classes_of(results: Results, totals: Totals) -> list[Row]:
    """Return the most frequent classes, as many as a table can show, in the order of their ids.

    ``share`` is of all pixels in the masks, ``scores`` None without truth.
    """
    nothing = [None] * len(results.class_names)
    pixels, scores = totals.class_pixels or nothing, totals.scores or nothing
    order = sorted(range(len(pixels)), key=lambda at: -(pixels[at] or 0))[:MOST_CLASSES]
    return [
        {
            "name": results.class_names[at],
            "color": "rgb({} {} {})".format(*results.palette[at]),
            "share": ratio(pixels[at] or 0, totals.valid_pixels),
            "scores": scores[at],
        }
        for at in sorted(order)
    ]


def distributions(measured: RunScores) -> Iterator[Plot]:
    """Plot a histogram over images of each value that is defined for any."""
    for name, title in DISTRIBUTIONS.items():
        values = measured.values[name].to_numpy()
        if (known := values[np.isfinite(values)]).size:
            yield histogram(title, known)


def sizes_of(measured: RunScores) -> tuple[list[Row], int]:
    """Return the most frequent sizes, and the number of different ones."""
    order = [("count_all", "descending"), ("height", "ascending"), ("width", "ascending")]
    counts = measured.values.group_by(["height", "width"]).aggregate([([], "count_all")])
    return counts.sort_by(order).slice(0, 8).to_pylist(), counts.num_rows


def sheets(measured: RunScores) -> dict[str, list[Pick]]:
    """Pick random, worst and largest images; all of them for one sheet if there are few."""
    drawn = measured.picks[RANDOM]
    if measured.values.num_rows <= SHOWN:
        return {"all": drawn} if drawn else {}
    found = {"random": drawn, "worst": measured.worst, "largest": measured.picks[LARGEST]}
    return {name: picks for name, picks in found.items() if picks}


def _panels(
    results: Results, sheets: dict[str, list[Pick]]
) -> tuple[dict[str, tuple[Panel, ...]], dict[str, str]]:
    """Draw the panels of all images by id, or say why not; the first ones of each sheet first."""
    by_rank = chain(*zip_longest(*sheets.values()))
    picks = {pick.image_id: pick for pick in by_rank if pick is not None}

    def draw(decoded: DecodedImage, mask_HW: Array) -> tuple[Panel, ...]:
        return panels(decoded, mask_HW, results.palette, results.config.input.ignore_index)

    return fetch(results, list(picks.values()), draw, MOST_BYTES)


def evaluations(store: Store, totals: Totals) -> Iterator[tuple[str, Row]]:
    """Read all complete ``evaluation.json`` by name, but those of other versions; ``is_current``
    is added: whether the run, whose ``totals`` are given, has not gone on since.
    """
    for entry in store.list(FOLDER):
        folder, _, name = entry.name.rpartition("/")
        if name == EVALUATION_JSON:
            with suppress(ValueError, KeyError, TypeError):
                document = json.loads(store.read(f"{FOLDER}/{entry.name}"))
                yield folder, document | {"is_current": document["counted"] == counted(totals)}
