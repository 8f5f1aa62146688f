"""What the parts of an evaluation add up to: micro and macro scores, and the images that stand out.

Counts are integers. Macro sums are floats: they are added in the order of the shards' ids, so that
the same parts give the same digits. n images · K classes
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_core.arrays import Array
from unet_core.metrics import MAX_CONFUSION_CLASSES, RATIOS, Totals, mean, ratio

MOST_EXTREMES = 10
MOST_EXAMPLES = 3

Extreme = tuple[float, str]
"""A value, and the image that has it; what sorts first stands out most."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Images:
    """How many images something happened to, and the first ones with what is to be said."""

    count: int = 0
    examples: tuple[str, ...] = ()

    def __add__(self, other: "Images") -> "Images":
        examples = (*self.examples, *other.examples)[:MOST_EXAMPLES]
        return Images(self.count + other.count, examples)

    @classmethod
    def of(cls, told: Iterable[str]) -> "Images":
        """Those that are told."""
        all_told = list(told)
        return cls(len(all_told), tuple(all_told[:MOST_EXAMPLES]))


@dataclass(frozen=True)
class Tally:
    """The sums of one part or of many; ``a + b`` is the tally of both."""

    totals: Totals = field(default_factory=Totals)
    confusion: Array | int = 0
    """Of all images, flat; 0 where there is no truth, or too many classes."""
    sums: Array | int = 0
    """Of the images' ratios where they are defined (RATIOS × K),"""
    counts: Array | int = 0
    """and of how many images that is."""
    worst: tuple[Extreme, ...] = ()
    """By IoU, the mean over the image's classes."""
    flipped: tuple[Extreme, ...] = ()
    """By the share of pixels whose class is another one; negative."""
    without: Images = Images()
    unusable: Images = Images()
    only_ok_here: Images = Images()
    """Of another run as truth: images that failed there,"""
    only_ok_there: Images = Images()
    """and that failed here."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.totals + other.totals,
            self.confusion + other.confusion,
            self.sums + other.sums,
            self.counts + other.counts,
            tuple(nsmallest(MOST_EXTREMES, (*self.worst, *other.worst))),
            tuple(nsmallest(MOST_EXTREMES, (*self.flipped, *other.flipped))),
            self.without + other.without,
            self.unusable + other.unusable,
            self.only_ok_here + other.only_ok_here,
            self.only_ok_there + other.only_ok_there,
        )

    @classmethod
    def of_rows(cls, rows: pa.Table, images_seen: int, of_runs: bool) -> "Tally":
        """The tally of one part; ``of_runs``: ``truth`` is the image's status in another run."""
        totals = Totals.of_rows(rows, images_seen)
        told = _told(rows, of_runs)
        compared = rows.filter(pc.is_valid(rows["tp"]))
        if not compared.num_rows:
            return cls(totals, 0, 0, 0, (), (), **told)
        tp_nK, fp_nK, fn_nK = (_matrix(compared[name]) for name in ("tp", "fp", "fn"))
        ratios = _ratios(tp_nK, fp_nK, fn_nK)
        ids = compared["image_id"].to_pylist()
        is_known = ~np.isnan(ratios)
        ious_nK = ratios[RATIOS.index("iou")]
        with np.errstate(invalid="ignore"):  # images whose truth is ignored everywhere
            worst_n = np.nansum(ious_nK, axis=1) / np.sum(~np.isnan(ious_nK), axis=1)
            flipped_n = fp_nK.sum(axis=1) / (tp_nK + fp_nK).sum(axis=1)
        has_confusion = tp_nK.shape[1] <= MAX_CONFUSION_CLASSES
        return cls(
            totals,
            _matrix(compared["confusion"]).sum(axis=0) if has_confusion else 0,
            np.nansum(ratios, axis=1),
            is_known.sum(axis=1),
            _extremes(worst_n, ids),
            _extremes(-flipped_n, ids),
            **told,
        )

    def scores(self, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
        """Micro and macro scores per class; None where they are not defined."""
        if not self.totals.with_truth:
            return []
        return [
            {
                "class": class_name,
                "micro": {name: getattr(score, name) for name in RATIOS},
                "macro": {name: self._macro(n, class_id) for n, name in enumerate(RATIOS)},
                "images": int(np.asarray(self.counts)[RATIOS.index("iou"), class_id]),
                "pixels": {"tp": score.tp, "fp": score.fp, "fn": score.fn},
            }
            for class_id, (class_name, score) in enumerate(
                zip(class_names, self.totals.scores, strict=True)
            )
        ]

    def _macro(self, number: int, class_id: int) -> float | None:
        count = int(np.asarray(self.counts)[number, class_id])
        return float(np.asarray(self.sums)[number, class_id]) / count if count else None


def counted(totals: Totals) -> list[Any]:
    """What tells the masks of one state of a run from those of another, for JSON."""
    return [totals.images_seen, totals.ok, list(totals.class_pixels), totals.confidence_sum]


def scored(tally: Tally, class_names: tuple[str, ...]) -> Row:
    """What an evaluation against truth says, for JSON."""
    scores = tally.scores(class_names)
    return {
        "images": {
            "seen": tally.totals.images_seen,
            "ok": tally.totals.ok,
            "failed": tally.totals.failed,
            "compared": tally.totals.with_truth,
            "without_truth": tally.without.count,
            "unusable_truth": tally.unusable.count,
        },
        "ignored_pixels": tally.totals.ignored_pixels,
        "classes": scores,
        "mean": means(scores),
        "confusion": _square(tally.confusion),
        "worst": [{"image_id": image_id, "iou": iou} for iou, image_id in tally.worst],
        "without_truth": list(tally.without.examples),
        "unusable_truth": list(tally.unusable.examples),
    }


def changed(tally: Tally, class_names: tuple[str, ...], only_there: Images) -> Row:
    """What an evaluation against another run says, for JSON."""
    scores = tally.totals.scores
    pixels = sum(score.tp + score.fn for score in scores)
    return {
        "images": {
            "compared": tally.totals.with_truth,
            "only_here": tally.without.count,
            "only_there": only_there.count,
            "failed_there": tally.only_ok_here.count,
            "failed_here": tally.only_ok_there.count,
            "unusable_there": tally.unusable.count,
        },
        "pixels": pixels,
        "changed": ratio(pixels - sum(score.tp for score in scores), pixels),
        "classes": [
            {
                "class": name,
                "before": ratio(score.tp + score.fn, pixels),
                "after": ratio(score.tp + score.fp, pixels),
                "iou": score.iou,
            }
            for name, score in zip(class_names, scores, strict=False)
        ],
        "confusion": _square(tally.confusion),
        "flipped": [
            {"image_id": image_id, "changed": -share} for share, image_id in tally.flipped if share
        ],
        "only_here": list(tally.without.examples),
        "only_there": list(only_there.examples),
        "failed_there": list(tally.only_ok_here.examples),
        "failed_here": list(tally.only_ok_there.examples),
        "unusable_there": list(tally.unusable.examples),
    }


def _square(confusion: Array | int) -> list[list[int]] | None:
    if isinstance(confusion, int):
        return None
    side = math.isqrt(confusion.size)
    rows: list[list[int]] = confusion.reshape(side, side).tolist()
    return rows


def means(scores: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Over the classes where they are defined."""
    return {
        kind: {name: mean(score[kind][name] for score in scores) for name in RATIOS}
        for kind in ("micro", "macro")
    }


def _matrix(column: pa.ChunkedArray) -> Array:
    """Equally long lists, (n, their length)."""
    return np.asarray(pc.list_flatten(column)).reshape(len(column), -1)


def _ratios(tp_nK: Array, fp_nK: Array, fn_nK: Array) -> Array:
    """RATIOS × n × K; NaN where they are not defined."""
    parts = np.stack([2 * tp_nK, tp_nK, tp_nK, tp_nK])
    wholes = np.stack([2 * tp_nK + fp_nK + fn_nK, tp_nK + fp_nK + fn_nK, tp_nK + fp_nK,
                       tp_nK + fn_nK])  # fmt: skip
    return np.divide(parts, wholes, out=np.full(parts.shape, np.nan), where=wholes > 0)


def _extremes(values_n: Array, ids: list[str]) -> tuple[Extreme, ...]:
    known = ((float(v), i) for v, i in zip(values_n, ids, strict=True) if not np.isnan(v))
    return tuple(nsmallest(MOST_EXTREMES, known))


def _told(rows: pa.Table, of_runs: bool) -> dict[str, Images]:
    """Images without a comparison, by why."""
    columns = ["image_id", "status", "truth", "error_code", "error_message"]
    left = rows.filter(pc.is_null(rows["tp"])).select(columns).to_pylist()
    ok = [row for row in left if row["status"] == "ok"]
    failed = [row for row in left if row["status"] != "ok"]
    is_lost = [of_runs and row["truth"] == "failed" for row in ok]
    unusable = [r for r, lost in zip(ok, is_lost, strict=True) if r["error_code"] and not lost]
    return {
        "without": Images.of(row["image_id"] for row in ok if row["truth"] is None),
        "unusable": Images.of(map(_reason, unusable)),
        "only_ok_here": Images.of(
            _reason(row) for row, lost in zip(ok, is_lost, strict=True) if lost
        ),
        "only_ok_there": Images.of(
            _reason(row) for row in failed if of_runs and row["truth"] == "ok"
        ),
    }


def _reason(row: Row) -> str:
    return f"{row['image_id']}: {row['error_message']}"
