"""Images of a run fetched again by id: decoded, with their truth and their stored mask.

Each shard is read at most once, and only until the last image that is wanted from it.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from unet_core.arrays import Array
from unet_core.errors import ImageError, NotFoundError, UnetJobsError
from unet_core.images.picture import Picture, Rejected
from unet_core.inputs.shards import Shard, Source
from unet_core.report.measured import Pick
from unet_core.results import Results, pictures, stored_masks
from unet_core.storage.store import Store

MOST_PIXELS = 64 * 2**20
"""Larger images are not fetched."""
PATIENCE_S = 30.0
"""Storage that is away keeps a report waiting no longer."""
THREADS = 4

MadeT = TypeVar("MadeT")


@dataclass(frozen=True)
class Fetched:
    """One image of a run, ready to be drawn."""

    picture: Picture
    mask_HW: Array


@dataclass(frozen=True)
class Answer(Generic[MadeT]):
    """What was made of an image, or why nothing was."""

    made: MadeT | None
    reason: str = ""


def fetch(
    results: Results,
    picks: list[Pick],
    make: Callable[[Fetched], MadeT],
    most_bytes: float = math.inf,
) -> dict[str, Answer[MadeT]]:
    """Make something of each image, by id; on a few threads, and one image of a thread at a time.

    What cannot be had (the input is gone or changed, the image is too large) is said in its place,
    also where more than ``most_bytes`` of tars and the like would be streamed; first come first.
    """
    wanted: dict[str, set[str]] = defaultdict(set)
    answers: dict[str, Answer[MadeT]] = {}
    heads = {shard.shard_id: shard for shard in results.run.manifest() or []}
    shelf = _Shelf(results)
    for pick in picks:
        head = heads.get(pick.shard_id)
        is_streamed = head is not None and not head.has_members and head.shard_id not in wanted
        stream_bytes = head.bytes if head is not None and is_streamed else 0
        if pick.height * pick.width > MOST_PIXELS:
            size = f"{pick.height:,} × {pick.width:,} pixels"
            answers[pick.image_id] = Answer(None, f"its {size} are too many to show here")
        elif stream_bytes > most_bytes:
            size = f"{stream_bytes / 1e9:,.3g} GB"
            reason = f"its shard of {size} is too much to read for a page; see report --previews"
            answers[pick.image_id] = Answer(None, reason)
        else:
            most_bytes -= stream_bytes
            wanted[pick.shard_id].add(pick.image_id)

    def of_shard(shard_id: str) -> dict[str, Answer[MadeT]]:
        ids = wanted[shard_id]
        made: dict[str, Answer[MadeT]] = {}
        reason = "it is not in its shard any more"
        try:
            if shard_id not in heads:
                raise NotFoundError(f"the manifest has no shard {shard_id}")
            for image_id, fetched in shelf.take(heads[shard_id], ids):
                made[image_id] = Answer(make(fetched))
        except (UnetJobsError, ValueError, OSError, MemoryError) as error:
            reason = str(error) or type(error).__name__  # also of a damaged mask
        return {i: made.get(i, Answer(None, shelf.failures.get(i, reason))) for i in ids}

    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(of_shard, wanted):
            answers |= found
    return answers


class _Shelf:
    """Where images and masks are taken from."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._source = _impatient(results.source)
        self.failures: dict[str, str] = {}
        """Why an image of those asked for could not be taken."""

    def take(self, shard: Shard, ids: set[str]) -> Iterator[tuple[str, Fetched]]:
        """The images that are there, in the order of the shard."""
        masks = stored_masks(self._results.run.store, shard.shard_id)
        missing = set(ids)
        for picture in pictures(self._results, shard, ids, self._source, has_truth=True):
            image_id = picture.sample.image_id
            if isinstance(picture, Rejected):
                self.failures[image_id] = str(picture.failure)
                continue
            if image_id not in missing:
                continue  # the first of a name counts
            shape = picture.pixels.shape
            mask = next((mask for mask in masks if mask.image_id == image_id), None)
            if mask is None:
                self.failures[image_id] = "its mask is not there"
            elif (mask.height, mask.width) != shape:
                self.failures[image_id] = "its mask has another size: the input changed"
            else:
                yield image_id, Fetched(picture, mask.whole())
            missing.remove(image_id)
            if not missing:
                return


def _impatient(source: Source) -> Source:
    storage = source.root.storage
    deadline_s = min(PATIENCE_S, storage.deadline_s)
    storage = storage.model_copy(update={"deadline_s": deadline_s})
    return dataclasses.replace(source, root=Store(source.root.uri(), storage))


def truth_of(picture: Picture) -> Array | None:
    """Class ids HW, if there is a truth that can be read."""
    if picture.truth is None:
        return None
    try:
        truth_HW: Array = picture.truth.whole()[0]
    except ImageError:
        return None
    return truth_HW
