"""Reading a run back: masks by image, whole or by window."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.compute as pc

from unet_core.arrays import Array
from unet_core.config import StorageConfig
from unet_core.errors import NotFoundError
from unet_core.geometry import Box
from unet_core.images.codec import decode_mask
from unet_core.parts import masks_name, metrics_name
from unet_core.run import Run, open_existing
from unet_core.storage.store import Store

READ_THREADS = 16
PLACE = ["image_id", "y", "x", "height", "width", "image_height", "image_width", "encoding"]


def read_mask(
    run: str,
    image_id: str,
    window: tuple[int, int, int, int] | None = None,
    storage: StorageConfig | None = None,
) -> Array:
    """Class ids HW of one image, or of a window (y, x, height, width) of it.

    Only the mask windows that are asked for are decoded. Raises NotFoundError if the run has no
    mask of that image, with the reason, and ValueError for a window that leaves the image.
    """
    found, _ = open_existing(run, storage)
    shard_id = _shard_of(found, image_id)
    mask_HW, wanted = None, None
    for row, payload in _rows(found.store, shard_id, image_id, window):
        if wanted is None or mask_HW is None:
            wanted = Box(*(window or (0, 0, row["image_height"], row["image_width"])))
            _require_inside(wanted, row)
            mask_HW = np.empty(wanted.shape, np.uint8)
        stored_HW = decode_mask(payload, row["encoding"], row["height"], row["width"])
        mask_HW = mask_HW.astype(stored_HW.dtype, copy=False)
        rows, columns = (slice(row[at], row[at] + row[n]) for at, n in
                         (("y", "height"), ("x", "width")))  # fmt: skip
        here, there = wanted.shared(rows, columns)
        mask_HW[here] = stored_HW[there]
    if mask_HW is None:
        raise NotFoundError(f"{run} has no mask of {image_id} in that window")
    return mask_HW


def _require_inside(wanted: Box, row: dict[str, Any]) -> None:
    below, right = wanted.y + wanted.height, wanted.x + wanted.width
    is_inside = min(wanted.y, wanted.x) >= 0 and min(wanted.shape) > 0
    if not is_inside or below > row["image_height"] or right > row["image_width"]:
        raise ValueError(
            f"window {tuple(wanted)} leaves the image of {row['image_height']} × "
            f"{row['image_width']} pixels"
        )


def _rows(
    store: Store, shard_id: str, image_id: str, window: tuple[int, int, int, int] | None
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The rows of one image that meet the window, each with its bytes."""
    with store.open_parquet(masks_name(shard_id)) as file:
        for group in range(file.num_row_groups):
            places = file.read_row_group(group, columns=PLACE).to_pylist()
            met = [n for n, row in enumerate(places)
                   if row["image_id"] == image_id and _meets(row, window)]  # fmt: skip
            if met:
                masks = file.read_row_group(group, columns=["mask"])["mask"]
                for number in met:
                    payload = masks[number].as_py()
                    yield (
                        places[number],
                        payload if isinstance(payload, bytes) else payload["bytes"],
                    )


def _meets(row: dict[str, Any], window: tuple[int, int, int, int] | None) -> bool:
    """Whether a row has to be read; the first of an image always, for its size."""
    if window is None or row["y"] == row["x"] == 0:
        return True
    y, x, height, width = window
    in_rows = y < row["y"] + row["height"] and row["y"] < y + height
    return in_rows and x < row["x"] + row["width"] and row["x"] < x + width


def _shard_of(run: Run, image_id: str) -> str:
    """The committed shard with an image; tars and Parquet files are known by its name."""
    committed = run.committed()
    heads = [shard for shard in run.manifest() or [] if shard.shard_id in committed]
    heads.sort(key=lambda shard: not (shard.uri and image_id.startswith(shard.uri)))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for at in range(0, len(heads), READ_THREADS):
            ids = [shard.shard_id for shard in heads[at : at + READ_THREADS]]
            looks = pool.map(lambda shard_id: _status(run.store, shard_id, image_id), ids)
            for shard_id, status in zip(ids, looks, strict=True):
                if status == "":
                    return shard_id
                if status is not None:
                    raise NotFoundError(f"{run.uri} has no mask of {image_id}: {status}")
    raise NotFoundError(f"{run.uri} has no image {image_id} among {len(heads)} committed shards")


def _status(store: Store, shard_id: str, image_id: str) -> str | None:
    """Empty if the shard has a mask of the image, why not if it failed; None if it is not there."""
    with store.open_parquet(metrics_name(shard_id)) as file:
        table = file.read(columns=["image_id", "status", "error_message"])
    found = table.filter(pc.field("image_id") == image_id).to_pylist()
    if not found:
        return None
    is_ok = any(row["status"] == "ok" for row in found)
    return "" if is_ok else f"it failed: {found[0]['error_message']}"
