"""The processes that train together. One process is a group of its own and talks to nobody."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from unet_core.errors import UnetJobsError

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Ranks:
    """This process's place in the group. Every method must be called by all ranks alike."""

    rank: int = 0
    count: int = 1

    @classmethod
    def joined(cls) -> "Ranks":
        """The group that torch.distributed has been told of, or this process alone."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    def slots(self, batch: int) -> range:
        """The places of a global batch that this rank fills."""
        return range(self.rank * batch // self.count, (self.rank + 1) * batch // self.count)

    def summed(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in double precision."""
        if self.count == 1:
            return values
        is_gpu = distributed.get_backend() == "nccl"
        tensor = torch.tensor(values, dtype=torch.float64, device="cuda" if is_gpu else "cpu")
        distributed.all_reduce(tensor)
        summed: list[float] = tensor.tolist()
        return summed

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, by rank; anything that pickles."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def on_first(self, call: Callable[[], ResultT]) -> ResultT:
        """What the first rank finds, so that all go by the same; its error is raised on all."""
        box: list[Any] = [_tried(call) if self.is_first else None]
        if self.count > 1:
            distributed.broadcast_object_list(box, src=0)
        result, raised = box[0]
        if raised is not None:
            raise raised
        return result

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first rank."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def on_all(self, call: Callable[[], ResultT]) -> ResultT:
        """Do what each rank does alone; an error of ours on one is raised on all: nobody waits."""
        result, error = _tried(call)
        errors = [found for found in self.gather(error) if found is not None]
        if errors:
            raise errors[0] from error
        return result  # type: ignore[return-value]  # there is one if there is no error


def _tried(call: Callable[[], ResultT]) -> tuple[ResultT | None, UnetJobsError | None]:
    try:
        return call(), None
    except UnetJobsError as error:
        return None, error
