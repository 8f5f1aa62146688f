"""The export of one shard: its images, then its objects, then the index of what was written, which
is the commit.
"""

from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_core.arrays import Array
from unet_core.errors import ImageError, ShardError
from unet_core.export import coco
from unet_core.export.instances import Objects, find_objects, measure_instances
from unet_core.export.mask_images import Appearance, bands_of, encode_png, encode_tiff
from unet_core.export.names import Names
from unet_core.images.decoder import DecodedImage
from unet_core.images.georeference import Georeference
from unet_core.inputs.shards import Shard
from unet_core.runs import schema
from unet_core.runs.parts import current_ids, masks_sha256, read_metrics
from unet_core.runs.reader import Results, StoredMask, decoded_images, open_masks
from unet_core.runs.run_folder import RunFolder, require_empty
from unet_core.storage.parquet_files import RowGroupWriter
from unet_core.storage.spool import drop, reports_full_disk
from unet_core.storage.store import Store

EXTENSIONS = {"png": ".png", "tiff": ".tif"}
"""Extensions of the formats that write a file for each image."""
MOST_PIXELS = 2**28  # of an image that has to be in memory as a whole
MOST_LABELS = 2**16 - 1  # numbers that 16 bits can tell apart
ROW_GROUP_BYTES = 8 * 2**20  # what a reader of the index holds at once

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Format and content of the files of an export."""

    format: str
    """``png``, ``tiff``, ``coco``; empty: rows of objects alone."""
    objects: str = ""
    """``components`` or ``watershed``; empty: classes."""
    polygons: bool = False


@dataclass(frozen=True)
class Export:
    """Exports the shards of a run: a ``Task`` of ``jobs.backends.tasks``."""

    results: Results
    store: Store
    """The folder of the export."""
    options: Options
    names: Names
    has_input: bool = False
    """True if the input is still there, so that intensities are measured."""
    is_of_run: bool = False
    """True if it lies in a run's ``objects``, where all visible files are rows of objects; else it
    has a folder of its own.
    """

    @property
    def identity(self) -> dict[str, str]:
        """Options that exports of one folder share, by the names that people know them by."""
        known = {**asdict(self.options), "mean_intensity": self.has_input}
        return {
            "export_version": self._version,
            "fingerprint": self.results.record.fingerprint,
            "names": self.names.digest,
            **{key: str(value) for key, value in known.items()},
        }

    @property
    def _version(self) -> str:
        """Version of the files: 1, 2 with the extension of their image in the name, 3 with nodata,
        georeference and overviews, which runs of schema 1 do not get.
        """
        if not self.names.extension:
            return "1"
        return "2" if self.results.nodata is None else "3"

    def create_or_join(self) -> None:
        """Publish the identity of the export, or join the one that is there.

        Raises RunMismatchError for another export, ConfigError for a folder of other files.
        """
        folder = RunFolder(self.store, self._own("export.json"), "export")
        if not folder.document:
            require_empty(self.store, "export", "--out")
        folder.create_or_join(
            self.identity,
            advice="give --out a new folder, or the same options",
            class_names=self.results.class_names,
            palette=self.results.palette,
        )

    def done(self) -> set[str]:
        """Shards whose index is of the masks that the run has now."""
        return current_ids(self.results.run.store, self.store, self._own("index"))

    def index(self, shard_id: str) -> str:
        """Name of a shard's commit."""
        return self._own(f"index/{shard_id}.parquet")

    def _own(self, name: str) -> str:
        """Name of a file that describes the export."""
        return f"_{name}" if self.is_of_run else name

    def masks_sha256(self, shard_id: str) -> str | None:
        """Digest of the masks that a shard's index was made of."""
        return masks_sha256(self.store, self.index(shard_id))

    def exported(self, shard_id: str, columns: list[str]) -> Iterator[Row]:
        """Rows of a shard's index, a group in memory at a time."""
        with self.store.open_parquet(self.index(shard_id)) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns).to_pylist()

    @reports_full_disk()
    def do(self, shard: Shard) -> int:
        """Export one shard; raises NotFoundError or ParquetDamagedError if its parts are not what
        they should be.
        """
        store, shard_id = self.store, shard.shard_id
        metrics, footer = read_metrics(self.results.run.store, shard_id)
        footer = {**self.identity, "masks_sha256": footer["masks_sha256"]}
        columns = schema.EXPORTED
        if self.options.format == "coco":
            columns = columns.append(pa.field("annotations", pa.list_(schema.ANNOTATION)))
        with (
            closing(RowGroupWriter(columns.with_metadata(footer), ROW_GROUP_BYTES)) as index,
            closing(
                RowGroupWriter(schema.OBJECTS.with_metadata(footer), ROW_GROUP_BYTES)
            ) as objects,
        ):
            index.append(columns.empty_table())  # no rows are a group too
            objects.append(schema.OBJECTS.empty_table())
            files = set()
            for row, found in self._rows(shard, metrics):
                files.add(row.get("file"))
                index.append(pa.Table.from_pylist([row], columns))
                if found is not None:
                    objects.append(found)
            self._remove_all_but(files, shard_id)
            if self.options.objects:
                folder = "" if self.is_of_run else "objects/"
                store.publish(f"{folder}{shard_id}.parquet", objects.complete())
            store.publish(self.index(shard_id), index.complete())
        return metrics.num_rows

    def _rows(self, shard: Shard, metrics: pa.Table) -> Iterator[tuple[Row, pa.Table | None]]:
        """A row of the index for each of a metrics part, and the objects of that image."""
        columns = ["image_id", "height", "width", "status", "error_message", *Georeference._fields]
        rows = schema.conformed(metrics, schema.METRICS).select(columns)
        ok = rows.filter(pc.field("status") == "ok")["image_id"].to_pylist()
        inputs = _inputs(self.results, shard, ok) if self.has_input else repeat(None)
        with open_masks(self.results.run.store, shard.shard_id) as masks:
            for row in rows.to_pylist():
                if row["status"] != "ok":
                    yield {**row, "problem": row["error_message"]}, None
                else:
                    mask = masks.mask(row["image_id"])
                    where = Georeference(*(row[name] for name in Georeference._fields))
                    made, found = self._image(mask, next(inputs), where)
                    yield {**row, **made}, found

    def _remove_all_but(self, files: set[str | None], shard_id: str) -> None:
        """Remove images of an earlier export of this shard that have failed since."""
        if self.store.exists(self.index(shard_id)):
            for row in self.exported(shard_id, ["file"]):
                if row["file"] and row["file"] not in files:
                    self.store.remove(row["file"])

    def _image(
        self, mask: StoredMask | None, image: DecodedImage | None, where: Georeference
    ) -> tuple[Row, pa.Table | None]:
        """Write one image; what its row of the index says beside its size, and its objects."""
        if mask is None:
            return {"status": "refused", "problem": "the run has no mask of it"}, None
        try:
            is_limited = self.options.format != "tiff" or self.options.objects
            if is_limited and mask.height * mask.width > MOST_PIXELS:
                raise ImageError(
                    "too_large",
                    f"{mask.height} × {mask.width} pixels, allowed: {MOST_PIXELS} in all; only "
                    "--format tiff without --objects has no limit",
                )
            if not self.options.objects:
                return self._written(mask, where), None
            found = find_objects(self._classes_of(mask), self.options.objects == "watershed")
            row = self._written(mask, where, found)
            ids = [mask.image_id] * len(found.classes)
            table = {"image_id": ids, **_measured(found, image)}
            return row, pa.Table.from_pydict(table, schema=schema.OBJECTS)
        except ImageError as refused:
            return {"status": "refused", "problem": str(refused)}, None

    def _classes_of(self, mask: StoredMask) -> Array:
        """Class ids HW of a mask, with background where pixels are not valid."""
        ids_HW = mask.whole()
        return ids_HW if self.results.nodata is None else ids_HW * (ids_HW != self.results.nodata)

    def _written(self, mask: StoredMask, where: Georeference, found: Objects | None = None) -> Row:
        """Write a mask's classes, or the objects that were found in it; what the index says of it:
        its file, or annotations.
        """
        look = Appearance(None, None, where, self._version == "3")
        if found is None:
            look = replace(look, palette=self.results.palette, nodata=self.results.nodata)
        size = mask.height, mask.width
        name = self.names.of(mask.image_id) if self.names.extension else ""
        match self.options.format:
            case "png":
                if found and len(found.classes) > MOST_LABELS:
                    raise ImageError(
                        "too_large",
                        f"{len(found.classes):,} objects, a 16-bit PNG tells {MOST_LABELS:,} "
                        "apart; use --format tiff",
                    )
                file = encode_png(mask.whole() if found is None else found.labels_HW, look)
            case "tiff":
                kind = np.uint16 if found and len(found.classes) <= MOST_LABELS else np.uint32
                bands = bands_of(mask) if found is None else [found.labels_HW.astype(kind)]
                file = encode_tiff(size, bands, look)
            case "coco":
                regions = (found or Objects.of_classes(self._classes_of(mask))).regions()
                polygons = self.options.polygons
                return {"annotations": [coco.annotation(*at, size, polygons) for at in regions]}
            case "":  # rows of objects alone
                return {}
            case other:
                raise ValueError(other)
        try:
            self.store.publish(name, file)
        finally:
            drop(file)
        return {"file": name}


def _inputs(results: Results, shard: Shard, ids: list[str]) -> Iterator[DecodedImage | None]:
    """The images that masks are of, in their order and in the network's colours; None for each
    that cannot be read any more.
    """
    places, at = {image_id: place for place, image_id in enumerate(ids)}, 0
    with suppress(ShardError):  # its tar or Parquet file is gone, or another
        for image in decoded_images(results, shard, places.keys(), results.source, has_truth=False):
            place = places[image.sample.image_id]
            if isinstance(image, DecodedImage) and place >= at:
                yield from repeat(None, place - at)
                yield image
                at = place + 1
    yield from repeat(None, len(ids) - at)


def _measured(found: Objects, image: DecodedImage | None) -> dict[str, list[Any]]:
    """Without intensities where the image cannot be read, or is not the one that it was."""
    if image is not None and image.pixels.shape == found.labels_HW.shape:
        with suppress(ImageError):
            return measure_instances(found, image.pixels)
    return measure_instances(found, None)
