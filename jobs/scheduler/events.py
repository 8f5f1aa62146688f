"""Attempts at shards, and what workers report about them."""

from dataclasses import dataclass

from unet_core.inputs.shards import Shard
from unet_core.runs.timings import ShardResult

MAX_SHARDS_PER_WORKER = 2
"""Shards in flight on a worker: one computes while the next is read."""
HEARTBEAT_S = 2.0
"""Seconds between two requests for the progress of busy workers."""


@dataclass(frozen=True)
class Attempt:
    """One try at one shard."""

    shard: Shard
    number: int
    """Number of the attempt at this shard, from 1."""
    is_alone: bool
    """No other shard may be in flight on the worker."""
    image_timeout_s: float | None = None
    """While the shard is isolated: seconds that one image may take without a step; else None."""

    @property
    def is_isolation(self) -> bool:
        """True if the shard's images are to be tried one by one first."""
        return self.image_timeout_s is not None


@dataclass(frozen=True)
class Ready:
    """A worker can take shards."""

    worker: str


@dataclass(frozen=True)
class Done:
    """A worker committed a shard."""

    worker: str
    attempt: Attempt
    result: ShardResult


@dataclass(frozen=True)
class Died:
    """A worker is gone; its backend starts another if one is needed."""

    worker: str
    reason: str
    node_lost: bool = False
    """The node was lost, so no failure is counted."""
    is_overdue: bool = False
    """The worker was ended because its attempt made no step."""


@dataclass(frozen=True)
class Heartbeat:
    """Progress of the shards that a worker holds."""

    worker: str
    steps: dict[str, int]
    """Steps so far (``ShardSegmenter.step``: rows of a large image read, an image decoded or
    encoded, a batch done), by id of each shard in flight."""


@dataclass(frozen=True)
class Refused:
    """A shard cannot be committed; the worker lives."""

    worker: str
    attempt: Attempt
    reason: str


Event = Ready | Done | Refused | Heartbeat | Died
