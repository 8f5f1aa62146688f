"""Number of actors on a cluster, and the resources of each. No Ray."""

import logging
from dataclasses import dataclass

from unet_core.config.predict import WorkersConfig
from unet_core.errors import WorkersError

log = logging.getLogger(__name__)


Nodes = list[tuple[float, float]]
"""GPUs and CPUs of each node that may hold actors."""


@dataclass(frozen=True)
class Placement:
    """Number of actors, and GPUs and CPUs of each."""

    actors: int
    gpus: float
    cpus: float

    def room(self, nodes: Nodes) -> int:
        """Count the actors that nodes can hold, each on one node, a fraction of a GPU on one."""
        return sum(_fitting(self.gpus, self.cpus, node) for node in nodes)


def resolve_placement(workers: WorkersConfig, nodes: Nodes, may_wait: bool = False) -> Placement:
    """Resolve ``auto`` to a number of actors, and GPUs and CPUs for each. With ``workers.max``, or
    if actors ``may_wait``, they need not fit on the present nodes.

    Raises WorkersError if the actors that were asked for do not fit.
    """
    may_wait = may_wait or workers.max != "auto"
    nodes = [node for node in nodes if any(node)]  # heads that take no work
    has_gpus = any(gpus >= 1 for gpus, _ in nodes) or bool(workers.accelerator_type)
    is_empty = may_wait and not any(cpus for _, cpus in nodes)
    gpus = workers.gpus if workers.gpus != "auto" else float(has_gpus or is_empty)
    cpus = workers.cpus if workers.cpus != "auto" else _cpus_each(workers, gpus, nodes)
    room = Placement(0, gpus, cpus).room(nodes)
    actors = wanted(workers, room)
    asked = f"{actors} actors of {gpus:g} GPU and {cpus:g} CPU each"
    if workers.accelerator_type:
        asked += f" on {workers.accelerator_type}"
    if not may_wait and (not room or actors > room):
        has = ", ".join(f"{g:g} GPU + {c:g} CPU" for g, c in nodes) or "nothing that fits"
        raise WorkersError(
            f"{asked} do not fit: the cluster has {len(nodes)} nodes with {has}, room for {room}; "
            "lower workers.count, workers.gpus or workers.cpus, or set workers.max if the cluster "
            "will grow"
        )
    log.info("placing %s%s, room for %d now", "up to " if may_wait else "", asked, room)
    return Placement(actors, gpus, cpus)


def wanted(workers: WorkersConfig, room: int) -> int:
    """Return the number of actors to run when nodes have room for ``room``."""
    if workers.count != "auto":
        return int(workers.count)
    return max(1, room) if workers.max == "auto" else workers.max


def _cpus_each(workers: WorkersConfig, gpus: float, nodes: Nodes) -> float:
    """Share a node's cores between its actors: by its GPUs, or by the number asked for."""
    if gpus:
        shares = [c // (g / gpus) for g, c in nodes if g >= gpus]
        return max(1.0, min(shares, default=1.0))
    count = 1 if workers.count == "auto" else int(workers.count)
    actors_per_node = -(-count // max(1, len(nodes)))
    return max(1.0, min((c for _, c in nodes if c), default=1.0) // actors_per_node)


def _fitting(gpus: float, cpus: float, node: tuple[float, float]) -> int:
    rooms = [_times(node[1], cpus)] if cpus else []
    if gpus:
        rooms.append(_times(node[0], gpus) if gpus >= 1 else int(node[0] * _times(1, gpus)))
    return min(rooms, default=1)


def _times(whole: float, part: float) -> int:
    """Divide and round down, but tolerate rounding errors: 1 / 0.1 is 10."""
    return int(whole / part + 1e-6)
