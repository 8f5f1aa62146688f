"""Sums over the parts of an evaluation: micro and macro scores, and the images that stand out.

Counts are integers. Macro sums are floats: they are added in the order of the shards' ids, so that
the same parts give the same digits. n images · K classes
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_core.arrays import Array
from unet_core.metrics import (
    MAX_CONFUSION_CLASSES,
    RATIOS,
    Totals,
    added,
    lists,
    mean,
    means,
    ratio,
    ratios,
)

MOST_EXTREMES = 10
MOST_EXAMPLES = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Images:
    """A number of images, with the ids or reasons of the first ones."""

    count: int = 0
    examples: tuple[str, ...] = ()

    def __add__(self, other: "Images") -> "Images":
        return Images(self.count + other.count, (*self.examples, *other.examples)[:MOST_EXAMPLES])

    @classmethod
    def of(cls, examples: Iterable[str]) -> "Images":
        """Count images by an example of each."""
        found = list(examples)
        return cls(len(found), tuple(found[:MOST_EXAMPLES]))


@dataclass(frozen=True)
class Extremes:
    """The images with the lowest values, in their order."""

    images: tuple[tuple[float, str], ...] = ()

    def __add__(self, other: "Extremes") -> "Extremes":
        return Extremes(tuple(nsmallest(MOST_EXTREMES, (*self.images, *other.images))))

    @classmethod
    def of(cls, values_n: Array, ids: list[str]) -> "Extremes":
        """The extremes of an array; NaN counts as no value."""
        known = ((float(v), i) for v, i in zip(values_n, ids, strict=True) if not np.isnan(v))
        return cls(tuple(nsmallest(MOST_EXTREMES, known)))


@dataclass(frozen=True)
class Aggregate:
    """The sums of one part or of many; ``a + b`` is the aggregate of both."""

    totals: Totals = field(default_factory=Totals)
    without: Images = Images()
    unusable: Images = Images()
    background: Images = Images()
    """Images without a label image, compared with a truth that is all class 0."""
    only_ok_here: Images = Images()
    """Images that are ok here and failed in the other run, where one is the truth."""
    only_ok_there: Images = Images()
    """Images that failed here and are ok there."""
    confusion: Array | int = 0
    """Confusion of all images, flat; 0 where there is no truth, or too many classes."""
    sums: Array | int = 0
    """Sums of the images' ratios where they are defined (RATIOS × K)."""
    counts: Array | int = 0
    """Numbers of images in each of the sums (RATIOS × K)."""
    worst: Extremes = Extremes()
    """Images of the lowest IoU, the mean over the foreground classes in their truth or mask."""
    flipped: Extremes = Extremes()
    """Images of the largest share of pixels whose class is another one; negative."""

    __add__ = added

    @classmethod
    def of_rows(
        cls, rows: pa.Table, images_seen: int, of_runs: bool, first_foreground: int
    ) -> "Aggregate":
        """Aggregate of one part; ``of_runs``: ``truth`` is the image's status in another run."""
        told = cls(Totals.of_rows(rows, images_seen), **_without_comparison(rows, of_runs))
        compared = rows.filter(pc.is_valid(rows["tp"]))
        if not compared.num_rows:
            return told
        tp_nK, fp_nK, fn_nK = (lists(compared[name]) for name in ("tp", "fp", "fn"))
        of_images = {name: ratios(name, tp_nK, fp_nK, fn_nK) for name in RATIOS}
        ids = compared["image_id"].to_pylist()
        with np.errstate(invalid="ignore"):  # images whose truth is ignored everywhere
            flipped_n = fp_nK.sum(axis=1) / (tp_nK + fp_nK).sum(axis=1)
        has_confusion = tp_nK.shape[1] <= MAX_CONFUSION_CLASSES
        return replace(
            told,
            confusion=lists(compared["confusion"]).sum(axis=0) if has_confusion else 0,
            sums=np.stack([np.nansum(found_nK, axis=0) for found_nK in of_images.values()]),
            counts=np.stack([(~np.isnan(found_nK)).sum(axis=0) for found_nK in of_images.values()]),
            background=Images.of(
                compared["image_id"].filter(pc.is_null(compared["truth"])).to_pylist()
            ),
            worst=Extremes.of(means(of_images["iou"][:, first_foreground:]), ids),
            flipped=Extremes.of(-flipped_n, ids),
        )

    def scores(self, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
        """Micro and macro scores per class; None where they are not defined."""
        if not self.totals.with_truth:
            return []
        of_images = (np.transpose(of).tolist() for of in (self.sums, self.counts))
        return [
            {
                "class": class_name,
                "micro": {name: getattr(score, name) for name in RATIOS},
                "macro": dict(zip(RATIOS, map(ratio, sums, counts), strict=True)),
                "images": counts[[*RATIOS].index("iou")],
                "pixels": vars(score),
            }
            for class_name, score, sums, counts in zip(
                class_names, self.totals.scores, *of_images, strict=True
            )
        ]


def counted(totals: Totals) -> list[Any]:
    """Sums that differ between two states of a run, for JSON."""
    return [totals.images_seen, totals.ok, list(totals.class_pixels), totals.confidence_sum]


def scored(aggregate: Aggregate, class_names: tuple[str, ...]) -> Row:
    """Document of an evaluation against truth, for JSON."""
    scores = aggregate.scores(class_names)
    background = aggregate.background.count
    return {
        "images": {
            "seen": aggregate.totals.images_seen,
            "ok": aggregate.totals.ok,
            "failed": aggregate.totals.failed,
            "compared": aggregate.totals.with_truth,
            "without_truth": aggregate.without.count,
            "unusable_truth": aggregate.unusable.count,
            **({"as_background": background} if background else {}),
        },
        "ignored_pixels": aggregate.totals.ignored_pixels,
        "classes": scores,
        "mean": {
            kind: {name: mean(score[kind][name] for score in scores) for name in RATIOS}
            for kind in ("micro", "macro")
        },
        "confusion": _square(aggregate.confusion),
        "worst": [{"image_id": image_id, "iou": iou} for iou, image_id in aggregate.worst.images],
        "without_truth": list(aggregate.without.examples),
        "unusable_truth": list(aggregate.unusable.examples),
    }


def changed(aggregate: Aggregate, class_names: tuple[str, ...], only_there: Images) -> Row:
    """Document of an evaluation against another run, for JSON."""
    scores = aggregate.totals.scores
    pixels = sum(score.tp + score.fn for score in scores)
    left_out = {
        "only_here": aggregate.without,
        "only_there": only_there,
        "failed_there": aggregate.only_ok_here,
        "failed_here": aggregate.only_ok_there,
        "unusable_there": aggregate.unusable,
    }
    return {
        "images": {"compared": aggregate.totals.with_truth}
        | {name: images.count for name, images in left_out.items()},
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
        "confusion": _square(aggregate.confusion),
        "flipped": [
            {"image_id": image_id, "changed": -share}
            for share, image_id in aggregate.flipped.images
            if share
        ],
        **{name: list(images.examples) for name, images in left_out.items()},
    }


def _square(confusion: Array | int) -> list[list[int]] | None:
    if isinstance(confusion, int):
        return None
    return [*confusion.reshape(math.isqrt(confusion.size), -1).tolist()]


def _without_comparison(rows: pa.Table, of_runs: bool) -> dict[str, Any]:
    """``Images`` of the rows without a comparison, by the reason."""
    columns = ["image_id", "status", "truth", "error_code", "error_message"]
    left = rows.filter(pc.is_null(rows["tp"])).select(columns).to_pylist()
    ok = [row for row in left if row["status"] == "ok"]
    found = [row for row in ok if not (of_runs and row["truth"] == "failed")]
    return {
        "without": Images.of(row["image_id"] for row in ok if row["truth"] is None),
        "unusable": Images.of(_reason(row) for row in found if row["error_code"]),
        "only_ok_here": Images.of(
            _reason(row) for row in ok if of_runs and row["truth"] == "failed"
        ),
        "only_ok_there": Images.of(
            _reason(row)
            for row in left
            if of_runs and row["status"] != "ok" and row["truth"] == "ok"
        ),
    }


def _reason(row: Row) -> str:
    return f"{row['image_id']}: {row['error_message']}"
