"""A run of a few shards that is measured and removed."""

import contextlib
import logging
import uuid
from collections.abc import Iterator
from dataclasses import replace

from jobs.job import Job
from jobs.predict import segment
from unet_core.config.predict import WorkersConfig
from unet_core.errors import ConfigError, StoreError
from unet_core.inputs.shards import Shard
from unet_core.runs.manifest import draft
from unet_core.runs.run import Run
from unet_core.runs.shard_plan import ShardPlan

log = logging.getLogger(__name__)


@contextlib.contextmanager
def scratch_run(job: Job, sample: list[Shard], workers: WorkersConfig) -> Iterator[Run]:
    """Segment a sample as ``predict`` does, into a folder beside the job's that is removed in the
    end. Any number of its images may fail.
    """
    config, uri = job.config, job.config.output.uri.rstrip("/")
    if "://" in uri and "/" not in uri.partition("://")[2]:
        raise ConfigError(f"output.uri: {uri} is a whole bucket; name a folder in it")
    output = config.output.model_copy(update={"uri": f"{uri}-scratch-{uuid.uuid4().hex[:8]}"})
    errors = config.errors.model_copy(update={"max_failed_images": 1.0})
    changed = config.model_copy(update={"output": output, "workers": workers, "errors": errors})
    run = Run(output.uri, config.storage)
    try:
        with draft(iter(sample)) as found:
            scratch = replace(job, config=changed, run=run).with_sampled_limits(found)
            segment(scratch, ShardPlan(found.heads, found.heads, found))
        yield run
    finally:
        try:
            run.store.remove_all()
        except StoreError as error:
            log.warning("%s stays and must be removed by hand: %s", run.uri, error)
