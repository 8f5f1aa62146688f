"""All rows of a run in one pass: values for distributions, summed confusion, images worth a look.

Batches of Arrow columns come in, NumPy columns are kept: a few bytes an image, whatever the number
of classes.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_core.arrays import Array
from unet_core.compact import COMPACTED
from unet_core.metrics import lists, means, ratios

CONFIDENCE = 65535
RANDOM, LOWEST_IOU, LOWEST_CONFIDENCE, LARGEST = "random", "iou", "confidence", "largest"
NEEDED = ["shard_id", "image_id", "height", "width", "class_pixels", "confidence_sum",
          "tp", "fp", "fn", "confusion"]  # fmt: skip


@dataclass(frozen=True)
class Pick:
    """One image of a run, with where it is and what it scored; nan is undefined."""

    image_id: str
    shard_id: str
    height: int
    width: int
    iou: float
    """Mean over the classes that occur in it."""
    dice: float
    confidence: float
    foreground: float


@dataclass
class Measured:
    """What the rows of a run say; a value for each image that is ``ok``."""

    iou: Array
    """Mean over defined classes; nan without truth."""
    dice: Array
    confidence: Array
    foreground: Array
    """1 minus the share of class 0."""
    sizes: Array
    """Height and width, int32 (N, 2)."""
    confusion_KK: Array | None = None
    """Pixels, truth × prediction, of all images with truth."""
    picks: dict[str, list[Pick]] = field(default_factory=dict)
    """Images by what they were picked for, the first most so."""

    @property
    def has_truth(self) -> bool:
        """Whether any image has a score."""
        return bool(np.isfinite(self.iou).any())

    @property
    def worst(self) -> list[Pick]:
        """Lowest IoU, or without truth lowest confidence."""
        return self.picks[LOWEST_IOU if self.has_truth else LOWEST_CONFIDENCE]


def measure(tables: Iterable[pa.Table], classes: int, most: int = 8) -> Measured:
    """Go through the rows once; ``most`` images are picked of each kind."""
    columns: dict[str, list[Array]] = defaultdict(list)
    picks = _Picks(most)
    confusion: Array | int = 0
    for table in chain([COMPACTED.empty_table()], tables):
        ok, values = _measured(table.filter(pc.equal(table["status"], "ok")))
        for name, column in values.items():
            columns[name].append(column)
        of_images = lists(ok["confusion"])
        confusion = confusion + of_images.sum(axis=0) if of_images.size else confusion
        picks.look(ok, values)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    matrix_KK = np.reshape(confusion, (classes, classes)) if np.any(confusion) else None
    return Measured(**joined, confusion_KK=matrix_KK, picks=picks.best)


def pick_ids(tables: Iterable[pa.Table], image_ids: list[str]) -> list[Pick]:
    """The images of these ids that are ``ok``, in the order of the run."""
    found: list[Pick] = []
    for table in tables:
        is_wanted = pc.is_in(table["image_id"], value_set=pa.array(image_ids, pa.string()))
        is_wanted = pc.and_(pc.equal(table["status"], "ok"), is_wanted)
        ok, values = _measured(table.filter(is_wanted))
        found += _picked(ok, values, np.arange(ok.num_rows))
    return found


def _measured(ok: pa.Table) -> tuple[pa.Table, dict[str, Array]]:
    """Rows in one chunk, and of each float32 values, nan where they are not defined."""
    ok = ok.select(NEEDED).combine_chunks()
    sizes = np.stack([ok["height"].to_numpy(), ok["width"].to_numpy()], axis=1).astype(np.int32)
    pixels = sizes[:, 0].astype(np.int64) * sizes[:, 1]
    background = pc.list_element(ok["class_pixels"], 0).to_numpy()
    found = {
        "iou": np.full(len(pixels), np.nan),
        "dice": np.full(len(pixels), np.nan),
        "confidence": ok["confidence_sum"].to_numpy() / (pixels * CONFIDENCE),
        "foreground": 1 - background / pixels,
    }
    has_truth = pc.is_valid(ok["tp"]).to_numpy()
    counts_nK = [lists(ok[name]) for name in ("tp", "fp", "fn")]
    for name in ("iou", "dice"):
        found[name][has_truth] = means(ratios(name, *counts_nK))
    return ok, {n: values.astype(np.float32) for n, values in found.items()} | {"sizes": sizes}


class _Picks:
    """The first few images by each order, of all batches so far."""

    def __init__(self, most: int) -> None:
        kinds = (RANDOM, LOWEST_IOU, LOWEST_CONFIDENCE, LARGEST)
        self.best: dict[str, list[Pick]] = {kind: [] for kind in kinds}
        self._keys: dict[str, Array] = {kind: np.zeros(0) for kind in kinds}
        self._most = most
        self._random = np.random.default_rng(0)

    def look(self, ok: pa.Table, values: dict[str, Array]) -> None:
        """Let a batch compete."""
        keys = {
            RANDOM: self._random.random(ok.num_rows),
            LOWEST_IOU: values["iou"],
            LOWEST_CONFIDENCE: values["confidence"],
            LARGEST: -values["foreground"],
        }
        for kind, key in keys.items():
            first = np.argsort(key, kind="stable")[: self._most]
            first = first[np.isfinite(key[first])]
            both = np.concatenate([self._keys[kind], key[first]])
            order = np.argsort(both, kind="stable")[: self._most]
            if order.size and order.max() < len(self.best[kind]):
                continue  # none of this batch
            picks = [*self.best[kind], *_picked(ok, values, first)]
            self.best[kind] = [picks[at] for at in order]
            self._keys[kind] = both[order]


def _picked(ok: pa.Table, values: dict[str, Array], at: Array) -> list[Pick]:
    rows = ok.select(["image_id", "shard_id", "height", "width"]).take(pa.array(at))
    for name in ("iou", "dice", "confidence", "foreground"):
        rows = rows.append_column(name, pa.array(values[name][at]))
    return [Pick(**row) for row in rows.to_pylist()]
