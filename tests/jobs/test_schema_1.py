"""Folders that the code before schema 2 made: read by every verb, left alone if they are finished,
and not continued.

``tests/reference/schema_1.tar.xz`` holds five images with masks, a network, a finished and an
unfinished run (of images of which one was damaged), an evaluation, two exports and a training, made
below ``/schema-1`` by the command line of the last version with schema 1.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.predict import predict
from jobs.train import train
from tests.support.runs import snapshot
from unet_core.config.loading import build
from unet_core.config.predict import PredictConfig
from unet_core.config.train import TrainConfig
from unet_core.errors import RunMismatchError
from unet_core.runs import schema
from unet_core.runs.reader import open_run
from unet_core.runs.run_folder import NEUTRAL, RunFolder
from unet_core.runs.verify import verify
from unet_core.storage.store import Store

ARCHIVE = Path(__file__).parents[1] / "reference" / "schema_1.tar.xz"
REFUSED = "with schema 1, and this one has 2: it can be read, but only that version can continue it"


@pytest.fixture
def old(tmp_path):
    """The folders, as if they had been made where they are now."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in tmp_path.rglob("*.json"):
        path.write_text(path.read_text().replace("/schema-1/", f"{tmp_path}/"))
    return tmp_path


def predict_config(old, *overrides, **sections):
    table = {
        "input": {"uri": f"{old}/images", "masks": f"{old}/masks/", "shard_images": 2},
        "model": {"checkpoint": f"{old}/model.safetensors"},
        "output": {"uri": f"{old}/finished", "report": False},
        "workers": {"count": "inline"},
    }
    return build(PredictConfig, table | sections, list(overrides))


def train_config(old, *overrides, model=None):
    """The config of the training, with keys by their old names."""
    table = {
        "data": {
            "train": {"uri": f"{old}/images", "masks": f"{old}/masks/"},
            "val_fraction": 0.4,
        },
        "model": model or {"width": 2, "depth": 2, "normalisation": "percentile"},
        "train": {"epochs": 2, "batch": 2, "crop": 32, "optimiser": "sgd"},
        "output": {"uri": f"{old}/training", "report": False},
        "workers": {"count": "inline"},
    }
    return build(TrainConfig, table, list(overrides))


def test_a_finished_run_is_left_alone_and_not_changed(old):
    before = snapshot(old / "finished")
    outcome = predict(predict_config(old))
    assert outcome.was_finished
    assert outcome.totals.ok == 5
    assert snapshot(old / "finished") == before
    with pytest.raises(RunMismatchError, match=r"model\.threshold: the run has 0\.5"):
        predict(predict_config(old, "model.threshold=0.4"))
    for changing in ({"refresh": True}, {"retry_failed": True}):
        with pytest.raises(RunMismatchError, match=REFUSED):
            predict(predict_config(old), **changing)
    assert snapshot(old / "finished") == before


def test_an_unfinished_run_is_read_and_not_continued(old):
    (old / "spoilt").symlink_to(old / "images")
    before = snapshot(old / "unfinished")
    config = predict_config(
        old,
        "errors.max_failed_images=0",
        input={"uri": f"{old}/spoilt", "shard_images": 2},
        output={"uri": f"{old}/unfinished", "report": False},
    )
    with pytest.raises(RunMismatchError, match=REFUSED):
        predict(config)
    assert snapshot(old / "unfinished") == before
    assert open_run(str(old / "unfinished")).metrics.num_rows < 5
    assert verify(str(old / "unfinished"), deep=True).problems == []


def test_its_results_are_read_as_those_of_today(old):
    results = open_run(str(old / "finished"))
    assert results.metrics.schema.names[1:] == schema.METRICS.names
    assert results.metrics["invalid_pixels"].null_count == 5
    for image_id in results.metrics["image_id"].to_pylist():
        mask = results.mask(image_id)
        assert mask.dtype == np.uint8
    assert verify(str(old / "finished"), deep=True).problems == []
    new = predict_config(old, output={"uri": f"{old}/new", "report": False})
    again = predict(new).run
    for image_id in results.metrics["image_id"].to_pylist():
        np.testing.assert_array_equal(open_run(again.uri).mask(image_id), results.mask(image_id))


def test_every_verb_reads_it(old, run_cli):
    run = old / "finished"
    for words in [
        ("status", run),
        ("verify", run, "--deep"),
        ("report", run),
        ("evaluate", run, "--truth", f"{old}/masks/"),
        ("evaluate", run, "--truth", f"{old}/masks/", "--name", "mine"),
        ("evaluate", run, "--against", run),
        ("export", run, "--format", "png", "--out", old / "export"),
        ("export", run, "--format", "tiff", "--out", old / "tiffs"),
        ("export", run, "--objects", "components", "--out", old / "objects"),
        ("status", old / "training"),
        ("report", old / "training"),
        ("model", old / "training" / "best.safetensors"),
    ]:
        code, _, errors = run_cli(*words)
        assert code == 0, (words, errors)
    assert len(list((run / "evaluation").iterdir())) == 4


def test_a_finished_training_is_left_alone_and_an_unfinished_one_not_continued(old):
    before = snapshot(old / "training")
    assert train(train_config(old)).was_finished
    assert snapshot(old / "training") == before
    with pytest.raises(RunMismatchError, match=r"train\.optimizer: the training has \"sgd\""):
        train(train_config(old, "train.optimizer=adam"))
    (old / "training" / "_SUCCESS").unlink()
    with pytest.raises(RunMismatchError, match=REFUSED):
        train(train_config(old))


def test_its_checkpoints_segment_and_begin_trainings(old):
    best = f"{old}/training/best.safetensors"
    out = {"uri": f"{old}/by-best", "report": False}
    assert predict(predict_config(old, model={"checkpoint": best}, output=out)).totals.ok == 5
    tuned = train(
        train_config(old, f"output.uri={old}/tuned", "train.epochs=1", model={"checkpoint": best})
    )
    assert Path(tuned.best).exists()


def test_parts_of_today_have_the_columns_of_schema_2(old):
    new = predict_config(old, output={"uri": f"{old}/new", "report": False})
    run = predict(new).run
    (part, *_) = (old / "new" / "metrics").glob("[!_]*")
    columns = pq.read_schema(part)
    assert columns.names == schema.METRICS.names
    assert columns.metadata[b"schema_version"] == b"2"
    assert json.loads((old / "new" / "run.json").read_text())["schema_version"] == "2"
    assert not run.is_of_schema_1


def test_a_key_that_a_folder_does_not_know_counts_as_what_the_code_did_before(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(NEUTRAL, "input.later", "no")
    folder = RunFolder(Store(str(tmp_path / "run")), "run.json", "run")
    folder.create_or_join({"input.uri": "in", "data.train.uri": "in"})
    folder.check({"input.uri": "in", "data.train.uri": "in", "input.later": "no"})
    folder.check({"input.uri": "in", "data.train.uri": "in", "data.train.later": "no"})
    with pytest.raises(RunMismatchError, match=r"input\.later: the run has null, .* \"yes\""):
        folder.check({"input.uri": "in", "data.train.uri": "in", "input.later": "yes"})
    with pytest.raises(RunMismatchError, match=r"input\.uri: the run has"):
        folder.check({"data.train.uri": "in"})


def test_a_folder_of_a_later_schema_is_not_continued(tmp_path):
    folder = RunFolder(Store(str(tmp_path / "run")), "run.json", "run")
    folder.require_current_schema()
    folder.create_or_join({"input.uri": "in"})
    folder.require_current_schema()
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace('"schema_version": "2"', '"schema_version": "3"'))
    with pytest.raises(RunMismatchError, match="with schema 3, and this one has 2"):
        RunFolder(Store(str(tmp_path / "run")), "run.json", "run").require_current_schema()
