"""Collective operations over the processes (ranks) of a training, or on one process alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from unet_core.errors import UnetJobsError

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and size of the group (world size).

    All ranks must call the collective methods in the same order.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def joined(cls) -> "Ranks":
        """Return the group of torch.distributed, or a group of one if it is not initialized."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """True on rank 0, which alone writes files and reports events."""
        return self.rank == 0

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Sum values over all ranks, in double precision."""
        if self.world_size == 1:
            return values
        is_gpu = distributed.get_backend() == "nccl"
        tensor = torch.tensor(values, dtype=torch.float64, device="cuda" if is_gpu else "cpu")
        distributed.all_reduce(tensor)
        return list(tensor.tolist())

    def all_gather(self, value: Any) -> list[Any]:
        """Collect a picklable value from every rank; the list is in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def on_first(self, call: Callable[[], ResultT]) -> ResultT:
        """Call a function on rank 0; all ranks return its result or raise its UnetJobsError."""
        box: list[Any] = [_caught(call) if self.is_first else None]
        if self.world_size > 1:
            distributed.broadcast_object_list(box, src=0)
        result, raised = box[0]
        if raised is not None:
            raise raised
        return result

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def on_all(self, call: Callable[[], ResultT]) -> ResultT:
        """Call a function on every rank and return each one's own result.

        A UnetJobsError on one rank is raised on all, so that none waits for the others for ever.
        """
        result, error = _caught(call)
        if errors := [e for e in self.all_gather(error) if e is not None]:
            raise errors[0] from error
        return result  # type: ignore[return-value]  # there is one if there is no error


def _caught(call: Callable[[], ResultT]) -> tuple[ResultT | None, UnetJobsError | None]:
    try:
        return call(), None
    except UnetJobsError as error:
        return None, error
