"""Tasks over the shards of a run; the evaluation is the first one, also on Ray."""

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs.backends.tasks import run_tasks
from jobs.commands.arguments import run_config
from jobs.results.evaluate import evaluate
from unet_core import open_run
from unet_core.config.loading import build
from unet_core.config.predict import PredictConfig
from unet_core.errors import ShardError, StoreError
from unet_core.inputs.shards import make_shard

SHARDS = [make_shard(f"{n}.tar", n, "etag") for n in range(8)]


@dataclass(frozen=True)
class Noting:
    """Notes the shards that it was done with as files; some bring trouble."""

    folder: Path
    trouble: dict[str, str] = field(default_factory=dict)

    def done(self):
        return {path.stem for path in self.folder.glob("*.done")}

    def do(self, shard):
        tries = len(list(self.folder.glob(f"{shard.shard_id}-*")))
        (self.folder / f"{shard.shard_id}-{tries}.try").touch()
        match self.trouble.get(shard.uri, ""):
            case "refused":
                raise ShardError(f"{shard.uri} was written again")
            case "store":
                raise StoreError("the bucket is gone")
            case "slow":
                time.sleep(0.5)
            case "dies":
                os._exit(1)
            case "dies once" if not tries:
                os._exit(1)
        (self.folder / f"{shard.shard_id}.done").touch()
        return 1


def config_of(*overrides):
    table = {"input": {"uri": "input"}, "output": {"uri": "output"}}
    return build(PredictConfig, table, ["workers.cpus=1", "workers.count=inline", *overrides])


def do(task, *overrides):
    return run_tasks(task, SHARDS, config_of(*overrides), {"RUN": str(task.folder)}, "noting")


def tries(folder):
    return sorted(path.name.partition("-")[0] for path in folder.glob("*.try"))


def test_a_shard_that_cannot_be_done_is_set_aside_and_the_others_are_done(tmp_path):
    assert do(Noting(tmp_path, {"3.tar": "refused"})) == {"3.tar": "3.tar was written again"}
    assert Noting(tmp_path).done() == {s.shard_id for s in SHARDS if s.uri != "3.tar"}


def test_the_same_command_does_what_is_left_and_no_more(tmp_path):
    do(Noting(tmp_path, {"3.tar": "refused", "5.tar": "refused"}))
    before = tries(tmp_path)
    assert do(Noting(tmp_path)) == {}
    assert sorted([*before, SHARDS[3].shard_id, SHARDS[5].shard_id]) == tries(tmp_path)
    assert do(Noting(tmp_path)) == {}


def test_an_error_of_storage_stops_before_the_next_shard(tmp_path):
    trouble = {shard.uri: "slow" for shard in SHARDS} | {"7.tar": "store"}
    with pytest.raises(StoreError, match="the bucket is gone"):
        do(Noting(tmp_path, trouble))  # the largest one is the first
    assert len(tries(tmp_path)) <= 2


def test_whoever_is_stopped_does_not_wait_for_what_is_under_way(tmp_path, monkeypatch):
    is_over = threading.Event()

    def stopped(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(Noting, "do", lambda task, shard: is_over.wait(10) and 1)
    monkeypatch.setattr("jobs.backends.tasks.as_completed", stopped)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        do(Noting(tmp_path))
    is_over.set()
    assert time.monotonic() - began < 5


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_cluster_writes_the_same_bytes_and_survives_its_processes(
    make_run, ray_session, folder, tmp_path, monkeypatch
):
    parts = []
    for count in ("inline", "2"):
        results = open_run(make_run(out=f"run-{count}"))
        overrides = (f"workers.count={count}", "storage.shared=true",
                     f"input.masks={folder}/masks/")  # fmt: skip
        config = run_config(results, overrides, ("workers.", "storage.", "input.masks"))
        assert evaluate(results, config, "all").set_aside == {}
        metrics = Path(results.run.uri) / "evaluation" / "all" / "metrics"
        parts.append({path.name: path.read_bytes() for path in metrics.iterdir()})
    assert len(parts[0]) == 3
    assert parts[0] == parts[1]

    monkeypatch.setattr("jobs.backends.tasks.RETRIES", 1)
    task = Noting(tmp_path, {"2.tar": "dies once", "5.tar": "dies"})
    (shard, reason), *others = do(task, "workers.count=2", "storage.shared=true").items()
    assert (shard, others) == ("5.tar", [])
    assert "died" in reason
    assert task.done() == {s.shard_id for s in SHARDS if s.uri != "5.tar"}
    assert len(tries(tmp_path)) == len(SHARDS) + 2
