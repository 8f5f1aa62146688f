"""The export of one shard: its images, then its objects, then the index of what was written, which
is the commit.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
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
from unet_core.run import READ_THREADS, require_empty, require_equal
from unet_core.storage.spool import drop, local_space, spooled
from unet_core.storage.store import Store

VERSION = "1"
"""Of what an export writes."""
EXTENSIONS = {"png": ".png", "tiff": ".tif"}
MOST_PIXELS = 2**28
"""Of an image that has to be in memory as a whole."""
MOST_LABELS = 2**16 - 1
"""That 16 bits can tell apart."""
ROW_GROUP_BYTES = 8 * 2**20

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

    @cached_property
    def masks(self) -> dict[str, str]:
        """SHA-256 of the masks of each committed shard, as it was when this was first asked; stays
        in the process that asked.
        """

        def masks_of(shard_id: str) -> str:
            with contextlib.suppress(NotFoundError, ParquetDamagedError):
                return _masks_of(self.results.run.store, metrics_name(shard_id))
            return ""

        ids = sorted(self.results.run.committed())
        with ThreadPoolExecutor(READ_THREADS) as pool:
            return dict(zip(ids, pool.map(masks_of, ids), strict=True))

    def __reduce__(self) -> tuple[Any, ...]:
        return Export, (self.results, self.folder, self.options, self.names, self.has_input)

    def done(self) -> set[str]:
        """Shards whose index is of the masks that the run has now: those with failed images may
        have been done again since.
        """
        entries = self.folder.store.list(self.folder.index)
        ids = {entry.name.removesuffix(".parquet") for entry in entries} & self.masks.keys()
        with ThreadPoolExecutor(READ_THREADS) as pool:
            found = pool.map(lambda name: _masks_of(self.folder.store, self.index(name)), ids)
            return {name for name, masks in zip(ids, found, strict=True)
                    if masks == self.masks[name]}  # fmt: skip

    def index(self, shard_id: str) -> str:
        """Name of a shard's commit."""
        return f"{self.folder.index}/{shard_id}.parquet"

    def exported(self, shard_id: str, columns: list[str]) -> Iterator[Row]:
        """Rows of a shard's index, a group in memory at a time."""
        with self.folder.store.open_parquet(self.index(shard_id)) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns).to_pylist()

    @local_space()
    def do(self, shard: Shard) -> int:
        """Export one shard; raises NotFoundError or ParquetDamagedError if its parts are not what
        they should be.
        """
        shard_id = shard.shard_id
        metrics, footer = read_metrics(self.results.run.store, shard_id)
        footer = {**self.identity, "masks_sha256": footer["masks_sha256"]}
        columns = schema.EXPORTED
        if self.options.format == "coco":
            columns = columns.append(pa.field("annotations", pa.list_(schema.ANNOTATION)))
        with _Rows(columns, footer) as index, _Rows(schema.OBJECTS, footer) as objects:
            files = set()
            for row, found in self._rows(shard, metrics):
                files.add(row.get("file"))
                index.add(pa.Table.from_pylist([row], columns))
                if found is not None:
                    objects.add(found)
            self._remove_all_but(files, shard_id)
            if self.options.objects:
                objects.publish(self.folder.store, self.folder.objects(shard_id))
            index.publish(self.folder.store, self.index(shard_id))
        return metrics.num_rows

    def _rows(self, shard: Shard, metrics: pa.Table) -> Iterator[tuple[Row, pa.Table | None]]:
        """A row of the index for each of a metrics part, and the objects of that image."""
        rows = metrics.select(["image_id", "height", "width", "status", "error_message"])
        ok = rows.filter(pc.field("status") == "ok")["image_id"].to_pylist()
        inputs = InputImages(self.results, shard, ok if self.has_input else [])
        masks = stored_masks(self.results.run.store, shard.shard_id)
        mask = next(masks, None)
        for row in rows.to_pylist():
            if row["status"] != "ok":
                yield {**row, "problem": row["error_message"]}, None
            elif mask is None or mask.image_id != row["image_id"]:  # both are in the shard's order
                yield {**row, "status": "refused", "problem": "the run has no mask of it"}, None
            else:
                made, found = self._image(shard.shard_id, mask, inputs)
                yield {**row, **made}, found
                mask = next(masks, None)

    def _remove_all_but(self, files: set[str | None], shard_id: str) -> None:
        """Remove images of an earlier export of this shard that have failed since."""
        if self.folder.store.exists(self.index(shard_id)):
            for row in self.exported(shard_id, ["file"]):
                if row["file"] and row["file"] not in files:
                    self.folder.store.remove(row["file"])

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


class _Rows:
    """Rows on their way to a Parquet file; groups are cut by bytes, so it depends on them alone."""

    def __init__(self, columns: pa.Schema, footer: dict[str, str]) -> None:
        self._schema = columns.with_metadata(footer)
        self._file = spooled()
        self._writer = pq.ParquetWriter(self._file, self._schema, **COMPRESSION)
        self._tables: list[pa.Table] = []
        self._bytes = 0

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # no room for a footer that nobody reads
            self._writer.close()
        drop(self._file)

    def add(self, table: pa.Table) -> None:
        self._tables.append(table)
        self._bytes += table.nbytes
        if self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def publish(self, store: Store, name: str) -> None:
        self._flush()
        self._writer.close()
        store.publish(name, self._file)

    def _flush(self) -> None:
        table = pa.concat_tables([self._schema.empty_table(), *self._tables])
        self._writer.write_table(table.replace_schema_metadata(self._schema.metadata))
        self._tables, self._bytes = [], 0


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


def _masks_of(store: Store, name: str) -> str:
    """SHA-256 of the masks that a part or an index tells of."""
    with store.open_parquet(name) as file:
        found: bytes = (file.schema_arrow.metadata or {}).get(b"masks_sha256", b"")
        return found.decode()
