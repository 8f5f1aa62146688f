"""The only place that calls ``ray.init``: join the cluster that is named, or start one here."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from unet_core.config import WorkersConfig
from unet_core.errors import WorkersError

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 2**20


def is_cluster_named() -> bool:
    """Whether the environment names a cluster (``RAY_ADDRESS``), as it does inside a Ray job."""
    return bool(os.environ.get("RAY_ADDRESS"))


@dataclass(frozen=True)
class Placement:
    """How many actors, and what each gets."""

    actors: int
    gpus: float
    cpus: float


def local_cpus(workers: WorkersConfig) -> float:
    """CPU cores for an inline replica."""
    if workers.cpus != "auto":
        return workers.cpus
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_inline(workers: WorkersConfig) -> bool:
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
def connected() -> Iterator[None]:
    """Be a driver of a Ray cluster; a session of this process that exists already is used.

    Array never enter the object store, so a local one is small.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves actors on a busy machine
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it is on; fine
    options = {"logging_level": logging.WARNING, "log_to_driver": True}
    try:
        if is_cluster_named():
            ray.init(address=os.environ["RAY_ADDRESS"], **options)
        else:
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",  # nobody else's business
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **options,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise WorkersError(f"no Ray cluster at {where}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def place(workers: WorkersConfig) -> Placement:
    """Settle ``auto`` against what the cluster has.

    Raises WorkersError if the actors that were asked for cannot fit, with what there is.
    """
    import ray

    has = ray.cluster_resources()
    cluster_gpus, cluster_cpus = has.get("GPU", 0.0), has.get("CPU", 0.0)
    gpus = workers.gpus if workers.gpus != "auto" else (1.0 if cluster_gpus >= 1 else 0.0)
    if workers.count in ("auto", "inline"):
        by_cpus = int(cluster_cpus // (workers.cpus or 1)) if workers.cpus != "auto" else 1
        actors = int(cluster_gpus / gpus) if gpus else max(1, by_cpus)
    else:
        actors = int(workers.count)
    cpus = workers.cpus if workers.cpus != "auto" else max(1.0, cluster_cpus // max(1, actors))
    asked = f"{actors} actors of {gpus:g} GPU and {cpus:g} CPU each"
    if not actors or actors * gpus > cluster_gpus or actors * cpus > cluster_cpus:
        raise WorkersError(
            f"{asked} do not fit: the cluster has {cluster_gpus:g} GPU and {cluster_cpus:g} CPU; "
            "lower workers.count, workers.gpus or workers.cpus"
        )
    log.info("placing %s", asked)
    return Placement(actors, gpus, cpus)
