"""``unet-jobs report``: the page of a run or a training, or overlays of single images of a run."""

import logging
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from unet_core.arrays import Array
from unet_core.config.sections import FolderConfig, StorageConfig
from unet_core.errors import ImageError, UnetJobsError
from unet_core.export.names import Names
from unet_core.images.decoder import DecodedImage
from unet_core.report.facts import RunFacts
from unet_core.report.page import NAME, render
from unet_core.report.panels import overlay
from unet_core.report.run_images import fetch
from unet_core.report.scores import RANDOM, RunScores, pick_ids
from unet_core.report.training_facts import TrainingFacts
from unet_core.runs.compact import batches, compact
from unet_core.runs.reader import Results, open_run
from unet_core.storage.store import Store
from unet_core.training.training_run import TrainingRun, is_training

log = logging.getLogger(__name__)


def write_report(uri: str, storage: StorageConfig | None = None) -> str:
    """Write ``report.html`` into the folder of a run or a training, and ``metrics.parquet`` into
    that of a run; return the URI of the report.

    Raises StoreError if it is neither, or cannot be written to.
    """
    store = Store(uri, storage)
    if is_training(store):
        page = render(TrainingFacts(TrainingRun(store)))
    else:
        results = open_run(uri, storage)
        compact(store, results.record)
        page = render(RunFacts(results))
    store.publish(NAME, page)
    return f"{uri.rstrip('/')}/{NAME}"


def ending_report(output: FolderConfig, storage: StorageConfig, was_done: bool) -> str:
    """Write the report at the end of a run or a training; return its URI, or "" if that failed.

    If nothing ``was_done``, a report that is there stays. Errors are logged, never raised.
    """
    uri = output.uri
    try:
        if not was_done and Store(uri, storage).exists(NAME):
            return f"{uri.rstrip('/')}/{NAME}"
        return write_report(uri, storage)
    except Exception as error:  # the work is done: no mistake in its description may deny that
        kind = "" if isinstance(error, UnetJobsError) else f"{type(error).__name__}: "
        log.warning(
            "the report could not be written: %s%s; write it later with: unet-jobs report %s",
            kind, error, uri, exc_info=log.isEnabledFor(logging.INFO),
        )  # fmt: skip
        return ""


def write_previews(
    uri: str, to: str, image_ids: list[str], worst: int, storage: StorageConfig | None = None
) -> tuple[int, list[tuple[str, str]]]:
    """Write overlays of these images, or of the worst ones, or of some at random, as PNG files that
    are named after the image ids. Return their number, and ids and reasons of those that failed.

    Raises ConfigError for a folder in the input, which would read them as images.
    """
    from jobs.results.export import require_apart  # with all that measures objects

    results, target = open_run(uri, storage), Store(to, storage)
    require_apart(results, "--previews", to)
    rows = batches(results.run.store)
    if image_ids:
        picks = pick_ids(rows, image_ids)
    else:
        first = results.record.first_foreground
        measured = RunScores(rows, len(results.class_names), worst or 20, first)
        picks = measured.worst if worst else measured.picks[RANDOM]
    names = Names.among(".png", [pa.array([pick.image_id for pick in picks], pa.string())])

    def write(decoded: DecodedImage, mask_HW: Array) -> str:
        """Return why it cannot be written, or ""."""
        try:
            name = names.of(decoded.sample.image_id)
            target.publish(name, overlay(decoded, mask_HW, results.palette))
        except ImageError as error:
            return str(error)
        return ""

    tried, reasons = fetch(results, picks, write)
    missing = [image_id for image_id in image_ids if image_id not in {**tried, **reasons}]
    near = _near(results, missing)
    problems = [(name, f"the run has no mask of it{near.get(name, '')}") for name in missing]
    refused = {image_id: why for image_id, why in tried.items() if why}
    return len(tried) - len(refused), [*problems, *reasons.items(), *refused.items()]


def _near(results: Results, missing: list[str]) -> dict[str, str]:
    """Suggest, for an unknown id, the first known one that contains its stem."""
    found: dict[str, str] = {}
    for table in batches(results.run.store, ["image_id"]) if missing else ():
        known = table["image_id"]
        for image_id in missing:
            stem = PurePosixPath(image_id).stem
            like = known.filter(pc.match_substring(known, stem, ignore_case=True))
            if len(like):
                found.setdefault(image_id, f"; did you mean {like[0]}?")
    return found
