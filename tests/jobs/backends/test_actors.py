"""The same job on real Ray actors. One session for the suite; the GPUs are pretended."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from jobs.predict import predict
from tests.support import poison
from tests.support.data import digests, write_checkpoint, write_many_tars, write_tar
from tests.support.processes import is_ours
from tests.support.runs import write_toml
from tests.support.s3 import BUCKET
from unet_core.config.sections import StorageConfig
from unet_core.errors import CheckpointError, ConfigError, RunMismatchError, WorkersError
from unet_core.images.decoder import Decoder
from unet_core.runs.verify import verify
from unet_core.storage.store import Store
from unet_core.synthetic import nuclei, png

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


SHARED = {"shared": True}


def actor_pids():
    """Processes of the segmenting actors of this suite."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_actor = path.read_bytes().startswith(b"ray::SegmentActor")
            if is_actor and is_ours(int(path.parent.name)):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def kill_one_actor_after(commits, run, killed):
    store = Store(str(run), StorageConfig(endpoint_url=os.environ.get("AWS_ENDPOINT_URL", "")))
    while sum(not entry.name.startswith("_") for entry in store.list("metrics")) < commits:
        time.sleep(0.005)
    for pid in actor_pids()[:1]:
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)


def test_any_number_of_actors_writes_the_same_bytes(make_config, tmp_path):
    predict(make_config(out="inline"))
    expected = digests(tmp_path / "inline")
    for actors in (1, 2, 4):
        workers = {"count": actors, "gpus": 1, "cpus": 1}
        config = make_config(out=f"run{actors}", workers=workers, storage=SHARED)
        assert predict(config).totals.images_seen == 12
        assert digests(tmp_path / f"run{actors}") == expected
    assert verify(str(tmp_path / "run4"), deep=True).problems == []


def test_relative_paths_mean_to_actors_what_they_mean_here(
    make_config, tmp_path, monkeypatch, folder, tiny_model
):
    monkeypatch.chdir(folder)  # actors began elsewhere
    relative = {
        "input": {"uri": "images", "masks": "masks/"},
        "model": {"checkpoint": os.path.relpath(tiny_model)},
    }
    predict(make_config(out="inline", **relative))
    output = {"uri": os.path.relpath(tmp_path / "run")}
    predict(make_config("workers.count=1", output=output, storage=SHARED, **relative))
    assert digests(tmp_path / "run") == digests(tmp_path / "inline")


def test_a_killed_actor_is_replaced_and_nothing_is_lost_or_repeated(make_config, tmp_path):
    tars = write_many_tars(tmp_path)
    shared = {"input": {"uri": str(tars)}}
    predict(make_config(out="undisturbed", **shared))
    killed: list[int] = []
    run = tmp_path / "run"
    threading.Thread(target=kill_one_actor_after, args=(2, run, killed), daemon=True).start()
    workers = {"count": 2, "gpus": 1, "cpus": 1}
    outcome = predict(make_config(workers=workers, storage=SHARED, **shared))
    assert killed
    assert outcome.totals.images_seen == 48
    assert outcome.set_aside == {}
    assert digests(run) == digests(tmp_path / "undisturbed")
    assert verify(str(run), deep=True).problems == []


def test_nodes_that_join_get_shards_and_those_that_leave_lose_only_theirs(
    make_config, ray_session, tmp_path
):
    """A run that waits for its first node, which leaves in the middle, and then for another."""
    slow = {"input": {"uri": str(write_many_tars(tmp_path))}, "tile": {"tta": "dihedral"}}
    predict(make_config(out="undisturbed", **slow))
    late = {"num_cpus": 1, "num_gpus": 1, "resources": {"accelerator_type:LATE": 1}}
    workers = {"count": "auto", "max": 2, "accelerator_type": "LATE", "gpus": 1, "cpus": 1}
    config, run = make_config(workers=workers, storage=SHARED, **slow), tmp_path / "run"
    with ThreadPoolExecutor(1) as thread:
        outcome = thread.submit(predict, config)
        first = ray_session.add_node(**late)
        while not (run / "metrics").exists() or len([*(run / "metrics").glob("[!_]*")]) < 3:
            time.sleep(0.01)
            assert not outcome.done(), outcome.result()
        ray_session.remove_node(first, allow_graceful=False)
        parts = len([*(run / "metrics").glob("[!_]*")])
        second = ray_session.add_node(**late)
        assert outcome.result(timeout=300).totals.images_seen == 48
    ray_session.remove_node(second)
    assert 3 <= parts < 24
    assert outcome.result().set_aside == {}
    assert digests(run) == digests(tmp_path / "undisturbed")
    (timings,) = (run / "timings").glob("*")
    assert len(set(pq.read_table(timings)["actor"].to_pylist())) == 2


def test_images_that_kill_or_hang_their_actors_become_failed_rows(make_config, tmp_path):
    small, large = (png(nuclei(n, n, np.random.default_rng(n))[0]) for n in (32, 96))
    (tmp_path / "in").mkdir()
    for number in range(4):  # the largest come first, so the rate is known when one hangs
        write_tar(tmp_path / "in" / f"good-{number}.tar", {"a.png": large, "b.png": large})
    for harm in ("kills", "hangs"):
        members = {"a.png": small, f"{harm}.png": small, "z.png": small}
        write_tar(tmp_path / "in" / f"{harm}.tar", members)
    decode = Decoder.decode
    model = write_checkpoint(tmp_path / "model.safetensors", poison.SPEC, poison.network())
    Decoder.decode = decode  # the driver stays unharmed
    config = make_config(
        input={"uri": str(tmp_path / "in"), "masks": ""},
        model={"checkpoint": model, "factory": "tests.support.poison:network"},
        workers={"count": 2, "gpus": 1, "cpus": 1},
        storage={**SHARED, "deadline_s": 2},
        errors={"max_failed_images": 2, "stall_s": 4},
    )
    outcome = predict(config)
    assert outcome.is_complete
    assert outcome.totals.errors == {"timeout": 1, "worker_died": 1}
    assert (outcome.totals.ok, outcome.totals.failed) == (12, 2)
    findings = verify(config.output.uri, deep=True)
    assert findings.problems == findings.notes == []


def test_actors_of_other_code_are_refused(make_config, monkeypatch):
    monkeypatch.setattr("jobs.backends.actors.code_version", lambda: "unet-jobs 9.9 (sources abc)")
    workers = {"count": 1, "gpus": 1, "cpus": 1}
    with pytest.raises(
        WorkersError, match=r"node \w+ runs unet-jobs .*, the driver unet-jobs 9\.9 \(sources"
    ):
        predict(make_config(workers=workers, storage=SHARED))


def exported(name):
    """Samples of one of our metrics, from every node's exporter: its labels and its value."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            where = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            text = urllib.request.urlopen(where, timeout=60).read().decode()
            for family in text_string_to_metric_families(text):
                found += [(s.labels, s.value) for s in family.samples if s.name == name]
    return found


def test_prometheus_sees_what_a_run_committed(make_config):
    workers = {"count": 1, "gpus": 1, "cpus": 1}
    predict(make_config(out="measured", workers=workers, storage=SHARED))

    def of_run(name):
        return [(s, v) for s, v in exported(name) if s.get("run") == "measured"]

    deadline, committed = time.monotonic() + 120, []
    while sum(v for _, v in committed) < 6 and time.monotonic() < deadline:
        time.sleep(0.5)
        committed = of_run("ray_unet_jobs_attempts_total")
    ((labels, value),) = committed
    assert (labels["outcome"], value) == ("committed", 6)
    ((labels, value),) = of_run("ray_unet_jobs_images_total")
    assert (labels["status"], value) == ("ok", 12)
    assert sum(v for _, v in of_run("ray_unet_jobs_bytes_total")) > 1000
    stages = {s["stage"] for s, v in of_run("ray_unet_jobs_stage_seconds_total") if v > 0}
    assert {"reading", "decoding", "device", "encoding", "writing"} <= stages
    assert sum(v for _, v in of_run("ray_unet_jobs_shard_seconds_count")) == 6
    assert of_run("ray_unet_jobs_ready_actors")[0][1] == 0


def test_more_than_the_cluster_has_is_refused_with_what_it_has(make_config):
    with pytest.raises(WorkersError, match=r"9 actors of 1 GPU .* has 2 nodes .* room for 4"):
        predict(make_config(workers={"count": 9, "gpus": 1}, storage=SHARED))


def test_an_actor_s_refusal_reaches_the_person(make_config, tiny_model, tmp_path):
    path = tmp_path / "model.safetensors"
    whole = Path(tiny_model).read_bytes()
    path.write_bytes(whole[:-100])
    config = make_config(
        model={"checkpoint": str(path)}, workers={"count": 1, "gpus": 1}, storage=SHARED
    )
    with pytest.raises(CheckpointError, match="a damaged safetensors file"):
        predict(config)


def test_an_actor_with_other_versions_is_refused_unless_allowed(make_config, tmp_path):
    config = make_config()
    predict(config)
    (tmp_path / "run" / "_SUCCESS").unlink()
    next((tmp_path / "run" / "metrics").glob("*")).unlink()
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace('"torch": "', '"torch": "9.'))
    workers = {"count": 1, "gpus": 1, "cpus": 1}
    with pytest.raises(RunMismatchError, match=r"compute\.versions"):
        predict(make_config(workers=workers, storage=SHARED))
    outcome = predict(make_config(workers=workers | {"mixed_devices": True}, storage=SHARED))
    assert outcome.totals.images_seen == 12


def test_a_plain_path_on_several_nodes_must_be_declared_shared(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"input\.uri: .* is a path of this .* has 2 nodes"):
        predict(make_config(workers={"count": 2, "gpus": 1}))
    assert not (tmp_path / "run").exists()


def test_memory_belongs_to_one_process(make_config):
    config = make_config(output={"uri": "memory://run"}, workers={"count": 1}, storage=SHARED)
    with pytest.raises(ConfigError, match=r"output\.uri: memory://run lives in one process"):
        predict(config)


def test_a_cluster_named_by_the_environment_is_used(make_config, tmp_path):
    workers = {"count": "auto", "cpus": 1}
    toml = write_toml(make_config(workers=workers, storage=SHARED), tmp_path / "job.toml")
    address = ray.get_runtime_context().gcs_address
    for verb in ("plan", "predict"):
        done = subprocess.run(
            [sys.executable, "-m", "jobs", verb, toml],
            env={**os.environ, "RAY_ADDRESS": address},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        if verb == "plan":
            assert f"4 actors of 1 GPU, 1 CPU on {address}" in done.stdout
    assert "12 seen = 12 ok + 0 failed" in done.stdout
    (timings,) = (tmp_path / "run" / "timings").glob("*")
    assert set(pq.read_table(timings)["actor"].to_pylist()) <= {f"actor-{n}" for n in range(1, 5)}


def test_an_actor_killed_with_the_run_in_the_store_loses_nothing(
    make_config, s3, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    killed: list[int] = []
    prefix = f"ray-{tmp_path.name}"
    config = make_config(
        input={"uri": s3.upload(write_many_tars(tmp_path), f"{prefix}/tars")},
        output={"uri": f"s3://{BUCKET}/{prefix}/run"},
        storage={"endpoint_url": s3.url, **SHARED},  # the checkpoint is a plain path
        workers={"count": 2, "gpus": 1, "cpus": 1},
    )
    arguments = (1, f"s3://{BUCKET}/{prefix}/run", killed)
    threading.Thread(target=kill_one_actor_after, args=arguments, daemon=True).start()
    assert predict(config).totals.images_seen == 48
    assert killed
    parts = s3.objects(f"{prefix}/run")
    assert sum(name.startswith("metrics/") for name in parts) == 24
    findings = verify(
        f"s3://{BUCKET}/{prefix}/run", deep=True, storage=StorageConfig(endpoint_url=s3.url)
    )
    assert findings.problems == findings.notes == []
