"""Images of a run fetched again by id: decoded, with their truth and their stored mask.

Each shard is read at most once, and only until the last image that is wanted from it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from unet_core.arrays import Array
from unet_core.concurrency import map_in_order
from unet_core.errors import UnetJobsError
from unet_core.images.decoder import DecodedImage, Rejected
from unet_core.inputs.shards import Shard, Source
from unet_core.report.scores import Pick
from unet_core.runs.reader import Results, decoded_images, open_masks
from unet_core.storage.store import Store

MOST_PIXELS = 64 * 2**20
"""Largest image that is fetched."""
PATIENCE_S = 30.0
"""Longest wait for storage that is away."""

MadeT = TypeVar("MadeT")


def fetch(
    results: Results,
    picks: list[Pick],
    make: Callable[[DecodedImage, Array], MadeT],
    most_bytes: float = math.inf,
) -> tuple[dict[str, MadeT], dict[str, str]]:
    """Make something of each image and its mask (HW), by id, on a few threads; a thread holds one
    image at a time.

    The second result has the reasons for images that cannot be had: the input is gone or changed,
    the image is too large, or more than ``most_bytes`` of tars and the like would be streamed for
    it and those before it.
    """
    made: dict[str, MadeT] = {}
    heads = {shard.shard_id: shard for shard in results.run.manifest() or []}
    wanted, reasons = _wanted(picks, heads, most_bytes)
    storage = results.source.root.storage
    storage = storage.model_copy(update={"deadline_s": min(PATIENCE_S, storage.deadline_s)})
    source = replace(results.source, root=Store(results.source.root.uri(), storage))

    def of_shard(shard_id: str) -> None:
        reason = "it is not in its shard any more"
        try:
            shard, ids = heads[shard_id], wanted[shard_id]
            for decoded, mask_HW in _found(results, source, shard, ids, reasons):
                made[decoded.sample.image_id] = make(decoded, mask_HW)
        except (UnetJobsError, ValueError, OSError, MemoryError) as error:
            reason = str(error) or type(error).__name__  # also of a damaged mask
        for image_id in wanted[shard_id]:
            reasons.setdefault(image_id, reason)

    list(map_in_order(of_shard, wanted, threads=4))
    return made, {image_id: why for image_id, why in reasons.items() if image_id not in made}


def _wanted(
    picks: list[Pick], heads: dict[str, Shard], most_bytes: float
) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Group the images that can be had by shard; give the reasons for the others by id."""
    wanted: dict[str, set[str]] = defaultdict(set)
    reasons = {}
    for pick in picks:
        head = heads.get(pick.shard_id)
        if head is None:
            reasons[pick.image_id] = f"the manifest has no shard {pick.shard_id}"
            continue
        stream_bytes = 0 if head.has_members or head.shard_id in wanted else head.bytes
        if pick.height * pick.width > MOST_PIXELS:
            reasons[pick.image_id] = (
                f"its {pick.height:,} × {pick.width:,} pixels are too many to show here"
            )
        elif stream_bytes > most_bytes:
            reasons[pick.image_id] = (
                f"its shard of {stream_bytes / 1e9:,.3g} GB is too much to read for a page; see "
                "report --previews"
            )
        else:
            most_bytes -= stream_bytes
            wanted[pick.shard_id].add(pick.image_id)
    return wanted, reasons


def _found(
    results: Results, source: Source, shard: Shard, ids: set[str], reasons: dict[str, str]
) -> Iterator[tuple[DecodedImage, Array]]:
    """Read images and masks in the order of the shard; adds ``reasons`` why one cannot be taken."""
    missing = set(ids)
    with open_masks(results.run.store, shard.shard_id) as masks:
        for decoded in decoded_images(results, shard, ids, source, has_truth=True):
            image_id = decoded.sample.image_id
            if isinstance(decoded, Rejected):
                reasons[image_id] = str(decoded.failure)
            elif image_id in missing:  # the first of a name counts
                mask = masks.mask(image_id)
                if mask is None:
                    reasons[image_id] = "its mask is not there"
                elif (mask.height, mask.width) != decoded.pixels.shape:
                    reasons[image_id] = "its mask has another size: the input changed"
                else:
                    yield decoded, mask.whole()
                missing.remove(image_id)
            if not missing:
                return
