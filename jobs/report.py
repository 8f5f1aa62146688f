"""``unet-jobs report``: the page of a run or a training."""

import logging

from unet_core.compact import compact
from unet_core.config import StorageConfig
from unet_core.errors import UnetJobsError
from unet_core.report.facts import run_facts
from unet_core.report.page import NAME, run_page, training_page
from unet_core.report.training import training_facts
from unet_core.results import open_run
from unet_core.storage.store import Store
from unet_core.training.run import TrainingRun, is_training

log = logging.getLogger(__name__)


def write_report(uri: str, storage: StorageConfig | None = None) -> str:
    """Write ``report.html`` into the folder of a run or a training, and ``metrics.parquet`` into
    that of a run; returns where the report is.

    Raises StoreError if it is neither, or cannot be written to.
    """
    store = Store(uri, storage)
    if is_training(store):
        page = training_page(training_facts(TrainingRun(store)))
    else:
        results = open_run(uri, storage)
        compact(store, results.record)
        page = run_page(run_facts(results))
    store.publish(NAME, page)
    return report_uri(uri)


def report_uri(uri: str) -> str:
    """Where the report of a folder lies."""
    return f"{uri.rstrip('/')}/{NAME}"


def ending_report(uri: str, storage: StorageConfig, is_wanted: bool, was_done: bool) -> str:
    """The report that comes with the end of a run or a training; empty if there is none.

    Where nothing ``was_done`` and it is there, it is left alone. What keeps it from being written
    is told, and spoils nothing.
    """
    if not is_wanted:
        return ""
    try:
        if not was_done and Store(uri, storage).exists(NAME):
            return report_uri(uri)
        return write_report(uri, storage)
    except Exception as error:  # the work is done: no mistake in its description may deny that
        kind = "" if isinstance(error, UnetJobsError) else f"{type(error).__name__}: "
        log.warning(
            "the report could not be written: %s%s; write it later with: unet-jobs report %s",
            kind, error, uri, exc_info=log.isEnabledFor(logging.INFO),
        )  # fmt: skip
        return ""
