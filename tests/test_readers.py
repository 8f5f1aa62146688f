"""Runs open in the programs that people have, as the programs' own documents say."""

import io
import shutil

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.dataset as ds
import pytest
from PIL import Image

from jobs.predict import predict
from tests.support.runs import config_of
from unet_core import open_run


@pytest.fixture(scope="module", params=["raw", "png"])
def results(request, folder, tiny_model, tmp_path_factory):
    """A run with truth, and with a shard of nothing but a failed image."""
    root = tmp_path_factory.mktemp(request.param)
    shutil.copytree(folder / "images", root / "images")
    (root / "images" / "zz.png").write_bytes(b"no image")
    source = {"masks": f"{folder}/masks/", "shard_images": 4}
    options = (f"output.encoding={request.param}", "errors.max_failed_images=1")
    images, out = root / "images", root / "run"
    outcome = predict(config_of(images, tiny_model, out, *options, input=source))
    assert (outcome.totals.ok, outcome.totals.failed, outcome.totals.shards) == (12, 1, 4)
    return open_run(f"{root}/run")


def by_duckdb(folder):
    found = duckdb.sql(f"SELECT * FROM '{folder}/*.parquet'")
    return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]


READERS = {
    "duckdb": by_duckdb,
    "pandas": lambda folder: pd.read_parquet(folder).to_dict("records"),
    "polars": lambda folder: pl.read_parquet(f"{folder}/*.parquet").to_dicts(),
    "pyarrow": lambda folder: ds.dataset(folder).to_table().to_pylist(),
}


@pytest.mark.parametrize("reader", READERS)
def test_masks_and_rows_are_read_as_open_run_reads_them(results, reader):
    masks = READERS[reader](f"{results.run.uri}/masks")
    assert len(masks) == 12
    for row in masks:
        if row["encoding"] == "raw":
            mask = np.frombuffer(row["mask"], np.uint8).reshape(row["height"], row["width"])
        else:
            mask = np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"])))
        assert (mask == results.mask(row["image_id"])).all()
    rows = READERS[reader](f"{results.run.uri}/metrics")
    assert sum(row["status"] == "failed" for row in rows) == 1
    scored = [row for row in rows if isinstance(row["tp"], list | np.ndarray)]
    assert np.sum([row["tp"] for row in scored], axis=0).tolist() == list(results.totals.tp)


def test_png_masks_are_images_to_datasets_and_raw_ones_bytes(results, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    from datasets import load_dataset

    parts = f"{results.run.uri}/masks/*.parquet"
    rows = load_dataset("parquet", data_files=parts, split="train", cache_dir=str(tmp_path))
    assert len(rows) == 12
    for row in rows:
        mask_HW = results.mask(row["image_id"])
        if row["encoding"] == "raw":
            assert row["mask"] == mask_HW.tobytes()
        else:
            assert isinstance(row["mask"], Image.Image)
            assert (np.asarray(row["mask"]) == mask_HW).all()
