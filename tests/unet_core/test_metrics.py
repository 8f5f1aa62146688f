import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.foreign import declare_torchvision
from unet_core.metrics import RATIOS, Scores, Totals, confusion, mean, scores_of
from unet_core.runs.schema import METRICS


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


def test_the_libraries_of_the_field_count_and_score_the_same():
    """One test, because their imports cost seconds."""
    declare_torchvision()
    import monai.metrics as monai
    import torch
    import torchmetrics.functional.classification as torchmetrics
    from skimage.metrics import contingency_table

    for seed in range(20):
        random = np.random.default_rng(seed)
        classes = int(random.integers(2, 6))
        used = random.choice(classes, size=int(random.integers(1, classes + 1)), replace=False)
        truth = random.choice([*used, 255], size=(13, 17)).astype(np.uint16)
        mask = random.choice(random.permutation(classes)[:2], size=(13, 17)).astype(np.uint8)
        matrix = confusion(truth, mask, classes, 255)
        mine = {name: [getattr(s, name) for s in scores_of(matrix)] for name in RATIOS}

        table = contingency_table(truth, mask, ignore_labels=[255]).toarray()[:classes]
        assert (matrix[: table.shape[0], : table.shape[1]] == table).all()
        assert matrix.sum() == table.sum() == (truth != 255).sum()

        y, p = torch.from_numpy(truth.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))
        options = {"num_classes": classes, "ignore_index": 255}
        theirs = torchmetrics.multiclass_confusion_matrix(p, y, **options)
        assert (theirs.numpy() == matrix).all()
        names = {"dice": "f1_score", "iou": "jaccard_index", "precision": "precision",
                 "recall": "recall"}  # fmt: skip
        for name, other in names.items():
            score = getattr(torchmetrics, f"multiclass_{other}")
            same_where_defined(mine[name], score(p, y, average=None, **options))

        one_hot = [torch.nn.functional.one_hot(x[y != 255], classes).T[None] for x in (p, y)]
        same_where_defined(mine["dice"], monai.compute_dice(*one_hot)[0])
        same_where_defined(mine["iou"], monai.compute_iou(*one_hot)[0])
        counts = monai.get_confusion_matrix(*one_hot)[0]
        for name, other in {"precision": "precision", "recall": "sensitivity"}.items():
            score = monai.compute_confusion_matrix_metric(other, counts)
            same_where_defined(mine[name], score)

        present = [(truth == k).any() or (mask[truth != 255] == k).any() for k in range(classes)]
        assert [value is not None for value in mine["iou"]] == present
        assert [value is not None for value in mine["dice"]] == present


def same_where_defined(mine, theirs):
    """Some call an undefined score 0 or NaN, and MONAI also one whose truth is empty."""
    assert len(mine) == len(theirs)
    for value, other in zip(mine, theirs.tolist(), strict=True):
        if value is None:
            assert np.isnan(other) or other == 0
        elif not np.isnan(other):
            assert value == pytest.approx(other, abs=1e-6)


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
