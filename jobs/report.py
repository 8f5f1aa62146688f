"""``unet-jobs report``: the page of a run or a training, and overlays of single images."""

import logging
from dataclasses import dataclass
from urllib.parse import quote

from unet_core.compact import batches
from unet_core.config import StorageConfig
from unet_core.errors import UnetJobsError
from unet_core.report.facts import run_facts
from unet_core.report.images import fetch
from unet_core.report.measured import RANDOM, Pick, measure, pick_ids
from unet_core.report.page import NAME, run_page, training_page
from unet_core.report.pictures import overlay
from unet_core.report.training import training_facts
from unet_core.results import Results, open_run
from unet_core.storage.store import Store
from unet_core.training.run import TrainingRun, is_training

log = logging.getLogger(__name__)

PREVIEWS = 20
UNQUOTED = " !#$&'()+,;=@[]{}~^"


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
    refused: dict[str, str]
    """By image id, with the reason."""


def write_previews(
    uri: str, to: str, image_ids: list[str], worst: int, storage: StorageConfig | None = None
) -> Previews:
    """Write overlays of these images, or of the worst ones, or of some at random, as PNG files that
    are named after the image ids.
    """
    results, target = open_run(uri, storage), Store(to, storage)
    picks = _chosen(results, image_ids, worst)

    def write(pick_id: str, data: bytes) -> None:
        target.publish(preview_name(pick_id), data)

    answers = fetch(
        results, picks, lambda f: write(f.picture.sample.image_id, overlay(f, results.palette))
    )
    unknown = {i: "the run has no mask of it" for i in image_ids if i not in answers}
    refused = {i: answer.reason for i, answer in answers.items() if answer.reason}
    return Previews(len(answers) - len(refused), unknown | refused)


def _chosen(results: Results, image_ids: list[str], worst: int) -> list[Pick]:
    rows = batches(results.run.store)
    if image_ids:
        return pick_ids(rows, image_ids)
    measured = measure(rows, len(results.class_names), worst or PREVIEWS)
    return measured.worst if worst else measured.picks[RANDOM]


def preview_name(image_id: str) -> str:
    """A file's name below any folder: parts that would be hidden or lead out of it are quoted."""
    parts = [quote(part, safe=UNQUOTED) for part in image_id.split("/")]
    safe = [f"%2E{part[1:]}" if part[:1] in (".", "") else part for part in parts]
    name = "/".join(safe)
    return name if name.lower().endswith(".png") else f"{name}.png"
