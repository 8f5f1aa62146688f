"""Small data of our own, a tiny checkpoint, and the suite's one Ray session."""

import os
import sys
from pathlib import Path

os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # 127.0.0.1 stays what it is
    "RAY_metrics_report_interval_ms": "1000",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # jobs' commands
}

import atexit
import contextlib
import gc
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from jobs import cli
from jobs.predict import predict
from tests.support import rgw
from tests.support.data import write_checkpoint, write_folder, write_tars
from tests.support.runs import config_of
from tests.support.s3 import S3
from tests.support.s3 import start as start_s3
from unet_core.config.predict import PredictConfig
from unet_core.config.presets import preset

ConfigMaker = Callable[..., PredictConfig]
SHARED_SERVERS = {"ray_session", "s3_server"}

torch.set_num_threads(1)  # networks this small lose more by waiting for threads than they gain


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs neither Ray nor an object store and is not marked ``slow`` is ``fast``."""
    for item in items:
        is_slow = any(item.get_closest_marker(name) for name in ("ray", "slow"))
        if not is_slow and SHARED_SERVERS.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 loose images of several sizes in ``images``, with masks in ``masks``."""
    return write_folder(tmp_path_factory.mktemp("loose"))


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of ``folder`` in 6 tars."""
    return write_tars(tmp_path_factory.mktemp("tars"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network with random weights that gives a mix of both classes."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    return write_checkpoint(path, preset("padded", in_channels=1, classes=1, width=4))


@pytest.fixture
def make_config(tiny_model: str, tars: Path, tmp_path: Path) -> ConfigMaker:
    """A config for the tars, inline, with overrides."""

    def make(*overrides: str, out: str = "run", **table: Any) -> PredictConfig:
        table["input"] = {"masks": "mask.png", **table.get("input", {})}
        return config_of(tars, tiny_model, tmp_path / out, *overrides, **table)

    return make


@pytest.fixture
def make_run(
    make_config: ConfigMaker, folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> Callable[..., str]:
    """A finished run over loose images without truth, in three shards; a copy of the suite's."""
    cache = tmp_path_factory.getbasetemp() / "bare-run"
    if not cache.exists():
        loose = {"uri": str(folder / "images"), "masks": "", "shard_images": 5}
        predict(make_config(input=loose, output={"uri": str(cache)}))

    def make(out: str = "run") -> str:
        shutil.copytree(cache, tmp_path / out, dirs_exist_ok=True)
        return str(tmp_path / out)

    return make


@pytest.fixture
def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; returns exit code, standard output and standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["unet-jobs", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        atexit.unregister(gc.freeze)  # this process is to be collected at its end
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """An object store that checks signatures, for the whole suite: moto, or a real Ceph."""
    with contextlib.ExitStack() as stack:
        if rgw.IS_ASKED_FOR:
            s3 = stack.enter_context(rgw.running())
        else:
            s3, server = start_s3()
            stack.callback(server.stop)
        yield s3


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The object store, with credentials in the environment and nothing counted yet."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    s3_server.requests.clear()
    return s3_server


@pytest.fixture(scope="session")
def ray_session(s3_server: S3) -> Iterator[Any]:
    """A Ray cluster of two nodes with two pretended GPUs each, for every test that needs one.

    Its nodes have the credentials of the object store in their environment, as real nodes have.
    """
    import ray
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as environment:
        for name, value in s3_server.environment().items():
            environment.setenv(name, value)
        warnings.simplefilter("ignore")  # Ray's own
        node = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 100 * 2**20}
        job_server = {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
        cluster = Cluster(
            initialize_head=True,
            head_node_args={**node, **job_server},
        )
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)


@pytest.fixture
def small_is_large(monkeypatch):
    """What is above 100,000 pixels or 100 kB counts as large, and mask windows have 128 pixels."""
    monkeypatch.setattr("unet_core.images.large_tiff.SMALL_PIXELS", 100_000)
    monkeypatch.setattr("unet_core.images.sample.LARGE_FILE_BYTES", 100_000)
    monkeypatch.setattr("unet_core.tiling.geometry.MASK_WINDOW_PIXELS", 100_000)
    monkeypatch.setattr("unet_core.tiling.geometry.MASK_WINDOW_SIDE", 128)
    monkeypatch.setattr("unet_core.inference.mask_assembler.MASK_WINDOW_SIDE", 128)
