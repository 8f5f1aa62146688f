"""Attempts at shards, and what workers report about them."""

from dataclasses import dataclass

from unet_core.inputs.shards import Shard
from unet_core.runs.timings import ShardResult


@dataclass(frozen=True)
class Attempt:
    """One try at one shard."""

    shard: Shard
    number: int
    """Number of the attempt at this shard, from 1."""
    alone: bool
    """No other shard may be in flight on the worker."""
    isolation_timeout_s: float | None = None
    """Set while the shard is isolated: seconds that one image may take without a step."""


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
    """Images decoded and batches done so far, by id of each shard in flight."""


@dataclass(frozen=True)
class Refused:
    """A shard cannot be committed; the worker lives."""

    worker: str
    attempt: Attempt
    reason: str


Event = Ready | Done | Refused | Heartbeat | Died
