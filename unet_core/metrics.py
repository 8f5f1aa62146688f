"""Counts, scores and their sums. Counts are integers and add up in any order; scores are derived at
the end, and a score without a denominator is None, never 0 or 1.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_core.arrays import Array

BAND_PIXELS = 2**21  # counting takes eight bytes of each pixel
MAX_CONFUSION_CLASSES = 64  # a matrix of 64² counts takes 32 kB of a row
RATIOS = {"dice": (2, 1, 1), "iou": (1, 1, 1), "precision": (1, 1, 0), "recall": (1, 0, 1)}
"""Scores by key, as (t, p, n) of t·tp / (t·tp + p·fp + n·fn)."""
SCORE_NAMES = {"dice": "Dice", "iou": "IoU", "precision": "Precision", "recall": "Recall"}
"""Names of the scores for people."""
SumT = TypeVar("SumT")


def confusion(truth_HW: Array, mask_HW: Array, classes: int, ignore_index: int) -> Array:
    """Pixel counts KxK (truth × prediction) where the truth is not ``ignore_index`` and the mask
    has a class.
    """
    total = np.zeros(classes * classes, dtype=np.int64)
    for rows in bands(mask_HW):
        truth, mask = truth_HW[rows], mask_HW[rows]
        counted = (truth != ignore_index) & (mask < classes)
        pairs = truth[counted].astype(np.int64) * classes + mask[counted]
        total += np.bincount(pairs, minlength=classes * classes)
    return total.reshape(classes, classes)


def class_pixels(mask_HW: Array, classes: int) -> Array:
    """Pixels of each class, int64 (K,); pixels that are not valid are of none."""
    counts = (np.bincount(mask_HW[rows].ravel(), minlength=classes) for rows in bands(mask_HW))
    return sum((of_band[:classes] for of_band in counts), np.zeros(classes, dtype=np.int64))


def bands(mask_HW: Array) -> Iterator[slice]:
    """Rows of an image in bands of about ``BAND_PIXELS``."""
    rows = max(1, BAND_PIXELS // mask_HW.shape[1])
    return (slice(start, start + rows) for start in range(0, mask_HW.shape[0], rows))


def ratio(part: float, whole: int) -> float | None:
    """``part / whole``; None where there is nothing to divide by."""
    return part / whole if whole else None


def ratios(name: str, tp: Array, fp: Array, fn: Array) -> Array:
    """One of ``RATIOS`` elementwise; NaN where it is not defined."""
    of_tp, of_fp, of_fn = RATIOS[name]
    part = of_tp * tp
    whole = part + of_fp * fp + of_fn * fn
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def means(values_nK: Array) -> Array:
    """Mean of the defined values of each row; NaN where there is none."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values_nK, axis=1) / np.sum(~np.isnan(values_nK), axis=1)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the defined values; None if there is none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


@dataclass(frozen=True)
class Scores:
    """True positive, false positive and false negative pixels of one class, and their scores."""

    tp: int = 0
    fp: int = 0
    fn: int = 0

    @property
    def iou(self) -> float | None:
        """Intersection over union: tp / (tp + fp + fn)."""
        return self._ratio("iou")

    @property
    def dice(self) -> float | None:
        """Dice coefficient: 2 tp / (2 tp + fp + fn)."""
        return self._ratio("dice")

    @property
    def precision(self) -> float | None:
        """Share of the segmented pixels that are of the class: tp / (tp + fp)."""
        return self._ratio("precision")

    @property
    def recall(self) -> float | None:
        """Share of the pixels of the class that were segmented: tp / (tp + fn)."""
        return self._ratio("recall")

    def _ratio(self, name: str) -> float | None:
        of_tp, of_fp, of_fn = RATIOS[name]
        part = of_tp * self.tp
        return ratio(part, part + of_fp * self.fp + of_fn * self.fn)


def scores_of(confusion_KK: Array) -> list[Scores]:
    """Scores per class of a confusion matrix (truth × prediction)."""
    tp = confusion_KK.diagonal()
    columns = zip(tp, confusion_KK.sum(axis=0) - tp, confusion_KK.sum(axis=1) - tp, strict=True)
    return [Scores(int(t), int(p), int(n)) for t, p, n in columns]


def truth_columns(confusion_KK: Array, pixels: int) -> dict[str, Any]:
    """Columns of a metrics row for an image with truth; ``pixels``: number of valid pixels."""
    scores = scores_of(confusion_KK)
    row: dict[str, Any] = {name: [getattr(s, name) for s in scores] for name in ("tp", "fp", "fn")}
    row["ignored_pixels"] = pixels - int(confusion_KK.sum())
    if len(confusion_KK) <= MAX_CONFUSION_CLASSES:
        row["confusion"] = confusion_KK.ravel().tolist()
    return row


def added(one: SumT, other: SumT) -> SumT:
    """The sum of two values of a data class, field by field."""
    names = (f.name for f in fields(cast(Any, one)))
    return type(one)(**{name: _add(getattr(one, name), getattr(other, name)) for name in names})


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, dict):
        return dict(sorted((Counter(a) + Counter(b)).items()))
    if isinstance(a, tuple):
        return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else a or b
    return a + b


@dataclass(frozen=True)
class Totals:
    """The sums of a shard or of a whole run; ``a + b`` is the totals of both."""

    shards: int = 0
    images_seen: int = 0
    ok: int = 0
    failed: int = 0
    pixels: int = 0
    """Pixels of ``ok`` images, valid or not."""
    invalid_pixels: int = 0
    extrapolated: int = 0
    """Images whose own limits stretch them far beyond what the network was trained on."""
    with_truth: int = 0
    ignored_pixels: int = 0
    confidence_sum: int = 0
    class_pixels: tuple[int, ...] = ()
    tp: tuple[int, ...] = ()
    fp: tuple[int, ...] = ()
    fn: tuple[int, ...] = ()
    errors: dict[str, int] = field(default_factory=dict)
    """Number of rows by error code; on ``ok`` rows, codes concern the truth."""

    __add__ = added

    @property
    def valid_pixels(self) -> int:
        """Pixels that have a class."""
        return self.pixels - self.invalid_pixels

    @property
    def is_reconciled(self) -> bool:
        """True if every image that a reader saw has its row."""
        return self.images_seen == self.ok + self.failed

    @property
    def scores(self) -> list[Scores]:
        """Micro scores per class, over all images with truth."""
        return [Scores(*counts) for counts in zip(self.tp, self.fp, self.fn, strict=True)]

    def only_class(self, class_names: tuple[str, ...]) -> str | None:
        """The only class that occurs, in runs of several images."""
        there = [name for name, n in zip(class_names, self.class_pixels, strict=False) if n]
        return there[0] if self.ok > 1 and len(there) == 1 else None

    @classmethod
    def of_rows(cls, rows: pa.Table, images_seen: int) -> "Totals":
        """Totals of one metrics part."""
        ok = rows.select(["height", "width"]).filter(pc.equal(rows["status"], "ok"))
        pixels = pc.sum(pc.multiply(ok["height"].cast("int64"), ok["width"].cast("int64")))
        errors = Counter(code for code in rows["error_code"].to_pylist() if code)
        return cls(
            shards=1,
            images_seen=images_seen,
            ok=ok.num_rows,
            failed=rows.num_rows - ok.num_rows,
            pixels=pixels.as_py() or 0,
            invalid_pixels=_sum(rows, "invalid_pixels"),
            extrapolated=_sum(rows, "is_extrapolated"),
            with_truth=rows.num_rows - rows["tp"].null_count,
            ignored_pixels=_sum(rows, "ignored_pixels"),
            confidence_sum=_sum(rows, "confidence_sum"),
            class_pixels=_sum_lists(rows["class_pixels"]),
            tp=_sum_lists(rows["tp"]),
            fp=_sum_lists(rows["fp"]),
            fn=_sum_lists(rows["fn"]),
            errors=dict(sorted(errors.items())),
        )


def lists(column: pa.ChunkedArray) -> Array:
    """Equally long lists of integers, (n, their length); nulls are left out."""
    known = column.drop_null()
    flat = np.asarray(pc.list_flatten(known))
    return flat.reshape(len(known), flat.size // max(1, len(known)))


def _sum(rows: pa.Table, name: str) -> int:
    """Sum a column; 0 where the part's schema does not have it."""
    return (pc.sum(rows[name]).as_py() or 0) if name in rows.column_names else 0


def _sum_lists(column: pa.ChunkedArray) -> tuple[int, ...]:
    return tuple(lists(column).sum(axis=0).tolist())
