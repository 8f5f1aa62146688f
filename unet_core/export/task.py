"""The export of one shard: its images, then its objects, then the index of what was written, which
is the commit.
"""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_core import schema
from unet_core.errors import (
    ImageError,
    NotFoundError,
    ParquetDamagedError,
    ShardError,
    StoreError,
)
from unet_core.export import coco
from unet_core.export.images import bands_of, encode_png, encode_tiff
from unet_core.export.inputs import InputImages
from unet_core.export.names import Names
from unet_core.export.objects import Objects, Slices, find_objects, measured
from unet_core.images.picture import Pixels
from unet_core.inputs.shards import Shard
from unet_core.parts import COMPRESSION, metrics_name, read_metrics
from unet_core.results import Results, StoredMask, stored_masks
from unet_core.run import require_empty, require_equal
from unet_core.storage.spool import drop
from unet_core.storage.store import Store

VERSION = "1"
"""Of what an export writes."""
EXTENSIONS = {"png": ".png", "tiff": ".tif"}
MOST_PIXELS = 2**28
"""Of an image that has to be in memory as a whole."""
MOST_LABELS = 2**16 - 1
"""That 16 bits can tell apart."""
READ_THREADS = 16

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is written of each image."""

    format: str
    """``png``, ``tiff``, ``coco``; empty: rows of objects alone."""
    objects: str = ""
    """``components`` or ``watershed``; empty: classes."""
    polygons: bool = False


@dataclass(frozen=True)
class Folder:
    """Where an export lies: a folder of its own, or a run's ``objects``, where only rows of objects
    are to be seen by who reads it as a data set.
    """

    store: Store
    is_of_run: bool = False

    @property
    def record(self) -> str:
        """Name of the file that says whose export this is."""
        return f"{self._hidden}export.json"

    @property
    def index(self) -> str:
        """Name of the folder of commits."""
        return f"{self._hidden}index"

    def objects(self, shard_id: str) -> str:
        """Name of a shard's rows of objects."""
        return f"{'' if self.is_of_run else 'objects/'}{shard_id}.parquet"

    @property
    def _hidden(self) -> str:
        return "_" if self.is_of_run else ""


@dataclass(frozen=True)
class Export:
    """A ``Task``: exports the shards of a run."""

    results: Results
    folder: Folder
    options: Options
    names: Names
    has_input: bool = False
    """Whether intensities are measured: the input is still there."""

    @property
    def identity(self) -> dict[str, str]:
        """What makes two exports the same, by what people know it by."""
        known = {**dataclasses.asdict(self.options), "mean_intensity": self.has_input}
        of_run = {"fingerprint": self.results.record.fingerprint, "names": self.names.digest}
        return {"export_version": VERSION, **of_run, **{k: str(v) for k, v in known.items()}}

    def establish(self) -> None:
        """Say whose folder this is, or join the export that is there.

        Raises RunMismatchError for another export, ConfigError for a folder of other files.
        """
        store, name = self.folder.store, self.folder.record
        if not store.exists(name):
            require_empty(store, "export", "--out")
            record = self.results.record
            told = {"class_names": record.class_names, "palette": record.palette}
            data = json.dumps({"options": self.identity, **told}, indent=1).encode() + b"\n"
            if store.publish_exclusively(name, data):
                return
        try:
            there = json.loads(store.read(name))["options"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{store.uri(name)} is damaged: {error}") from error
        advice = "give --out a new folder, or the same options"
        require_equal(store.uri(), there, self.identity, "export", advice)

    def done(self) -> set[str]:
        """Shards whose index is of the masks that the run has now: those with failed images may
        have been done again since.
        """
        ids = self.indexed()
        with ThreadPoolExecutor(READ_THREADS) as pool:
            flags = pool.map(self._is_done, ids)
            return {shard_id for shard_id, is_done in zip(ids, flags, strict=True) if is_done}

    def indexed(self) -> list[str]:
        """Shards that have an index, of whatever masks. One listing."""
        names = [entry.name for entry in self.folder.store.list(self.folder.index)]
        return [n.removesuffix(".parquet") for n in names if n.endswith(".parquet")]

    def _is_done(self, shard_id: str) -> bool:
        store = self.results.run.store
        try:
            now = _footer(store, metrics_name(shard_id))
        except NotFoundError:
            return False
        then = _footer(self.folder.store, f"{self.folder.index}/{shard_id}.parquet")
        return then.get(b"masks_sha256") == now.get(b"masks_sha256")

    def do(self, shard: Shard) -> int:
        """Export one shard; raises ShardError if its parts are not what they should be."""
        store, shard_id = self.results.run.store, shard.shard_id
        try:
            metrics, footer = read_metrics(store, shard_id)
            rows = metrics.select(["image_id", "height", "width", "status", "error_message"])
            ok = rows.filter(pc.field("status") == "ok")["image_id"].to_pylist()
            inputs = InputImages(self.results, shard, ok if self.has_input else [])
            masks = stored_masks(store, shard_id)
            made = {mask.image_id: self._image(shard_id, mask, inputs) for mask in masks}
        except (NotFoundError, ParquetDamagedError) as error:
            raise ShardError(f"{error}; unet-jobs verify tells more") from error
        footer = {**self.identity, "masks_sha256": footer["masks_sha256"]}
        if self.options.objects:
            objects = [table for _, table in made.values() if table is not None]
            part = pa.concat_tables([schema.OBJECTS.empty_table(), *objects])
            self._publish(self.folder.objects(shard_id), part, footer)
        columns = schema.EXPORTED
        if self.options.format == "coco":
            columns = columns.append(pa.field("annotations", pa.list_(schema.ANNOTATION)))
        index = [_index_row(row, made) for row in rows.to_pylist()]
        part = pa.Table.from_pylist(index, schema=columns)
        self._publish(f"{self.folder.index}/{shard_id}.parquet", part, footer)
        return len(index)

    def _image(
        self, shard_id: str, mask: StoredMask, inputs: InputImages
    ) -> tuple[Row, pa.Table | None]:
        """Write one image; what its row of the index says beside its size, and its objects."""
        try:
            if self.options.format != "tiff" or self.options.objects:
                _require_small(mask)
            if not self.options.objects:
                return self._classes(shard_id, mask), None
            found = find_objects(mask.whole(), self.options.objects == "watershed")
            row = self._labels(shard_id, mask.image_id, found)
            table = _measured(found, inputs.pixels(mask.image_id))
            ids = [mask.image_id] * len(found.classes)
            return row, pa.Table.from_pydict({"image_id": ids, **table}, schema=schema.OBJECTS)
        except ImageError as refused:
            return {"status": "refused", "problem": str(refused)}, None

    def _classes(self, shard_id: str, mask: StoredMask) -> Row:
        palette = self.results.palette
        match self.options.format:
            case "png":
                file = encode_png(mask.whole(), palette)
            case "tiff":
                file = encode_tiff((mask.height, mask.width), bands_of(mask), palette)
            case _:
                mask_HW = mask.whole()
                return {"annotations": self._annotations(coco.classes_of(mask_HW), mask_HW.shape)}
        return {"file": self._write(shard_id, mask.image_id, file)}

    def _labels(self, shard_id: str, image_id: str, found: Objects) -> Row:
        labels_HW, count = found.labels_HW, len(found.classes)
        match self.options.format:
            case "png" if count > MOST_LABELS:
                reason = f"{count:,} objects, a 16-bit PNG tells {MOST_LABELS:,} apart"
                raise ImageError("too_large", f"{reason}; use --format tiff")
            case "png":
                file = encode_png(labels_HW, None)
            case "tiff":
                kind = np.uint16 if count <= MOST_LABELS else np.uint32
                file = encode_tiff(labels_HW.shape, [labels_HW.astype(kind)], None)
            case "coco":
                return {"annotations": self._annotations(found.regions(), labels_HW.shape)}
            case _:
                return {}
        return {"file": self._write(shard_id, image_id, file)}

    def _annotations(
        self, regions: Iterator[tuple[int, Slices, Any]], shape: tuple[int, ...]
    ) -> list[Row]:
        size = (shape[0], shape[1])
        return [coco.annotation(*region, size, self.options.polygons) for region in regions]

    def _write(self, shard_id: str, image_id: str, file: BinaryIO) -> str:
        name = self.names.of(image_id, shard_id)
        try:
            self.folder.store.publish(name, file)
        finally:
            drop(file)
        return name

    def _publish(self, name: str, table: pa.Table, footer: dict[str, str]) -> None:
        sink = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(footer), sink, **COMPRESSION)
        self.folder.store.publish(name, sink.getvalue())


def _require_small(mask: StoredMask) -> None:
    if mask.height * mask.width > MOST_PIXELS:
        reason = f"{mask.height} × {mask.width} pixels, allowed: {MOST_PIXELS} in all"
        raise ImageError(
            "too_large", f"{reason}; only --format tiff without --objects has no limit"
        )


def _measured(found: Objects, pixels: Pixels | None) -> dict[str, list[Any]]:
    """Without intensities where the image cannot be read, or is not the one that it was."""
    if pixels is not None and pixels.shape == found.labels_HW.shape:
        with contextlib.suppress(ImageError):
            return measured(found, pixels)
    return measured(found, None)


def _index_row(row: Row, made: dict[str, tuple[Row, pa.Table | None]]) -> Row:
    """A row of ``schema.EXPORTED`` for a row of a metrics part."""
    if row["status"] != "ok":
        return {**row, "problem": row["error_message"]}
    nothing: Row = {"status": "refused", "problem": "the run has no mask of it"}
    found, _ = made.get(row["image_id"], (nothing, None))
    return {**row, **found}


def _footer(store: Store, name: str) -> dict[bytes, bytes]:
    with store.open_parquet(name) as file:
        return file.schema_arrow.metadata or {}
