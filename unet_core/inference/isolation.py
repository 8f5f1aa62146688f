"""Finds the poison images of a shard: those that kill, hang or exhaust their process.

Each image is segmented by itself in a child process with limits on memory and time. The child's
results are discarded: the shard is then segmented as always, without its poison images.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from unet_core.errors import ImageError, ShardError, UnetJobsError, WorkersError, one_line
from unet_core.inference.replica import Replica
from unet_core.inference.shard_segmenter import ShardSegmenter
from unet_core.inputs.formats import read_shard
from unet_core.inputs.shards import Shard
from unet_core.memory import free_bytes
from unet_core.runs.compute import ReplicaSpec, RunSettings
from unet_core.runs.manifest import with_members

log = logging.getLogger(__name__)

LOADING_S = 600.0  # limit for the child to load the model, maybe from a slow store


Message = int | ImageError | Literal["step", "survived", "finished"]
"""Messages of the child: the position of the sample that it begins, a step of that, the reason why
it cannot be segmented, the child having survived it, and at last the end of the shard.
"""


def find_poison_images(
    segmenter: ShardSegmenter, shard: Shard, image_timeout_s: float
) -> dict[int, ImageError]:
    """Segment each sample of a shard alone in a child process; return the failures of those that
    cannot be segmented, make no step for ``image_timeout_s`` seconds, or kill the process, by
    position in the shard.

    Raises ShardError if the child dies or hangs while it reads.
    """
    segmenter.engine.free_memory()
    spec, shard = segmenter.replica.spec, with_members(segmenter.output, shard)
    isolation = Isolation(spec, segmenter.settings, shard, image_timeout_s)
    return isolation.find_poison(partial(segmenter.step, shard.shard_id))


@dataclass(frozen=True)
class Isolation:
    """A shard whose images are segmented one by one, and the input of its child process."""

    spec: ReplicaSpec
    settings: RunSettings
    shard: Shard
    """The shard with its members."""
    image_timeout_s: float
    """Limit of seconds without a step of one image."""

    def find_poison(self, on_step: Callable[[], None] = lambda: None) -> dict[int, ImageError]:
        """Failures by the image's place in the shard: ``worker_died``, ``timeout`` or
        ``out_of_memory``. ``on_step`` is called whenever the child was heard.

        Raises what the child raises of this project's errors, and ShardError if it dies or hangs
        while it reads.
        """
        found: dict[int, ImageError] = {}
        first: int | None = 0
        while first is not None:
            first = self._try_from(first, found, on_step)
            on_step()
        log.warning("isolated shard=%s poison=%d", self.shard.shard_id, len(found))
        return found

    def _try_from(
        self, first: int, found: dict[int, ImageError], on_step: Callable[[], None]
    ) -> int | None:
        """Run one child; returns the index after the image that ended it, None at the end."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_child_main, args=(self, first, there), daemon=True)
        try:
            child.start()
        except OSError as error:
            raise ShardError(f"no process to try its images in: {error}") from error
        there.close()
        place: int | None = None
        limit_s = LOADING_S
        try:
            while True:
                if not here.poll(limit_s):
                    raise TimeoutError
                message: object = here.recv()
                on_step()
                limit_s = self.image_timeout_s
                match message:
                    case int():
                        place = message
                    case ImageError() if place is not None:
                        found[place] = message
                    case UnetJobsError():
                        raise message
                    case "survived":
                        place = None
                    case "finished":
                        return None
        except EOFError:
            child.join()
            failure = ImageError("worker_died", f"tried alone, it {_describe_exit(child.exitcode)}")
        except TimeoutError:
            failure = ImageError("timeout", "tried alone, it did not come to an end")
        finally:
            child.kill()
            child.join()
            here.close()
        if place is None:
            raise ShardError(f"its images could not be read one by one: {failure}")
        found.setdefault(place, failure)
        return place + 1


def _child_main(isolation: Isolation, first: int, pipe: Connection) -> None:
    """Run the child: segment every image from ``first`` on, each announced before."""
    _end_with_parent()
    limit, sending = None, threading.Lock()

    def send(message: Message | UnetJobsError) -> None:
        with sending:  # steps come from threads that decode
            pipe.send(message)

    try:
        segmenter = ShardSegmenter(Replica(isolation.spec), isolation.settings)
        limit = _limit_memory()
        for message in _try_images(segmenter, isolation.shard, first, limit, partial(send, "step")):
            send(message)
    except UnetJobsError as error:
        send(error)
    except MemoryError:
        send(ShardError(f"reading it takes more memory than {_needed(limit)}"))


def _try_images(
    segmenter: ShardSegmenter,
    shard: Shard,
    first: int,
    limit: int | None,
    on_step: Callable[[], None],
) -> Iterator[Message]:
    samples = read_shard(segmenter.replica.spec.source, shard)
    for place, sample in islice(enumerate(samples), first, None):
        yield place
        try:
            segmenter.dry_run(sample, on_step)
        except MemoryError:
            yield ImageError("out_of_memory", f"it takes more memory than {_needed(limit)}")
        except WorkersError as error:  # the device has no room for one tile
            yield ImageError("out_of_memory", f"tried alone: {error}")
        except RuntimeError as error:  # torch's device errors: a broken device stays broken,
            yield ImageError("worker_died", f"tried alone: {one_line(error)}")
            return  # and every other image would seem to be poison
        yield "survived"
    yield "finished"


def _needed(limit: int | None) -> str:
    return f"{limit / 2**30:.1f} GiB, half of what was free" if limit else "there is"


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed its process ({signal.Signals(-exit_code).name})"
    return f"ended its process with exit code {exit_code}"


def _end_with_parent() -> None:
    """End this process with its parent, even if it hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of prctl.h
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _limit_memory() -> int | None:
    """Limit this process to half of the memory that is free now; returns that in bytes, None where
    the system has no such limit (only Linux has).
    """
    if sys.platform != "linux":
        return None
    import resource

    limit = free_bytes() // 2
    status = Path("/proc/self/status").read_text()
    used = int(status.partition("VmData:")[2].split()[0]) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + limit, hard))
    return limit
