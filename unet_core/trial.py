"""Which images of a shard kill, hang or choke the process that segments them.

Each image is tried by itself in a child process with limits on memory and time; what the child does
not survive is guilty. Nothing of the trial is kept: the shard is then segmented as always, without
the guilty ones.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from unet_core.compute import Compute, ReplicaSpec
from unet_core.errors import ImageError, ShardError, UnetJobsError
from unet_core.images.codec import one_line
from unet_core.inputs.formats import read_shard
from unet_core.inputs.shards import Shard

if TYPE_CHECKING:
    from unet_core.replica import Replica

log = logging.getLogger(__name__)

LOADING_S = 600.0
"""For the child to load the model."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Began:
    """The child has an image in hand, or with None no further one."""

    place: int | None


@dataclass(frozen=True)
class Guilty:
    """The child survived, but the image cannot be segmented."""

    place: int
    failure: ImageError


@dataclass(frozen=True)
class Trial:
    """A shard on trial, and what its child needs."""

    spec: ReplicaSpec
    compute: Compute
    footer: dict[str, str]
    shard: Shard
    """With its members."""
    image_s: float
    """How long one image may take."""

    def guilty(self) -> dict[int, ImageError]:
        """Failures by the image's place in the shard: ``worker_died``, ``timeout`` or
        ``out_of_memory``.

        Raises what the child raises of this project's errors, and ShardError if it dies or hangs
        while it reads.
        """
        found: dict[int, ImageError] = {}
        first: int | None = 0
        while first is not None:
            first = self._try_from(first, found)
        log.warning("tried alone shard=%s guilty=%d", self.shard.shard_id, len(found))
        return found

    def _try_from(self, first: int, found: dict[int, ImageError]) -> int | None:
        """One child's life; returns the place after the image that ended it, None at the end."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_live, args=(self, first, there), daemon=True)
        child.start()
        there.close()
        place, patience_s = None, LOADING_S
        try:
            while True:
                message = self._hear(here, patience_s, place)
                patience_s = self.image_s
                if isinstance(message, Guilty):
                    found[message.place] = message.failure
                elif isinstance(message, Began):
                    place = message.place
                    if place is None:
                        return None
                elif isinstance(message, UnetJobsError):
                    raise message
        except EOFError:
            child.join()
            failure = ImageError("worker_died", f"tried alone, it {_how(child.exitcode)}")
        except TimeoutError:
            failure = ImageError("timeout", "tried alone, it did not come to an end")
        finally:
            child.kill()
            child.join()
            here.close()
        if place is None:
            raise ShardError(
                f"its images could not be tried one by one: loading or reading {failure.args[0]}"
            )
        found[place] = failure
        return place + 1

    def _hear(self, here: Connection, patience_s: float, place: int | None) -> object:
        if not here.poll(patience_s):
            raise TimeoutError(place)
        return here.recv()


def _live(trial: Trial, first: int, pipe: Connection) -> None:
    """The child: try every image from ``first`` on, and say so before each."""
    _end_with_parent()
    try:
        from unet_core.replica import Replica

        replica = Replica(trial.spec)
        replica.configure(trial.compute, trial.footer)
        room = _limit_memory()
        for message in _tried(replica, trial.shard, first, room):
            pipe.send(message)
        pipe.send(Began(None))
    except UnetJobsError as error:
        pipe.send(error)


def _tried(
    replica: "Replica", shard: Shard, first: int, room: int | None
) -> Iterator[Began | Guilty]:
    import torch

    for place, sample in enumerate(read_shard(replica.spec.source, shard)):
        if place < first:
            continue
        yield Began(place)
        try:
            replica.segmenter.rehearse(sample)
        except (MemoryError, torch.OutOfMemoryError):
            needed = f"{room / 2**30:.1f} GiB, half of what was free" if room else "there is"
            yield Guilty(place, ImageError("out_of_memory", f"it takes more memory than {needed}"))
        except RuntimeError as error:  # torch's device errors; a broken device stays broken
            yield Guilty(place, ImageError("worker_died", f"tried alone: {one_line(error)}"))


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed its process ({signal.Signals(-exit_code).name})"
    return f"ended its process with exit code {exit_code}"


def _end_with_parent() -> None:
    """A child that hangs must not outlive the actor that watches it."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _limit_memory() -> int | None:
    """Let this process take half of the memory that is free now; returns that in bytes, None where
    the system cannot tell (only Linux can).
    """
    if sys.platform != "linux":
        return None
    import resource

    room = _free_bytes() // 2
    status = Path("/proc/self/status").read_text()
    used = int(status.partition("VmData:")[2].split()[0]) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, hard))
    return room


def _free_bytes() -> int:
    """Of the machine, or of the container if that has less."""
    memory = Path("/proc/meminfo").read_text()
    free = int(memory.partition("MemAvailable:")[2].split()[0]) * 1024
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no cgroup of its own
    return max(free, 2**30)
