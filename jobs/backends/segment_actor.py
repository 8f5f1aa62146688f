"""The Ray actor that segments shards.

Expected errors are returned, so that Ray does not wrap them; errors of memory and device are
returned as CrashError, which counts as a death. Others are bugs, and raised.
"""

import logging

import ray

from jobs.backends import session
from jobs.backends.version import code_version
from jobs.scheduler.events import Attempt
from unet_core.runs.compute import Compute, ReplicaSpec, RunSettings
from unet_core.runs.timings import ShardResult

log = logging.getLogger(__name__)


class SegmentActor:
    """Holds one replica. Called in the order ``join``, ``load``, ``configure``, then ``segment``
    and ``heartbeat``, on threads.
    """

    def __init__(self, spec: ReplicaSpec, run: str) -> None:
        self._spec, self._run = spec, run

    def join(self, level: int) -> tuple[str, str]:
        """Return node id and code version, before anything is loaded; log from ``level`` on."""
        logging.basicConfig(level=level, format=session.LOG_FORMAT, force=True)
        return ray.get_runtime_context().get_node_id(), code_version()

    @session.returns_errors
    def load(self) -> Compute:
        """Load the model; return its ``compute`` section."""
        from unet_core.inference.replica import Replica  # torch: for the actor, not for the driver

        self._replica = Replica(self._spec)
        return self._replica.probe()

    @session.returns_errors
    def configure(self, settings: RunSettings) -> None:
        """Set what the run has recorded."""
        from unet_core.inference.shard_segmenter import ShardSegmenter

        self._segmenter = ShardSegmenter(self._replica, settings)

    def ping(self) -> None:
        """Return, which shows that the actor lives."""

    def heartbeat(self) -> dict[str, int]:
        """Steps made by each shard in flight."""
        return dict(self._segmenter.steps)

    @session.returns_errors
    def segment(self, attempt: Attempt) -> ShardResult:
        """Segment and commit one shard."""
        log.info("begin run=%s shard=%s attempt=%d",
                 self._run, attempt.shard.shard_id, attempt.number)  # fmt: skip
        poison = {}
        if attempt.image_timeout_s is not None:
            from unet_core.inference.isolation import find_poison_images  # torch, again

            poison = find_poison_images(self._segmenter, attempt.shard, attempt.image_timeout_s)
        return self._segmenter.segment(attempt.shard, poison)
