"""The only place that calls ``ray.init``: join the cluster that is named, or start one here."""

import contextlib
import functools
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from jobs.backends.placement import Nodes
from jobs.backends.version import code_version
from unet_core.config.predict import WorkersConfig
from unet_core.config.train import TrainWorkersConfig
from unet_core.errors import UnetJobsError, WorkersError

log = logging.getLogger(__name__)

LOCAL: dict[str, Any] = {
    "address": "local",
    "_node_ip_address": "127.0.0.1",  # not reachable from the network
    "include_dashboard": False,
    "object_store_memory": 100 * 2**20,
}
"""Arguments of ``ray.init`` for a cluster of this process."""
HOME = Path(__file__).parents[2]
"""The folder that holds ``jobs`` and ``unet_core``."""
TOKENS = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
TOKEN = Path(".ray") / "auth_token"
"""Path of Ray's token, below the home directory."""
CONNECT_S = 10.0  # enough for a head on another continent that is busy
HTTP2_SETTINGS = b"\x04"
"""Type of the first frame of either side of an HTTP/2 connection (RFC 9113, 6.5); Ray's head speaks
gRPC, which is HTTP/2, and silence or another answer tells that it is no head."""
HTTP2_OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + HTTP2_SETTINGS + bytes(5)
"""What a client sends first (RFC 9113, 3.4): a fixed text, and settings without an entry."""
Given = ParamSpec("Given")
ResultT = TypeVar("ResultT")
LOG_FORMAT = "%(levelname)s %(name)s %(message)s"
"""Log format of drivers and actors."""


def is_cluster_named() -> bool:
    """Whether the environment names a cluster (``RAY_ADDRESS``), as it does inside a Ray job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def use_auth_token() -> None:
    """Turn on token authentication if this machine has a token; Ray does so by itself only for
    clusters that it starts. To be called before Ray is imported.
    """
    if TOKENS & set(os.environ) or (Path.home() / TOKEN).exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


if os.environ.get("RAY_ADDRESS", "127.").startswith(("127.", "localhost:")):
    # Read when Ray is imported; without it, Ray takes this machine's address for 127.0.0.1: it
    # listens to the network, and looks there for a cluster on loopback, as `make up` starts.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
if is_cluster_named():
    use_auth_token()  # now: whoever needs Ray's classes imports it before `connected` is entered


def local_cpus(workers: WorkersConfig) -> float:
    """CPU cores for an inline replica."""
    if workers.cpus != "auto":
        return workers.cpus
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_inline(workers: WorkersConfig | TrainWorkersConfig) -> bool:
    """Whether this process does the work itself: asked for, or ``auto`` with nothing to share it
    with (no cluster is named, and there is at most one GPU).
    """
    if workers.count != "auto":
        return workers.count == "inline"
    if is_cluster_named() or workers.gpus not in ("auto", 0):
        return False
    import torch

    return torch.cuda.device_count() <= 1


@contextlib.contextmanager
def connected(shows_logs: bool = True) -> Iterator[None]:
    """Connect this process to a Ray cluster as a driver; an existing connection is used.

    ``shows_logs``: print what other processes of this driver log. Arrays never enter the object
    store, so a local one is small.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves actors on a busy machine
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean what they meant
    if is_cluster_named():
        require_reachable(os.environ["RAY_ADDRESS"])
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it is on; fine
    place = {"address": os.environ["RAY_ADDRESS"]} if is_cluster_named() else LOCAL
    terminate = signal.getsignal(signal.SIGTERM)
    folder = Path.cwd()
    job = ray.job_config.JobConfig(_py_driver_sys_path=[str(folder), str(HOME)])
    try:
        # elsewhere only if need be: Ray may move the folder of a job meanwhile
        with contextlib.chdir(HOME) if shadows_our_code(folder) else contextlib.nullcontext():
            ray.init(
                **place, job_config=job, logging_level=logging.WARNING, log_to_driver=shows_logs
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkersError(
            f"no Ray cluster at {os.environ.get('RAY_ADDRESS', 'this machine')}: {error}"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray's would end the driver on the spot
    try:
        yield
    finally:
        ray.shutdown()


def shadows_our_code(folder: Path) -> bool:
    """Whether workers that import from ``folder`` first would find other packages under our names.

    Ray puts the driver's working directory in front of their ``sys.path``, and in front of the
    folders that a JobConfig names.
    """
    return folder != HOME and any((folder / name).exists() for name in ("jobs", "unet_core"))


def require_reachable(address: str) -> None:
    """Check that a cluster's head answers at ``address``; ``ray.init`` tries a dead one for a
    quarter of an hour.

    Raises WorkersError after ``CONNECT_S`` at most. ``auto`` and ``local`` are left to Ray, and so
    are clusters with TLS, of which only the port is tried.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address.startswith(("http://", "https://")):
        raise WorkersError(
            f"RAY_ADDRESS: {address} is the address of a job server; give it to `unet-jobs submit "
            "--address`, or set RAY_ADDRESS to that of the head, e.g. 10.0.0.1:6379"
        )
    if not host or not port.isdigit():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                connection.sendall(HTTP2_OPENING)
                if connection.recv(4)[3:] != HTTP2_SETTINGS:
                    raise WorkersError(
                        f"RAY_ADDRESS: what answers at {address} is not the head of a Ray cluster, "
                        "whose port is 6379 by default"
                    )
    except OSError as error:
        raise WorkersError(
            f"RAY_ADDRESS: no Ray cluster at {address}: {error}; start one there, or unset "
            "RAY_ADDRESS to work on this machine"
        ) from error


def available_resources(workers: WorkersConfig, only_here: bool = False) -> Nodes:
    """Return the resources of each node for actors; ``only_here``: of the driver's node alone."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    kind = f"accelerator_type:{workers.accelerator_type}"
    return [
        (node["Resources"].get("GPU", 0.0), node["Resources"].get("CPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
        and (node["NodeID"] == here or not only_here)
        and (kind in node["Resources"] or not workers.accelerator_type)
    ]


def has_working_dir() -> bool:
    """Whether Ray has put files of a job into the working directory of each process."""
    import ray

    return bool(ray.get_runtime_context().runtime_env.get("working_dir"))


def code_on_nodes(most: int, within_s: float) -> dict[str, str]:
    """Return the code version of so many of the nodes that take work, by node.

    Raises WorkersError for a node that does not answer in time or does not run unet-jobs.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def version() -> str:
        return code_version()

    remote = ray.remote(num_cpus=0, max_retries=0)(version)
    nodes = [node["NodeID"] for node in working_nodes()[:most]]
    calls = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote()
        for node in nodes
    ]
    found = {}
    for node, call in zip(nodes, calls, strict=True):
        try:
            found[node[:12]] = ray.get(call, timeout=within_s)
        except ray.exceptions.RayError as error:
            raise WorkersError(
                f"node {node[:12]} does not run unet-jobs: "
                f"{str(error).strip().splitlines()[-1]}; install it there"
            ) from error
    return found


class CrashError(Exception):
    """The process failed rather than the run: its memory, or its device."""


Problem = UnetJobsError | CrashError


def returns_errors(call: Callable[Given, ResultT]) -> Callable[Given, ResultT | Problem]:
    """Decorate a function to return expected errors, since an exception that Ray raises again may
    lose its class; errors of memory and device become CrashError, others are raised.
    """

    @functools.wraps(call)
    def answered(*given: Given.args, **named: Given.kwargs) -> ResultT | Problem:
        try:
            return call(*given, **named)
        except UnetJobsError as error:
            return error
        except (NotImplementedError, RecursionError):
            raise
        except (MemoryError, RuntimeError) as error:  # torch's device errors are RuntimeErrors
            log.exception("the actor cannot go on")
            return CrashError(f"{type(error).__name__}: {error}")

    return answered


def get_result(reference: Any) -> Any:
    """Return the result of a Ray call, or the error that tells how its process ended."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise  # a bug of ours: its traceback is the message
    except ray.exceptions.RayError as error:
        return error


def working_nodes() -> list[dict[str, Any]]:
    """Return Ray's entries of the nodes that take work."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
