import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet_core.metrics import Scores, Totals, confusion, mean, scores_of
from unet_core.schema import METRICS


def test_confusion_counts_truth_against_prediction_without_ignored_pixels():
    truth = np.array([[0, 0, 1, 2, 255]], np.uint16)
    mask = np.array([[0, 1, 1, 0, 2]], np.uint8)
    matrix = confusion(truth, mask, 3, 255)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert scores_of(matrix) == [Scores(1, 1, 1), Scores(1, 1, 0), Scores(0, 0, 1)]


def test_a_ratio_without_denominator_is_none():
    assert Scores().iou is None
    assert Scores().dice is None
    assert Scores(fp=3).iou == 0
    assert mean([None, 0.5, 1.0]) == 0.75
    assert mean([None]) is None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.randoms())
def test_scores_are_those_of_their_definitions(truth, random):
    mask = [random.randint(0, 3) for _ in truth]
    matrix = confusion(np.array([truth]), np.array([mask]), 4, 255)
    for class_id, score in enumerate(scores_of(matrix)):
        a = {i for i, t in enumerate(truth) if t == class_id}
        b = {i for i, m in enumerate(mask) if m == class_id}
        assert score.iou == (len(a & b) / len(a | b) if a | b else None)
        assert score.dice == (2 * len(a & b) / (len(a) + len(b)) if a or b else None)


def row(**columns):
    return dict.fromkeys(METRICS.names) | columns


def test_totals_add_up_in_any_order():
    ok = row(status="ok", height=2, width=3, class_pixels=[4, 2], confidence_sum=7,
             tp=[3, 1], fp=[1, 1], fn=[1, 1], ignored_pixels=0)  # fmt: skip
    bare = row(status="ok", height=1, width=1, class_pixels=[1, 0], confidence_sum=1)
    failed = row(status="failed", error_code="decode")
    parts = [
        Totals.of_rows(pa.Table.from_pylist(rows, schema=METRICS), len(rows))
        for rows in ([ok, failed], [bare], [failed], [ok, bare])
    ]
    total = sum(parts, Totals())
    assert total == sum(reversed(parts), Totals())
    assert total.is_reconciled
    assert (total.shards, total.images_seen, total.ok, total.failed) == (4, 6, 4, 2)
    assert (total.pixels, total.with_truth, total.class_pixels) == (14, 2, (10, 4))
    assert total.errors == {"decode": 2}
    assert total.scores[1].iou == pytest.approx(1 / 3)
