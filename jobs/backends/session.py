"""The only place that calls ``ray.init``: join the cluster that is named, or start one here."""

import contextlib
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from jobs.backends.placement import Nodes
from unet_core.config.predict import WorkersConfig
from unet_core.config.train import TrainWorkersConfig
from unet_core.errors import UnetJobsError, WorkersError

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 2**20
Given = ParamSpec("Given")
ResultT = TypeVar("ResultT")
LOG_FORMAT = "%(levelname)s %(name)s %(message)s"
"""Of drivers and actors alike."""


def is_cluster_named() -> bool:
    """Whether the environment names a cluster (``RAY_ADDRESS``), as it does inside a Ray job."""
    return bool(os.environ.get("RAY_ADDRESS"))


if not is_cluster_named():
    # Read when Ray is imported; without it, Ray takes this machine's address for 127.0.0.1 and
    # listens to the network.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


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
    """Be a driver of a Ray cluster; a session of this process that exists already is used.

    ``shows_logs``: print what other processes of this driver log. Arrays never enter the object
    store, so a local one is small.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves actors on a busy machine
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean what they meant
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it is on; fine
    place: dict[str, Any] = {"address": os.environ.get("RAY_ADDRESS")}
    if not is_cluster_named():
        place = {
            "address": "local",
            "_node_ip_address": "127.0.0.1",  # nobody else's business
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**place, logging_level=logging.WARNING, log_to_driver=shows_logs)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise WorkersError(f"no Ray cluster at {where}: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray's would end the driver on the spot
    try:
        yield
    finally:
        ray.shutdown()


def available_resources(workers: WorkersConfig, only_here: bool = False) -> Nodes:
    """What the nodes of the cluster have now for actors; ``only_here``: this one alone."""
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
    """Whether this is a job whose files every process of it has in its working directory."""
    import ray

    return bool(ray.get_runtime_context().runtime_env.get("working_dir"))


def on_nodes(call: Callable[[], ResultT], most: int, within_s: float) -> dict[str, ResultT | str]:
    """What a function returns on so many of the nodes that take work, by node; of one that gives no
    answer, why.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def ask() -> ResultT:
        return call()

    remote = ray.remote(num_cpus=0, max_retries=0)(ask)
    asked = {}
    for node in _working_nodes()[:most]:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[remote.options(scheduling_strategy=there).remote()] = node["NodeID"][:12]
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=within_s)
    found: dict[str, ResultT | str] = {asked[r]: f"no answer in {within_s:g} s" for r in late}
    for reference in ready:
        try:
            found[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayError as error:
            found[asked[reference]] = str(error).strip().splitlines()[-1]
    return found


class CrashError(Exception):
    """Something went wrong with the process rather than with the run: memory, or the device."""


Problem = UnetJobsError | CrashError


def returns_errors(call: Callable[Given, ResultT]) -> Callable[Given, ResultT | Problem]:
    """A function that returns what goes wrong, since what Ray raises again may lose its class; bugs
    are raised.
    """

    @functools.wraps(call)
    def answered(*given: Given.args, **named: Given.kwargs) -> ResultT | Problem:
        try:
            return call(*given, **named)
        except UnetJobsError as error:
            return error
        except (MemoryError, RuntimeError) as error:  # torch's device errors are RuntimeErrors
            log.exception("the actor cannot go on")
            return CrashError(f"{type(error).__name__}: {error}")

    return answered


def get_result(reference: Any) -> Any:
    """What a call of Ray gave, or the error that says what became of its process."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise  # a bug of ours: its traceback is the message
    except ray.exceptions.RayError as error:
        return error


def node_count() -> int:
    """Nodes of the cluster that take work."""
    return len(_working_nodes())


def _working_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
