"""A Ray cluster of several nodes on this machine, for tries and tests: ``make up``, ``make down``.

A head that takes no work and N nodes with pretended GPUs, all on loopback. One process keeps them
(``ray start`` would bind to every address); its pid and what is wanted of it lie in ``.cluster/``,
and nothing else is ever ended.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STATE = Path(__file__).parents[1] / ".cluster"
PID, WANTED, HAS = STATE / "pid", STATE / "wanted.json", STATE / "has.json"
HOST = "127.0.0.1"
OBJECT_STORE_BYTES = 100 * 2**20
LOOK_S, PATIENCE_S = 0.3, 120


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    start = verbs.add_parser("up", help="have so many nodes: join more, or let the last ones leave")
    start.add_argument("nodes", type=int)
    start.add_argument("--gpus", type=int, default=1, help="pretended ones of a node that joins")
    start.add_argument("--cpus", type=int, help="of a node that joins; default: one per GPU")
    start.add_argument("--port", type=int, default=6379, help="of a head that starts")
    start.add_argument("--dashboard-port", type=int, default=8265, help="of a head that starts")
    verbs.add_parser("down", help="end what up started")
    verbs.add_parser("keep", help="what up starts in the background")
    arguments = vars(parser.parse_args())
    {"up": up, "down": down, "keep": keep}[arguments.pop("verb")](**arguments)


def up(**wanted: Any) -> None:
    """Start the keeper if it is not there, and wait until it has what is wanted."""
    STATE.mkdir(exist_ok=True)
    _write(WANTED, wanted)
    is_new = keeper() is None
    if is_new:
        HAS.unlink(missing_ok=True)
        ray = Path(sys.executable).parent / "ray"
        subprocess.run([ray, "get-auth-token", "--generate"], check=True, capture_output=True)
        environment = {
            **os.environ,
            "PATH": f"{ray.parent}{os.pathsep}{os.environ['PATH']}",  # jobs find unet-jobs there
            "RAY_AUTH_MODE": "token",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or 127.0.0.1 becomes the host's address
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        with (STATE / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, "keep"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        PID.write_text(str(process.pid))
    nodes, deadline = None, time.monotonic() + PATIENCE_S
    while nodes != wanted["nodes"]:
        if keeper() is None or time.monotonic() > deadline:
            if is_new:
                down()
            sys.exit(f"there are {nodes or 0} nodes, and no more: {(STATE / 'log').read_text()}")
        time.sleep(LOOK_S)
        now = json.loads(HAS.read_text())["nodes"] if HAS.exists() else None
        if now != nodes:
            nodes, deadline = now, time.monotonic() + PATIENCE_S
    print(
        "\n".join(f"{name + ':':<12}{value}" for name, value in json.loads(HAS.read_text()).items())
    )


def down() -> None:
    """End the keeper, and with it every node."""
    pid = keeper()
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_S
        while keeper() is not None and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what is left of its group
    PID.unlink(missing_ok=True)


def keeper() -> int | None:
    """The pid of the keeper that ``up`` started, if it still runs."""
    if not PID.exists():
        return None
    pid = PID.read_text()
    shown = subprocess.run(
        ["ps", "-ww", "-o", "state=,command=", "-p", pid],
        check=False,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return int(pid) if f"{__file__} keep" in shown and not shown.startswith("Z") else None


def keep() -> None:
    """Be the parent of all nodes until SIGTERM."""
    from ray.cluster_utils import Cluster

    wanted = json.loads(WANTED.read_text())
    common = {"node_ip_address": HOST, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            **common,
            "num_cpus": 0,
            "gcs_server_port": wanted["port"],
            "include_dashboard": True,
            "dashboard_host": HOST,
            "dashboard_port": wanted["dashboard_port"],
        },
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    nodes: list[Any] = []
    try:
        while True:
            wanted = json.loads(WANTED.read_text())
            if len(nodes) < wanted["nodes"]:
                shape = {
                    "num_cpus": wanted["cpus"] or max(1, wanted["gpus"]),
                    "num_gpus": wanted["gpus"],
                }
                nodes.append(cluster.add_node(**common, **shape))
            elif len(nodes) > wanted["nodes"]:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
            else:
                time.sleep(LOOK_S)
            has = {
                "nodes": len(nodes),
                "cluster": cluster.address,
                "job server": f"http://{cluster.webui_url}",
            }
            if not HAS.exists() or json.loads(HAS.read_text()) != has:
                _write(HAS, has)
    finally:
        cluster.shutdown()
        Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)


def _write(path: Path, values: dict[str, Any]) -> None:
    new = path.with_name(f"_{path.name}")
    new.write_text(json.dumps(values))
    new.replace(path)


if __name__ == "__main__":
    main()
