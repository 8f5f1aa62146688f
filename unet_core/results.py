"""Reading a run back: its totals, its masks by image or by shard, whole or by window."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_core.arrays import Array
from unet_core.compact import read_rows
from unet_core.config import PredictConfig, StorageConfig
from unet_core.errors import NotFoundError
from unet_core.geometry import Box
from unet_core.images.codec import decode_mask
from unet_core.inputs.shards import Shard, Source
from unet_core.metrics import Totals
from unet_core.parts import masks_name, metrics_name
from unet_core.run import Run, open_existing
from unet_core.storage.store import Store

READ_THREADS = 16
PLACE = ["image_id", "y", "x", "height", "width", "image_height", "image_width", "encoding"]


@dataclass(frozen=True)
class StoredMask:
    """The mask of one image in a masks part that is open."""

    image_id: str
    height: int
    width: int
    boxes: tuple[Box, ...]
    """Its windows by place; they cover the image."""
    read: Callable[[int], Array]
    """Class ids HW of one of them, by its number."""

    @property
    def windows(self) -> Iterator[tuple[Box, Array]]:
        """Class ids HW by place, read when they are asked for."""
        return ((box, self.read(number)) for number, box in enumerate(self.boxes))

    def whole(self) -> Array:
        """Class ids HW of the image."""
        if len(self.boxes) == 1:
            return self.read(0)
        mask_HW = np.empty((0, 0), np.uint8)
        for box, window_HW in self.windows:
            if not mask_HW.size:
                mask_HW = np.empty((self.height, self.width), window_HW.dtype)
            mask_HW[box.y : box.y + box.height, box.x : box.x + box.width] = window_HW
        return mask_HW


class OpenMasks:
    """A masks part that is open: masks by image, one row group in memory at a time. Images that are
    asked for in the order of ``image_ids`` let each group be read once.
    """

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        self._rows: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}
        places = iter(file.read(columns=PLACE).to_pylist())
        for group in range(file.num_row_groups):
            rows = islice(places, file.metadata.row_group(group).num_rows)
            for number, row in enumerate(rows):
                self._rows.setdefault(row["image_id"], []).append((group, number, row))
        self._held: tuple[int, Any] = (-1, None)

    @property
    def image_ids(self) -> list[str]:
        """In the order of the shard."""
        return list(self._rows)

    def mask(self, image_id: str) -> StoredMask | None:
        """The mask of one image; None if there is none."""
        if image_id not in self._rows:
            return None
        rows = self._rows[image_id]
        boxes = tuple(_box(row) for _, _, row in rows)
        first = rows[0][2]
        size = first["image_height"], first["image_width"]
        return StoredMask(image_id, *size, boxes, lambda number: self._read(*rows[number]))

    def _read(self, group: int, number: int, row: dict[str, Any]) -> Array:
        if self._held[0] != group:
            self._held = (-1, None)
            self._held = (group, self._file.read_row_group(group, columns=["mask"])["mask"])
        payload = _payload(self._held[1][number].as_py())
        return decode_mask(payload, row["encoding"], row["height"], row["width"])


class Results:
    """A run, read back."""

    def __init__(self, uri: str, storage: StorageConfig | None = None) -> None:
        """Raises StoreError if there is no run at ``uri``."""
        self.run, self.record = open_existing(uri, storage)

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class id."""
        return self.record.class_names

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """RGB by class id."""
        return self.record.palette

    @cached_property
    def config(self) -> PredictConfig:
        """What the run was made with; storage as it is reached now."""
        made_with = PredictConfig.model_validate(self.record.config)
        return made_with.model_copy(update={"storage": self.run.store.storage})

    @cached_property
    def source(self) -> Source:
        """The input of the run, where it was; nothing is listed."""
        identity = self.record.identity
        root = Store(identity["input.uri"], self.run.store.storage)
        return Source(
            self.config.input, identity["input.format"], root, tuple(identity["input.names"])
        )

    def shards(self) -> list[Shard]:
        """The committed shards, by the order of the manifest, without their members."""
        committed = self.run.committed()
        return [s for s in self.run.manifest() or [] if s.shard_id in committed]

    @cached_property
    def totals(self) -> Totals:
        """The sums of all committed shards, with micro scores where there is truth."""
        if self.run.is_finished:
            return self.run.finished_totals()
        return self.run.totals(self.run.committed())

    @cached_property
    def metrics(self) -> pa.Table:
        """A row for each image of all committed shards: columns of the metrics parts after the
        ``shard_id``.
        """
        return read_rows(self.run.store)

    def mask(self, image_id: str, window: tuple[int, int, int, int] | None = None) -> Array:
        """Class ids HW of one image, or of a window (y, x, height, width) of it.

        Only the mask windows that are asked for are decoded. Raises NotFoundError if the run has no
        mask of that image, with the reason, and ValueError for a window that leaves the image.
        """
        shard_id = _shard_of(self.run, image_id)
        mask_HW, wanted = None, None
        for row, payload in _rows(self.run.store, shard_id, image_id, window):
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
            raise NotFoundError(f"{self.run.uri} has no mask of {image_id} in that window")
        return mask_HW


def open_run(uri: str, storage: StorageConfig | None = None) -> Results:
    """The results of a run folder; raises StoreError if it is none."""
    return Results(uri, storage)


@contextmanager
def open_masks(store: Store, shard_id: str) -> Iterator[OpenMasks]:
    """The masks of a committed shard, for one thread."""
    with store.open_parquet(masks_name(shard_id)) as file:
        yield OpenMasks(file)


def stored_masks(store: Store, shard_id: str) -> Iterator[StoredMask]:
    """The masks of a committed shard in the order of its images, one row group in memory at a time.

    What is not read of one mask is skipped; masks are read while this goes on, not after.
    """
    with open_masks(store, shard_id) as masks:
        for image_id in masks.image_ids:
            mask = masks.mask(image_id)
            assert mask is not None
            yield mask


def _box(row: dict[str, Any]) -> Box:
    return Box(row["y"], row["x"], row["height"], row["width"])


def _payload(mask: bytes | dict[str, Any]) -> bytes:
    return mask if isinstance(mask, bytes) else mask["bytes"]


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
                    yield places[number], _payload(masks[number].as_py())


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
