"""Reading a run: its totals, its masks by image or by shard, and its images."""

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_core.arrays import Array
from unet_core.config.predict import PredictConfig
from unet_core.config.sections import StorageConfig
from unet_core.errors import NotFoundError
from unet_core.images.codec import decode_mask
from unet_core.images.decoder import DecodedImage, Decoder, Rejected
from unet_core.images.preprocessing import Preprocessing
from unet_core.inputs.formats import read_shard
from unet_core.inputs.shards import Shard, Source
from unet_core.metrics import Totals
from unet_core.runs.compact import COMPACTED, batches
from unet_core.runs.manifest import with_members
from unet_core.runs.parts import masks_name
from unet_core.runs.run import open_existing
from unet_core.runs.schema import nodata_id
from unet_core.storage.parquet_files import whole_parquet
from unet_core.storage.store import Store
from unet_core.tiling.geometry import Box

PLACE = ["image_id", "y", "x", "height", "width", "image_height", "image_width", "encoding"]


@dataclass(frozen=True)
class StoredMask:
    """The mask of one image in an open masks part, or its probabilities."""

    image_id: str
    height: int
    width: int
    windows: Mapping[Box, Callable[[], Array]]
    """Functions that read class ids HW, or probabilities KHW, of each mask window; the windows
    cover the image."""

    def whole(self) -> Array:
        """Read class ids HW, or probabilities KHW, of the image."""
        return self.cut(Box(0, 0, self.height, self.width))

    def cut(self, wanted: Box) -> Array:
        """Read class ids HW, or probabilities KHW, of a window of the image; only mask windows that
        meet it are read. Raises ValueError if it leaves the image.
        """
        below, right = wanted.y + wanted.height, wanted.x + wanted.width
        is_inside = min(wanted.y, wanted.x) >= 0 and min(wanted.shape) > 0
        if not is_inside or below > self.height or right > self.width:
            raise ValueError(
                f"window {tuple(wanted)} leaves the image of {self.height} × {self.width} pixels"
            )
        if wanted in self.windows:
            return self.windows[wanted]()
        found: Array | None = None
        for box, read in self.windows.items():
            here, there = wanted.intersection(*box.slices)
            if any(side.start == side.stop for side in here):
                continue
            window = read()
            if found is None:
                found = np.empty((*window.shape[:-2], *wanted.shape), window.dtype)
            found[..., *here] = window[..., *there]
        assert found is not None  # the windows cover the image
        return found


class OpenMasks:
    """An open masks part: masks by image, one row group in memory at a time.

    Each group is read once if images are asked for in the order of the shard.
    """

    def __init__(self, file: pq.ParquetFile, uri: str) -> None:
        self._file, self._uri = file, uri
        self._rows: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}
        places = iter(file.read(columns=PLACE).to_pylist())
        for group in range(file.num_row_groups):
            for number, row in enumerate(islice(places, file.metadata.row_group(group).num_rows)):
                self._rows.setdefault(row["image_id"], []).append((group, number, row))
        self._held: tuple[tuple[str, int], Any] = ("", -1), None

    def mask(self, image_id: str) -> StoredMask | None:
        """Return the mask of one image; None if there is none."""
        return self._stored(image_id, self._read_mask)

    def probabilities(self, image_id: str) -> StoredMask | None:
        """Return the probabilities of one image, float32 KHW; None if it has no mask.

        The part must have them.
        """
        return self._stored(image_id, self._read_probabilities)

    def _stored(
        self, image_id: str, read: Callable[[int, int, dict[str, Any]], Array]
    ) -> StoredMask | None:
        if (rows := self._rows.get(image_id)) is None:
            return None
        windows = {
            Box(*(row[side] for side in Box._fields)): partial(read, group, number, row)
            for group, number, row in rows
        }
        *_, any_row = rows[0]
        return StoredMask(image_id, any_row["image_height"], any_row["image_width"], windows)

    def _read_mask(self, group: int, number: int, row: dict[str, Any]) -> Array:
        mask = self._cell("mask", group, number)
        payload = mask if isinstance(mask, bytes) else mask["bytes"]
        return decode_mask(payload, row["encoding"], row["height"], row["width"])

    def _read_probabilities(self, group: int, number: int, row: dict[str, Any]) -> Array:
        payload = self._cell("probabilities", group, number)
        is_uint8 = self._file.schema_arrow.metadata[b"probabilities"] == b"uint8"
        stored = np.frombuffer(payload, np.uint8 if is_uint8 else np.float16)
        stored_KHW = stored.reshape(-1, row["height"], row["width"]).astype(np.float32)
        return stored_KHW / np.float32(255) if is_uint8 else stored_KHW

    def _cell(self, column: str, group: int, number: int) -> Any:
        if self._held[0] != (column, group):
            self._held = ("", -1), None
            with whole_parquet(self._uri):  # the caller has left the one of open_parquet
                cells = self._file.read_row_group(group, columns=[column])[column]
            self._held = (column, group), cells
        return self._held[1][number].as_py()


class Results:
    """A run to read from."""

    def __init__(self, uri: str, storage: StorageConfig | None = None) -> None:
        """Raises StoreError if there is no run at ``uri``."""
        self.run, self.record = open_existing(uri, storage)
        self.class_names = self.record.class_names
        """Names of the classes, by class id."""
        self.palette = self.record.palette
        """RGB colors of the classes, by class id."""
        self.nodata = None if self.run.is_of_schema_1 else nodata_id(len(self.class_names))
        """Class id of pixels that are not valid; None if the run has none."""

    @cached_property
    def config(self) -> PredictConfig:
        """Config that the run was made with, but with the storage settings given now."""
        return PredictConfig.model_validate(self.record.config).model_copy(
            update={"storage": self.run.store.storage}
        )

    @cached_property
    def source(self) -> Source:
        """Input of the run, where it was then; nothing is listed."""
        identity = self.record.identity
        return Source(
            self.config.input.model_copy(update={"masks": identity["input.masks"]}),
            identity["input.format"],
            Store(identity["input.uri"], self.run.store.storage),
            tuple(identity["input.names"]),
        )

    def shards(self) -> list[Shard]:
        """List the committed shards in the order of the manifest, without their members."""
        committed = self.run.committed()
        return [s for s in self.run.manifest() or [] if s.shard_id in committed]

    @cached_property
    def totals(self) -> Totals:
        """Sums over all committed shards, with micro scores where there is truth."""
        run = self.run
        return run.finished_totals() if run.is_finished else run.totals(run.committed())

    @cached_property
    def metrics(self) -> pa.Table:
        """One row per image of all committed shards: ``shard_id`` and the columns of the parts."""
        return pa.concat_tables([COMPACTED.empty_table(), *batches(self.run.store)])

    def mask(self, image_id: str, window: tuple[int, int, int, int] | None = None) -> Array:
        """Read class ids HW of one image, or of a window (y, x, height, width) of it.

        Decodes only the mask windows that meet it; the first call reads the shards of all images.
        Raises NotFoundError with the reason if the run has no mask of that image, and ValueError
        for a window that leaves the image.
        """
        return self._cut(OpenMasks.mask, image_id, window)

    def probabilities(
        self, image_id: str, window: tuple[int, int, int, int] | None = None
    ) -> Array:
        """Read probabilities of one image, or of a window (y, x, height, width) of it: float32 KHW,
        one plane for each logit; a single one is the probability of class 1.

        Decodes only the mask windows that meet it. Raises NotFoundError if the run kept none, and
        what ``mask`` raises.
        """
        if self.record.identity.get("output.probabilities", "none") == "none":
            raise NotFoundError(
                f"{self.run.uri} kept no probabilities; segment the images into a new folder with "
                'output.probabilities = "uint8" or "float16"'
            )
        return self._cut(OpenMasks.probabilities, image_id, window)

    def _cut(
        self,
        of: Callable[[OpenMasks, str], StoredMask | None],
        image_id: str,
        window: tuple[int, int, int, int] | None,
    ) -> Array:
        with open_masks(self.run.store, self._shard_of(image_id)) as masks:
            if (mask := of(masks, image_id)) is None:
                raise NotFoundError(f"{self.run.uri} has no mask of {image_id}")
            return mask.cut(Box(*(window or (0, 0, mask.height, mask.width))))

    @cached_property
    def _places(self) -> pa.Table:
        """Shard and status of each image."""
        columns = ["shard_id", "image_id", "status", "error_message"]
        return pa.concat_tables(
            [COMPACTED.empty_table().select(columns), *batches(self.run.store, columns)]
        )

    def _shard_of(self, image_id: str) -> str:
        """Find the committed shard with the mask of an image; raises NotFoundError."""
        rows = self._places.filter(pc.field("image_id") == image_id).to_pylist()
        for row in rows:
            if row["status"] == "ok":
                return str(row["shard_id"])
        if rows:
            raise NotFoundError(
                f"{self.run.uri} has no mask of {image_id}: it failed: {rows[0]['error_message']}"
            )
        raise NotFoundError(
            f"{self.run.uri} has no image {image_id} among the {self._places.num_rows:,} of its "
            "committed shards"
        )


def open_run(uri: str, storage: StorageConfig | None = None) -> Results:
    """Open a run folder to read its results; raises StoreError if it is none."""
    return Results(uri, storage)


def decoded_images(
    results: Results, shard: Shard, ids: Set[str], source: Source, has_truth: bool
) -> Iterator[DecodedImage | Rejected]:
    """Decode the images of a shard with these ids again, in the order of the shard.

    They have the network's colors and their own values. Other images are not decoded: they may
    have killed a worker.
    """
    color = Preprocessing.model_validate(results.record.identity["model.preprocessing"]).color
    wanted = Preprocessing(color=color, normalization="range")  # nothing has to be counted
    config = source.config if has_truth else source.config.model_copy(update={"masks": ""})
    decoder = Decoder(wanted, len(results.class_names), config)
    files = ids | {image_id.rpartition("#")[0] for image_id in ids}  # pages of one file
    for sample in read_shard(source, with_members(results.run.store, shard)):
        if sample.image_id in files:
            bare = replace(sample, read_mask=None, open_mask=None)
            images = decoder.decode(sample if has_truth else bare)
            yield from (image for image in images if image.sample.image_id in ids)


@contextmanager
def open_masks(store: Store, shard_id: str) -> Iterator[OpenMasks]:
    """Open the masks of a committed shard, for one thread."""
    name = masks_name(shard_id)
    with store.open_parquet(name) as file:
        yield OpenMasks(file, store.uri(name))
