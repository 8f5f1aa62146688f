"""Images that are never in memory as a whole: the same rows as if they had been."""

import numpy as np
import pytest
import tifffile

from jobs.predict import predict
from tests.support.data import write_slides
from tests.support.runs import masks_of, table
from unet_core import open_run
from unet_core.runs.reader import OpenMasks

SHAPE = (700, 530)


def rows_of(run):
    return [{k: v for k, v in row.items() if k != "source_uri"} for row in table(run, "metrics")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"tile": (64, 48)}, {"rowsperstrip": 7}, {"tile": (64, 64), "compression": "zlib"}],
    ids=str,
)
def test_a_large_image_has_the_rows_of_a_small_one(
    make_config, tmp_path, monkeypatch, small_is_large, options
):
    source = write_slides(tmp_path / "slides", **options)
    predict(make_config(input=source, out="large"))
    run = str(tmp_path / "large")
    windows = table(tmp_path / "large", "masks")
    assert len(windows) == 6 * 5 + 1 + 4 * 6
    assert max(row["height"] for row in windows) == 128
    monkeypatch.undo()
    predict(make_config(input=source, out="small"))
    masks = masks_of(tmp_path / "small")
    assert len(masks) == 3
    for image_id, mask_HW in masks.items():
        assert (open_run(run).mask(image_id) == mask_HW).all()
    assert (
        open_run(run).mask("0.tif", (100, 200, 300, 77)) == masks["0.tif"][100:400, 200:277]
    ).all()
    assert rows_of(tmp_path / "large") == rows_of(tmp_path / "small")


def test_a_large_image_that_is_damaged_inside_is_one_failed_row_without_masks(
    make_config, tmp_path, small_is_large
):
    source = write_slides(tmp_path / "slides", tile=(64, 64), compression="zlib")
    path = tmp_path / "slides" / "images" / "0.tif"
    with tifffile.TiffFile(path) as tiff:
        start, count = (
            getattr(tiff.pages[0], name)[40] for name in ("dataoffsets", "databytecounts")
        )
    data = bytearray(path.read_bytes())
    data[start : start + count] = bytes(count)
    path.write_bytes(data)
    outcome = predict(make_config(input=source))
    assert outcome.totals.errors == {"decode": 1}
    assert {row["image_id"] for row in table(tmp_path / "run", "masks")} == {"1.tif", "2.tif"}


def test_a_large_truth_with_a_strange_value_is_told_and_the_image_segmented(
    make_config, tmp_path, small_is_large
):
    source = write_slides(tmp_path / "slides", tile=(64, 64))
    path = tmp_path / "slides" / "masks" / "0.tif"
    mask = tifffile.imread(path)
    mask[650, 500] = 9
    tifffile.imwrite(path, mask, tile=(64, 64))
    predict(make_config(input=source))
    row = rows_of(tmp_path / "run")[0]
    assert (row["status"], row["error_code"], row["tp"]) == ("ok", "truth", None)
    assert "holds 9" in row["error_message"]


def test_what_is_read_by_window_is_bounded_too(make_config, tmp_path, small_is_large):
    source = write_slides(tmp_path / "slides", tile=(64, 64)) | {"max_pixels": 1000}
    outcome = predict(make_config(input=source))
    assert outcome.totals.errors == {"too_large": 3}


def test_probabilities_of_a_large_image_are_put_together_of_the_windows_that_they_meet(
    make_config, tmp_path, monkeypatch, small_is_large
):
    source = write_slides(tmp_path / "slides", tile=(64, 48))
    run = predict(make_config(input=source, output={"probabilities": "float16"})).run.uri
    whole_KHW = np.full((1, *SHAPE), np.nan, np.float32)
    for row in table(tmp_path / "run", "masks"):
        if row["image_id"] == "0.tif":
            y, x, height, width = (row[side] for side in ("y", "x", "height", "width"))
            kept = np.frombuffer(row["probabilities"], np.float16).reshape(1, height, width)
            whole_KHW[:, y : y + height, x : x + width] = kept
    results = open_run(run)
    assert np.array_equal(results.probabilities("0.tif"), whole_KHW)
    shapes = []
    read = OpenMasks._read_probabilities
    monkeypatch.setattr(
        OpenMasks, "_read_probabilities", lambda *given: shapes.append(1) or read(*given)
    )
    found_KHW = results.probabilities("0.tif", (100, 200, 100, 77))
    assert np.array_equal(found_KHW, whole_KHW[:, 100:200, 200:277])
    assert len(shapes) == 4  # of 30
