"""Maps a task (evaluate, export) over the committed shards of a run: on threads of this process, or
as Ray tasks on all nodes of a cluster.

A task records which shards it has done, so the same command continues. No model is loaded, so no
GPU is requested.
"""

import contextlib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from typing import Any, Protocol

from jobs.backends import session
from jobs.backends.paths import require_shared
from jobs.backends.version import code_version, require_same_code
from jobs.progress import ShardsProgress
from unet_core.config.predict import PredictConfig
from unet_core.errors import NotFoundError, ParquetDamagedError, ShardError
from unet_core.inputs.shards import Shard

AHEAD = 2
"""Ray tasks submitted for each core, so that none is idle."""
RETRIES = 2
WAIT_S = 0.5

Answers = Generator[tuple[Shard, int | session.Problem], None, None]


class Task(Protocol):
    """A function of one shard with a record of its own; pickled to the nodes."""

    def done(self) -> set[str]:
        """Ids of the shards that are done."""

    def do(self, shard: Shard) -> int:
        """Process one shard and publish the result; return its number of images.

        Raises ShardError if it cannot be done, NotFoundError or ParquetDamagedError if a part of it
        is damaged; other shards go on.
        """


def run_tasks(
    task: Task, shards: list[Shard], config: PredictConfig, paths: dict[str, str], what: str
) -> dict[str, str]:
    """Run a task on all shards that it has not done.

    ``paths``: what it reads and writes, by option or config key; all nodes must reach them.
    ``what``: shown in the progress, e.g. "evaluating". Returns the shards that could not be done,
    by path or id, with the reason; raises any other error of this project.
    """
    done = task.done()
    left = [shard for shard in shards if shard.shard_id not in done]
    if not left:
        return {}
    left.sort(key=lambda shard: (-shard.bytes, shard.shard_id))  # the largest first
    refused: dict[str, str] = {}
    count = config.workers.count  # auto: a cluster that is named
    is_here = count == "inline" or (count == "auto" and not session.is_cluster_named())
    run = _here if is_here else _on_cluster
    with (
        ShardsProgress(what, len(shards), len(shards) - len(left)) as progress,
        contextlib.closing(run(task, left, config, paths)) as answers,
    ):
        for shard, answer in answers:
            if isinstance(answer, int):
                progress.on_done(answer)
            elif isinstance(answer, session.CrashError | ShardError):
                refused[shard.name] = str(answer)
            else:
                raise answer
    return refused


def _here(task: Task, left: list[Shard], config: PredictConfig, paths: dict[str, str]) -> Answers:
    """Run on threads. On interrupt, shards in flight are abandoned."""
    pool = ThreadPoolExecutor(int(session.local_cpus(config.workers)) or 1)
    try:
        futures = {pool.submit(_done, code_version(), task, shard): shard for shard in left}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _on_cluster(
    task: Task, left: list[Shard], config: PredictConfig, paths: dict[str, str]
) -> Answers:
    """Run as Ray tasks on any node with a free core, ``AHEAD`` for each core at a time."""
    import ray

    with session.connected():
        require_shared(paths, config.storage, len(session.working_nodes()))
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_done)
        mine, shared = code_version(), ray.put(task)
        calls: dict[Any, Shard] = {}
        waiting = iter(left)
        try:
            while True:
                room = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(calls)
                for shard in islice(waiting, max(0, room)):
                    calls[remote.remote(mine, shared, shard)] = shard
                if not calls:
                    return
                ready, _ = ray.wait(list(calls), timeout=WAIT_S)
                for reference in ready:
                    answer = session.get_result(reference)
                    if isinstance(answer, ray.exceptions.RayError):
                        answer = session.CrashError(" ".join(str(answer).split())[:300])
                    yield calls.pop(reference), answer
        finally:
            for reference in calls:
                ray.cancel(reference, force=True)


@session.returns_errors
def _done(driver: str, task: Task, shard: Shard) -> int:
    require_same_code(driver, code_version(), "a node")
    try:
        return task.do(shard)
    except (NotFoundError, ParquetDamagedError) as error:  # a part of the run
        raise ShardError(f"{error}; unet-jobs verify tells more") from error
