"""All rows of a run in one pass: values for distributions, summed confusion, images worth a look.

A few bytes of each image are kept, whatever the number of classes.
"""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_core.arrays import Array
from unet_core.metrics import lists, means, ratios
from unet_core.runs.compact import COMPACTED
from unet_core.runs.schema import CONFIDENCE_UNIT

RANDOM, LOWEST_IOU, LOWEST_CONFIDENCE, LARGEST = "random", "iou", "confidence", "foreground"
ORDERS = {
    RANDOM: "ascending",
    LOWEST_IOU: "ascending",
    LOWEST_CONFIDENCE: "ascending",
    LARGEST: "descending",
}
"""Sort orders of the values that images are picked by."""
NEEDED = ["shard_id", "image_id", "height", "width", "class_pixels", "confidence_sum",
          "tp", "fp", "fn", "confusion"]  # fmt: skip


class Pick(NamedTuple):
    """One image of a run, with its place and its scores; nan is undefined."""

    image_id: str
    shard_id: str
    height: int
    width: int
    iou: float
    """Mean over the foreground classes in its truth or mask."""
    dice: float
    confidence: float
    foreground: float
    """1 minus the share of class 0 among valid pixels; undefined where that is no background."""


PLACE, VALUES = list(Pick._fields[:4]), list(Pick._fields[2:])


class RunScores:
    """Summary of a run's rows; ``most`` images are picked of each kind.

    ``first_foreground``: lowest id of a foreground class.
    """

    def __init__(
        self,
        tables: Iterable[pa.Table],
        classes: int,
        most: int = 8,
        first_foreground: int = 1,
    ) -> None:
        random = np.random.default_rng(0)
        kept: list[pa.Table] = []
        best: dict[str, list[pa.Table]] = {kind: [] for kind in ORDERS}
        confusion: Array | int = 0
        for table in chain([COMPACTED.empty_table()], tables):
            ok = _ok(table)
            images = _scored(ok, first_foreground)
            images = images.append_column(RANDOM, pa.array(random.random(ok.num_rows)))
            kept.append(images.select(VALUES))
            matrices = lists(ok["confusion"])
            confusion = confusion + matrices.sum(axis=0) if matrices.size else confusion
            for kind, order in ORDERS.items():
                both = pa.concat_tables([*best[kind], images])
                best[kind] = [both.sort_by([(kind, order)]).slice(0, most)]
        self.values = pa.concat_tables(kept)
        """Numbers of a ``Pick``, of each image that is ``ok``."""
        self.confusion_KK = np.reshape(confusion if np.any(confusion) else [], (-1, classes))
        """Pixels, truth × prediction, of all images with truth; empty if there is none."""
        self.picks = {
            kind: _picks(found.filter(pc.is_finite(found[kind]))) for kind, (found,) in best.items()
        }
        """Images by the reason for their choice, best first."""

    @property
    def has_truth(self) -> bool:
        """True if any image has a score."""
        return bool(np.isfinite(self.values["iou"]).any())

    @property
    def worst(self) -> list[Pick]:
        """Images of the lowest IoU, or of the lowest confidence if none has an IoU."""
        return self.picks[LOWEST_IOU if self.has_truth else LOWEST_CONFIDENCE]


def pick_ids(tables: Iterable[pa.Table], image_ids: list[str]) -> list[Pick]:
    """Pick the images of these ids that are ``ok``, in the order of the run."""
    wanted = pa.array(image_ids, pa.string())
    found = (table.filter(pc.is_in(table["image_id"], value_set=wanted)) for table in tables)
    return [pick for table in found for pick in _picks(_scored(_ok(table)))]


def _ok(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["status"], "ok")).select(NEEDED).combine_chunks()


def _scored(ok: pa.Table, first_foreground: int = 1) -> pa.Table:
    """Compute the fields of ``Pick``; scores are float32, nan where they are not defined."""
    pixels = lists(ok["class_pixels"]).sum(axis=1).astype(np.float64)  # those that are valid
    pixels[pixels == 0] = np.nan  # nothing is defined
    background = pc.list_element(ok["class_pixels"], 0).to_numpy()
    found = {
        "iou": np.full(len(pixels), np.nan),
        "dice": np.full(len(pixels), np.nan),
        "confidence": ok["confidence_sum"].to_numpy() / (pixels * CONFIDENCE_UNIT),
        "foreground": 1 - background / (pixels if first_foreground else np.nan),
    }
    has_truth = pc.is_valid(ok["tp"]).to_numpy()
    counts_nK = [lists(ok[name]) for name in ("tp", "fp", "fn")]
    for name in ("iou", "dice"):
        found[name][has_truth] = means(ratios(name, *counts_nK)[:, first_foreground:])
    columns = {name: ok[name] for name in PLACE}
    return pa.table(columns | {n: values.astype(np.float32) for n, values in found.items()})


def _picks(images: pa.Table) -> list[Pick]:
    return [Pick(**row) for row in images.select(list(Pick._fields)).to_pylist()]
