"""``unet-jobs report``: the page of a run or a training, and overlays of single images."""

import logging
from dataclasses import dataclass

import pyarrow as pa

from jobs.export import require_apart
from unet_core.compact import batches
from unet_core.config import StorageConfig
from unet_core.errors import UnetJobsError
from unet_core.export.names import Names
from unet_core.report.facts import run_facts
from unet_core.report.images import Fetched, fetch
from unet_core.report.measured import RANDOM, Pick, measure, pick_ids
from unet_core.report.page import NAME, run_page, training_page
from unet_core.report.pictures import overlay
from unet_core.report.training import training_facts
from unet_core.results import Results, open_run
from unet_core.storage.store import Store
from unet_core.training.run import TrainingRun, is_training

log = logging.getLogger(__name__)

PREVIEWS = 20


def write_report(uri: str, storage: StorageConfig | None = None) -> str:
    """Write ``report.html`` into the folder of a run or a training; returns where it is.

    Raises StoreError if it is neither, or cannot be written to.
    """
    store = Store(uri, storage)
    if is_training(store):
        page = training_page(training_facts(TrainingRun(store).look()))
    else:
        page = run_page(run_facts(open_run(uri, storage)))
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


@dataclass(frozen=True)
class Previews:
    """What ``write_previews`` did."""

    written: int
    problems: list[tuple[str, str]]
    """Images that could not be drawn, and why."""


def write_previews(
    uri: str, to: str, image_ids: list[str], worst: int, storage: StorageConfig | None = None
) -> Previews:
    """Write overlays of these images, or of the worst ones, or of some at random, as PNG files that
    are named after the image ids.

    Raises ConfigError for a folder in the input, which would read them as images.
    """
    results, target = open_run(uri, storage), Store(to, storage)
    require_apart(results, "--previews", to)
    picks = _chosen(results, image_ids, worst)
    names = Names.among(".png", [pa.array([pick.image_id for pick in picks], pa.string())])

    def write(fetched: Fetched) -> None:
        image_id = fetched.picture.sample.image_id
        target.publish(names.of(image_id, ""), overlay(fetched, results.palette))

    answers = fetch(results, picks, write)
    problems = [(image_id, "the run has no mask of it") for image_id in image_ids
                if image_id not in answers]  # fmt: skip
    problems += [(image_id, found.reason) for image_id, found in answers.items() if found.reason]
    return Previews(sum(not found.reason for found in answers.values()), problems)


def _chosen(results: Results, image_ids: list[str], worst: int) -> list[Pick]:
    rows = batches(results.run.store)
    if image_ids:
        return pick_ids(rows, image_ids)
    measured = measure(rows, len(results.class_names), worst or PREVIEWS)
    return measured.worst if worst else measured.picks[RANDOM]
