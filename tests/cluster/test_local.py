"""``make up`` and ``make down``: a cluster of several nodes that ends without a trace."""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "local.py"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def local(tmp_path):
    """The script in a place of its own, so that a developer's cluster is left alone."""
    (tmp_path / "cluster").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "cluster" / "local.py")

    def run(*arguments):
        environment = {**os.environ, "HOME": str(tmp_path)}
        return subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            check=True, capture_output=True, text=True, env=environment,
        ).stdout  # fmt: skip

    yield run
    run("down")


def processes(script):
    """Command lines that belong to the cluster of a script."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HOME={script}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.joinpath("cmdline").read_bytes())
        except OSError:
            continue
    return found


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_nodes_join_and_leave_on_loopback_and_nothing_is_left(local, tmp_path):
    local("down")  # nothing is there to end
    ports = ("--port", free_port(), "--dashboard-port", free_port())
    text = local("up", 1, "--gpus", 2, *ports)
    assert "nodes:      1" in text
    address = text.split("job server: ")[1].strip()
    assert address.startswith("http://127.0.0.1:")
    local("up", 2, "--gpus", 2, *ports)
    assert len([p for p in processes(tmp_path) if b"raylet/raylet" in p]) == 3
    token = (tmp_path / ".ray" / "auth_token").read_text()
    asked = urllib.request.Request(
        f"{address}/api/version", headers={"Authorization": f"Bearer {token}"}
    )
    assert "ray_version" in json.load(urllib.request.urlopen(asked, timeout=60))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{address}/api/version", timeout=60)
    local("up", 1, *ports)
    assert len([p for p in processes(tmp_path) if b"raylet/raylet" in p]) == 2
    local("down")
    assert processes(tmp_path) == []
