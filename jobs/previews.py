"""``unet-jobs report --previews``: overlays of single images of a run."""

from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from jobs.export import require_apart
from unet_core.compact import batches
from unet_core.config import StorageConfig
from unet_core.export.names import Names
from unet_core.report.images import Fetched, fetch
from unet_core.report.measured import RANDOM, Pick, measure, pick_ids
from unet_core.report.pictures import overlay
from unet_core.results import Results, open_run
from unet_core.storage.store import Store

PREVIEWS = 20


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

    written, reasons = fetch(results, picks, write)
    missing = [image_id for image_id in image_ids if image_id not in {**written, **reasons}]
    near = _near(results, missing)
    problems = [(image_id, f"the run has no mask of it{near[image_id]}") for image_id in missing]
    return Previews(len(written), [*problems, *reasons.items()])


def _near(results: Results, missing: list[str]) -> dict[str, str]:
    """For each id that is not there, one that has its stem within it."""
    found = dict.fromkeys(missing, "")
    for table in batches(results.run.store) if missing else ():
        for image_id in missing:
            stem = PurePosixPath(image_id).stem
            like = pc.match_substring(table["image_id"], stem, ignore_case=True)
            if not found[image_id] and pc.any(like).as_py():
                found[image_id] = f"; did you mean {table['image_id'].filter(like)[0].as_py()}?"
    return found


def _chosen(results: Results, image_ids: list[str], worst: int) -> list[Pick]:
    rows = batches(results.run.store)
    if image_ids:
        return pick_ids(rows, image_ids)
    measured = measure(rows, len(results.class_names), worst or PREVIEWS)
    return measured.worst if worst else measured.picks[RANDOM]
