"""Connecting to a cluster: addresses that name none, and folders that have our names."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading

import pytest

from jobs.backends import session
from tests.support.runs import write_toml
from unet_core.errors import WorkersError


@contextlib.contextmanager
def closed():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield port


@contextlib.contextmanager
def silent():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@contextlib.contextmanager
def web_server():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (closed, "no Ray cluster at 127.0.0.1:.*refused; start one there"),
        (silent, "no Ray cluster at 127.0.0.1:.*timed out; start one there"),
        (web_server, "is not the head of a Ray cluster, whose port is 6379"),
    ],
)
def test_an_address_without_a_cluster_is_told_within_seconds(at, said, monkeypatch):
    monkeypatch.setattr(session, "CONNECT_S", 0.3)
    with at() as port, pytest.raises(WorkersError, match=f"RAY_ADDRESS: .*{said}"):
        session.require_reachable(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("no-such-host.invalid:6379", "no Ray cluster at no-such-host.invalid:6379: .*unset"),
        ("http://127.0.0.1:8265", "is the address of a job server; give it to `unet-jobs submit"),
    ],
)
def test_an_address_of_something_else_is_told(address, said):
    with pytest.raises(WorkersError, match=f"RAY_ADDRESS: .*{said}"):
        session.require_reachable(address)


@pytest.mark.slow
@pytest.mark.ray
def test_folders_of_the_user_with_our_names_do_not_reach_workers(make_config, tmp_path):
    """A cluster of its own, started and left from a folder with ``jobs`` and ``unet_core``."""
    for name in ("jobs", "unet_core"):
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "__init__.py").write_text("raise RuntimeError('of the user')")
    workers = {"count": 1, "gpus": 0, "cpus": 1}
    toml = write_toml(make_config(workers=workers), tmp_path / "job.toml")
    paths = [os.environ.get("PYTHONPATH"), str(session.HOME)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "jobs", "predict", toml],
        cwd=tmp_path / "here",
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "12 seen = 12 ok + 0 failed" in done.stdout
