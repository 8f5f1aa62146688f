import json
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from jobs.backends import session
from jobs.backends.paths import worker_paths
from jobs.job import prepare
from jobs.predict import predict
from jobs.results.status import status
from jobs.tools.plan import plan
from tests.support.data import digests
from tests.support.runs import snapshot, write_toml
from unet_core.errors import CheckpointError, ConfigError, RunMismatchError, StoreError
from unet_core.runs.compute import Compute
from unet_core.runs.verify import verify
from unet_core.storage.store import Store


def test_a_run_accounts_for_every_image(make_config, tmp_path):
    outcome = predict(make_config())
    totals = outcome.totals
    assert (totals.images_seen, totals.ok, totals.failed, totals.with_truth) == (12, 12, 0, 12)
    assert json.loads((tmp_path / "run" / "_SUCCESS").read_text())["images_seen"] == 12
    (timings,) = (tmp_path / "run" / "timings").glob("*")
    rows = pq.read_table(timings).to_pylist()
    assert len(rows) == 6
    assert all(row["attempt"] == 1 and row["device_s"] > 0 for row in rows)
    assert all(row["whole_s"] > row["writing_s"] > 0 for row in rows)


def test_every_key_is_in_the_identity_of_a_run_or_changes_no_part(make_config):
    changing_nothing = {"model.device", "output.uri", "output.report"}
    told_by_the_checkpoint = {"model.checkpoint", "model.factory"}
    config = make_config()
    compute = Compute(
        device="cpu", precision="float32", backend="eager", batch_pixels=1, versions={}
    )
    identity = prepare(config).make_record(compute).identity
    tables = config.model_dump(include={"input", "model", "tile", "output"})
    keys = {f"{table}.{key}" for table, values in tables.items() for key in values}
    assert keys - identity.keys() == changing_nothing | told_by_the_checkpoint


def test_a_second_run_writes_nothing(make_config, tmp_path):
    predict(make_config())
    before = snapshot(tmp_path / "run")
    again = predict(make_config("workers.cpus=1"))
    assert again.was_finished
    assert again.totals.images_seen == 12
    assert snapshot(tmp_path / "run") == before


def test_an_input_is_listed_once_for_a_run_and_never_for_its_resume(
    make_config, tars, tmp_path, monkeypatch
):
    listed = []
    real = Store.list
    monkeypatch.setattr(
        Store, "list", lambda self, folder="": (listed.append(self.uri()), real(self, folder))[1]
    )
    predict(make_config())
    assert listed.count(str(tars)) == 1
    next((tmp_path / "run" / "metrics").iterdir()).unlink()  # as verify says
    listed.clear()
    assert predict(make_config()).totals.images_seen == 12
    assert listed.count(str(tars)) == 0


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("output.encoding=png", "output.encoding"),
        ("model.checkpoint=builtin:nuclei", "model.sha256"),
        ("model.threshold=0.4", "model.threshold"),
        ("tile.size=512", "tile.size"),
        ("tile.batch=2", "tile.batch"),
        ("input.ignore_index=254", "input.ignore_index"),
        ("input.masks=''", "input.masks"),
    ],
)
def test_a_run_of_something_else_is_refused_by_key(make_config, tmp_path, override, key):
    predict(make_config())
    before = snapshot(tmp_path / "run")
    with pytest.raises(RunMismatchError, match=key):
        predict(make_config(override))
    assert snapshot(tmp_path / "run") == before


def test_a_run_in_memory_works_inline(make_config, tmp_path):
    outcome = predict(make_config(output={"uri": "memory://run-in-memory"}))
    assert outcome.totals.images_seen == 12
    assert verify("memory://run-in-memory", deep=True).problems == []


def test_other_people_s_folders_are_left_alone(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("please keep")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis\.tex\)"):
        predict(make_config())


@pytest.mark.parametrize(
    ("override", "error", "reason"),
    [
        ("tile.size=128", ConfigError, "needs 208 or more"),
        ("tile.size=250", ConfigError, "240 and 256 are possible"),
        ("model.checkpoint=none.safetensors", CheckpointError, "there is no such file"),
        ("input.uri=nowhere", StoreError, "there is nothing at"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    make_config, tmp_path, override, error, reason
):
    with pytest.raises(error, match=reason):
        predict(make_config(override))
    assert not (tmp_path / "run").exists()


def test_plan_and_status_tell_how_things_stand_and_write_nothing(make_config, tmp_path, folder):
    config = make_config()
    made = plan(config)
    assert (made.shards, made.shards_left, made.images) == (6, 6, None)
    assert not (tmp_path / "run").exists()
    loose = plan(make_config(input={"uri": str(folder / "images"), "masks": "", "shard_images": 5}))
    assert (loose.shards, loose.images) == (3, 12)
    predict(config)
    before = snapshot(tmp_path / "run")
    assert plan(config).shards_left == 0
    found = status(str(tmp_path / "run"))
    assert (found.shards, found.committed, found.is_finished) == (6, 6, True)
    assert found.totals.images_seen == 12
    assert snapshot(tmp_path / "run") == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["between masks and metrics", "inside a publication"])
def test_a_driver_that_is_killed_loses_and_repeats_nothing(make_config, tmp_path, stage):
    predict(make_config(out="undisturbed"))
    config = make_config(out="run")
    toml = write_toml(config, tmp_path / "job.toml")
    command = [sys.executable, "-m", "tests.support.dying_driver", stage, "9", toml]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    committed = snapshot(tmp_path / "run")
    committed = {p: t for p, t in committed.items() if p.parent.name == "metrics"}
    assert verify(str(tmp_path / "run")).problems == []
    outcome = predict(config)
    assert outcome.totals.images_seen == 12
    after = snapshot(tmp_path / "run")
    kept = {path: when for path, when in committed.items() if not path.name.startswith("_")}
    assert kept.items() <= after.items()  # what was committed was not computed again
    assert digests(tmp_path / "run") == digests(tmp_path / "undisturbed")
    findings = verify(str(tmp_path / "run"), deep=True)
    assert findings.problems == findings.notes == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_so_and_continues(make_config, tmp_path, number):
    config = make_config()
    toml = write_toml(config, tmp_path / "job.toml")
    stage = ("between masks and metrics", str(int(number)), toml)
    command = [sys.executable, "-m", "tests.support.dying_driver", *stage]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, "the same command continues" in done.stderr) == (130, True)
    assert not (tmp_path / "run" / "_SUCCESS").exists()
    assert predict(config).totals.images_seen == 12


@pytest.mark.parametrize(
    ("named", "came_along", "is_needed"),
    [
        ("builtin:nuclei", False, False),
        ("mine.safetensors", True, False),
        ("mine.safetensors", False, True),
        ("/models/mine.safetensors", True, True),
        ("s3://bucket/mine.safetensors", True, True),
    ],
)
def test_workers_must_see_the_checkpoint_unless_they_have_it(
    make_config, named, came_along, is_needed, monkeypatch
):
    monkeypatch.setattr(session, "has_working_dir", lambda: came_along)
    places = worker_paths(make_config(model={"checkpoint": named}))
    assert places.get("model.checkpoint") == (named if is_needed else None)
