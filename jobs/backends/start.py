"""Starts the workers of a run: threads of this process, or Ray actors on a cluster."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from jobs.backends import session
from jobs.backends.paths import require_shared, with_absolute_paths, worker_paths
from jobs.backends.placement import resolve_placement
from jobs.job import Job
from jobs.scheduler.dispatch import Backend
from unet_core.config.uris import is_remote
from unet_core.runs.compute import RecordRun


@contextmanager
def start_workers(
    job: Job, shards: int, on_image: Callable[[], None], record_run: RecordRun
) -> Iterator[Backend]:
    """Start workers for so many shards; they end with the ``with`` block.

    ``on_image`` is called for every image that an inline worker completes, ``record_run`` for every
    worker that is loaded.
    """
    config = job.config
    if session.is_inline(config.workers):
        from jobs.backends.inline import InlineWorker  # torch

        spec = job.replica_spec(session.local_cpus(config.workers))
        with closing(InlineWorker(spec, on_image, record_run)) as worker:
            yield worker
        return
    from jobs.backends.actors import RayActors  # Ray

    with session.connected():
        paths = worker_paths(config)
        require_shared(paths, config.storage, len(session.working_nodes()))
        only_here = not config.storage.shared and not all(map(is_remote, paths.values()))
        placement = resolve_placement(
            config.workers, session.available_resources(config.workers, only_here)
        )
        workers = config.workers.model_copy(update={"gpus": placement.gpus})
        config = with_absolute_paths(config.model_copy(update={"workers": workers}))
        spec = replace(job.replica_spec(placement.cpus), config=config)
        with closing(RayActors(spec, placement, shards, only_here, record_run)) as backend:
            yield backend
