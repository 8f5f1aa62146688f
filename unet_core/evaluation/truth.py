"""Truth that ``input.masks`` names: label images in files of their own, or beside their images in
tars and Parquet files.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import pyarrow as pa
import pyarrow.compute as pc

from unet_core.errors import ConfigError, ImageError, StoreError
from unet_core.evaluation.aggregate import Row
from unet_core.images.decoder import TruthDecoder, all_background
from unet_core.images.raster import Raster
from unet_core.images.sample import Sample
from unet_core.inputs.container import LabelFiles
from unet_core.inputs.formats import FORMATS, label_files, read_shard
from unet_core.inputs.shards import Shard, Source
from unet_core.tiling.geometry import mask_windows


@dataclass(frozen=True)
class Found:
    """The truth of one image."""

    name: str | None = None
    """Name of the label image, member suffix or column; None if there is no truth."""
    labels: Raster | ImageError | None = None
    """Class ids 1HW, or why they cannot be used; None also for an image that has no mask. An image
    without a label image may be compared with background."""


FoundIn = tuple[Sample | None, str | None, int, Row]
"""A file of truth with its name, the page there, and the row of the image."""


def truth_of(source: Source, classes: int) -> "LabelImages | BesideImages":
    """Resolve ``input.masks`` of a source, whatever it was when its shards were listed.

    Raises StoreError where there is nothing, ConfigError for two label images of one name.
    """
    files = label_files(source)
    return LabelImages.listed(source, classes, files) if files else BesideImages(source, classes)


@dataclass(frozen=True)
class LabelImages:
    """Loose label images: below another folder, beside the images, or in a column of a list."""

    source: Source
    classes: int
    labels: pa.RecordBatch
    """Columns ``key``, ``name``, ``etag``, sorted by key: one copy for all processes of a node."""
    digest: str
    """Digest of keys, names and etags."""

    @classmethod
    def listed(cls, source: Source, classes: int, files: LabelFiles) -> "LabelImages":
        """Look at what is there now; what is read later is held to it."""
        labels = sorted(files.list(source).items())
        if not labels:
            masks = source.config.masks
            hint = "" if "/" in masks else f"; if it is a folder, write {masks}/"
            raise StoreError(f"truth: there are no label images in {masks!r}{hint}")
        digest = hashlib.sha256()
        for label in labels:
            digest.update(json.dumps(label).encode())
        columns = zip(*((key, *label) for key, label in labels), strict=True)
        batch = pa.RecordBatch.from_arrays(
            [pa.array(column, pa.large_string()) for column in columns], ["key", "name", "etag"]
        )
        return cls(source, classes, batch, digest.hexdigest())

    @property
    def names(self) -> list[str]:
        """The first ones, for a message."""
        return [*self.labels["name"].slice(0, 3).to_pylist()]

    def of(self, shard: Shard, rows: list[Row]) -> Iterator[Found]:
        """Truth for each row of a shard's metrics."""
        return _decoded(TruthDecoder(self.classes, self.source.config), self._pairs(shard, rows))

    def require_distinct(self, owners: pa.Table) -> None:
        """Raises ConfigError if images of two tars or Parquet files have one label image: they may
        have the same path inside. ``owners``: an image of each shard by ``truth``.
        """
        if FORMATS[self.source.format].is_loose:
            return
        ends = owners.group_by("truth").aggregate([("image_id", "min"), ("image_id", "max")])
        is_shared = pc.field("image_id_min") != pc.field("image_id_max")
        for row in ends.filter(is_shared).sort_by("truth").slice(0, 1).to_pylist():
            raise ConfigError(
                f"{row['truth']} could be the truth of {row['image_id_min']} and of "
                f"{row['image_id_max']}; give the label images the paths of their images"
            )

    def _pairs(self, shard: Shard, rows: list[Row]) -> Iterator[FoundIn]:
        files = label_files(self.source)
        assert files is not None
        label, sample = None, None
        for row in rows:
            found, page = self._find(files, shard, row)
            if found != label:
                label, sample = found, found and files.open(self.source, *found)
            yield sample, found and found[0], page, row

    def _find(
        self, files: LabelFiles, shard: Shard, row: Row
    ) -> tuple[tuple[str, str | None] | None, int]:
        """Name and etag of an image's truth, if there is one, and the page there."""
        keys = self.labels["key"]
        for image_id, page in _pages(self.source, row).items():
            for key in files.keys(shard, image_id):
                at = bisect_left(keys, key, key=str)
                if at < len(keys) and str(keys[at]) == key:
                    _, name, etag = (column[at].as_py() for column in self.labels.columns)
                    return (name, etag), page
        return None, 0


@dataclass(frozen=True)
class BesideImages:
    """Members of the run's own tars, or a column of its own Parquet files."""

    source: Source
    classes: int
    digest: str = ""
    """None is needed: shards are held to the etags in the manifest."""

    def of(self, shard: Shard, rows: list[Row]) -> Iterator[Found]:
        """Read the shard again, beside its rows, which have the same order."""
        return _decoded(TruthDecoder(self.classes, self.source.config), self._pairs(shard, rows))

    def _pairs(self, shard: Shard, rows: list[Row]) -> Iterator[FoundIn]:
        samples = read_shard(self.source, shard)
        sample, given = next(samples, None), -1
        for row in rows:
            pages = _pages(self.source, row)
            while sample is not None and pages.get(sample.image_id, -1) <= given:
                sample, given = next(samples, None), -1  # another may have the same id
            if sample is None or sample.read_mask is None:
                yield None, None, 0, row
            else:
                given = pages[sample.image_id]
                yield sample, self.source.config.masks, given, row
        for _ in samples:  # to the end, where the shard is held to its etag
            pass


def _pages(source: Source, row: Row) -> dict[str, int]:
    """Pages by the image ids that a row's file may have: its own, or that without ``#page``."""
    image_id, hash_, page = row["image_id"].rpartition("#")
    is_page = source.config.pages == "expand" and hash_ and page.isdecimal()
    return {row["image_id"]: 0} | ({image_id: int(page)} if is_page else {})


def _decoded(decoder: TruthDecoder, pairs: Iterable[FoundIn]) -> Iterator[Found]:
    """Decode each file once, for all rows in turn whose truth it holds."""
    is_background = decoder.config.missing_mask == "background"
    for sample, group in groupby(pairs, itemgetter(0)):
        found = list(group)
        ok = [(row, page) for _, _, page, row in found if row["status"] == "ok"]
        is_large = any(len(mask_windows(row["height"], row["width"])) > 1 for row, _ in ok)
        labels = iter(
            decoder.decode(sample, [page for _, page in ok], is_large) if sample and ok else []
        )
        for _, name, _, row in found:
            if row["status"] != "ok":
                yield Found(name)
            elif sample is None and is_background:
                yield Found(None, all_background((row["height"], row["width"])))
            else:
                yield Found(name, next(labels, None))
