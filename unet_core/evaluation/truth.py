"""Where the truth of a run's images is, when the run itself had none or another one: label images
by name, what lies beside the images in tars and Parquet files, or the masks of another run.
"""

import hashlib
import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_core.concurrency import map_in_order
from unet_core.errors import ConfigError, ImageError, NotFoundError, ShardError, StoreError
from unet_core.evaluation.aggregate import Images
from unet_core.images.codec import is_image
from unet_core.images.decoder import Pixels, TruthDecoder
from unet_core.images.sample import Sample
from unet_core.inputs import listing
from unet_core.inputs.folder import File, labels_by_stem, stem_of
from unet_core.inputs.formats import read_shard
from unet_core.inputs.shards import Shard, Source, readable_name
from unet_core.runs.parts import read_columns
from unet_core.runs.reader import Results, StoredMask, open_masks
from unet_core.storage.store import Store
from unet_core.tiling.geometry import Box, mask_windows

Row = dict[str, Any]
SHOWN = 3
IDS = pa.schema([("image_id", pa.string()), ("shard_id", pa.string())])
OWNERS = pa.schema(
    {"truth": pa.string(), "image": pa.string(), "is_own": pa.bool_(), "shard_id": pa.string()}
)


@dataclass(frozen=True)
class Found:
    """The truth of one image."""

    name: str | None = None
    """Which it is; None if there is none."""
    labels: Pixels | ImageError | None = None
    """Class ids 1HW, or why it cannot be used; None also for an image that has no mask."""


def truth_of(source: Source, classes: int) -> "LabelImages | BesideImages":
    """What ``input.masks`` of a source means, whatever it was when its shards were listed.

    Raises StoreError where there is nothing, ConfigError for two label images of one name.
    """
    is_by_name = source.config.mask_folder or source.format in ("folder", "list")
    return LabelImages.listed(source, classes) if is_by_name else BesideImages(source, classes)


def borrowed(owners: pa.Table) -> dict[str, set[str]]:
    """Label images that were found by a bare name and are another image's own, by the shards of
    those that are to give them back.

    Raises ConfigError if a label image is the truth of two images, and the own one of neither.
    """
    sums = [("image", "min"), ("image", "max"), ("is_own", "any")]
    by_name = owners.group_by("truth").aggregate(sums)
    shared = by_name.filter(pc.field("image_min") != pc.field("image_max"))
    for row in shared.filter(~pc.field("is_own_any")).sort_by("truth").slice(0, 1).to_pylist():
        raise ConfigError(
            f"{row['truth']} could be the truth of {row['image_min']} and of {row['image_max']}; "
            "give the label images the paths of their images"
        )
    found = defaultdict[str, set[str]](set)
    others = owners.filter(~pc.field("is_own"))
    for row in others.join(shared.select(["truth"]), "truth", join_type="left semi").to_pylist():
        found[row["shard_id"]].add(row["truth"])
    return found


# --- label images by name -------------------------------------------------------------------


@dataclass(frozen=True)
class LabelImages:
    """Loose label images: below another folder, beside the images, or in a column of a list."""

    source: Source
    classes: int
    labels: pa.RecordBatch
    """Stem (in a list the image id), name (path below the root, in a list URI) and etag, sorted by
    stem: one copy for all processes of a node.
    """
    digest: str
    """Of their names and etags."""

    @classmethod
    def listed(cls, source: Source, classes: int) -> "LabelImages":
        """Look at what is there now; what is read later is held to it."""
        labels = sorted((_in_list if _is_in_list(source) else _in_folder)(source).items())
        if not labels:
            masks = source.config.masks
            hint = "" if "/" in masks else f"; if it is a folder, write {masks}/"
            raise StoreError(f"truth: there are no label images in {masks!r}{hint}")
        digest = hashlib.sha256()
        for label in labels:
            digest.update(json.dumps(label).encode())
        columns = zip(*((stem, *label) for stem, label in labels), strict=True)
        arrays = [pa.array(column, pa.large_string()) for column in columns]
        batch = pa.RecordBatch.from_arrays(arrays, ["stem", "name", "etag"])
        return cls(source, classes, batch, digest.hexdigest())

    @property
    def names(self) -> list[str]:
        """The first ones, for a message."""
        return [*self.labels["name"].slice(0, SHOWN).to_pylist()]

    def of(self, shard: Shard, rows: list[Row]) -> Iterator[Found]:
        """For each row of a shard's metrics: by path below the root, else by bare name."""
        decoder, root = TruthDecoder(self.classes, self.source.config), self.source.mask_root
        found = ((*self._find(shard, row), row) for row in rows)
        for label, group in groupby(found, itemgetter(0)):
            if label is None:
                yield from (Found() for _ in group)
                continue
            name, etag = label
            file = File(root, name, etag)
            if _is_in_list(self.source):
                file = replace(listing.file_of(self.source, name, None), etag=etag)
            sample = Sample(name, "", "", bytes, read_mask=file.read, open_mask=file.open)
            yield from _decoded(decoder, sample, name, [(row, page) for _, page, row in group])

    def owners(self, shard_id: str, rows: pa.Table) -> pa.Table:
        """Label images of a part with the images that have them; a list may name one twice."""
        pairs = rows.select(["truth", "image_id", "key"]).filter(pc.field("truth").is_valid())
        owners = [
            {"truth": row["truth"], "image": self._path_of(row), "is_own": self.is_own(row)}
            for row in ([] if _is_in_list(self.source) else pairs.to_pylist())
        ]
        return pa.Table.from_pylist([{**o, "shard_id": shard_id} for o in owners], schema=OWNERS)

    def is_own(self, row: Row) -> bool:
        """Whether the label image of a row lies at the path of its image."""
        suffix = "" if self.source.config.mask_folder else self.source.config.masks
        return stem_of(row["truth"]).removesuffix(suffix) == self._path_of(row)

    def _path_of(self, row: Row) -> str:
        """Of the file of an image, without its extension."""
        *_, (image_id, _, _) = _pages(self.source, row)
        return stem_of(image_id) if is_image(image_id) else image_id

    def _find(self, shard: Shard, row: Row) -> tuple[tuple[str, str | None] | None, int]:
        """Name and etag of an image's truth, if there is one, and the page there."""
        stems, in_list = self.labels["stem"], _is_in_list(self.source)
        for image_id, key, page in _pages(self.source, row):
            for name in [image_id] if in_list else _names(image_id, key, shard):
                at = bisect_left(stems, name, key=str)
                if at < len(stems) and str(stems[at]) == name:
                    _, found, etag = (column[at].as_py() for column in self.labels.columns)
                    return (found, etag), page
        return None, 0


def _is_in_list(source: Source) -> bool:
    return source.format == "list" and not source.config.mask_folder


def _in_list(source: Source) -> dict[str, tuple[str, str | None]]:
    """Lists say nothing of how label images change: each is looked at."""

    def look(uri: str) -> tuple[str, str | None]:
        file = listing.file_of(source, uri, None)
        try:
            return uri, file.store.entry(file.name).etag
        except NotFoundError:  # its row will say so
            return uri, None

    uris = {member.key: member.mask for member in listing.all_members(source) if member.mask}
    return dict(zip(uris, map_in_order(look, uris.values()), strict=True))


def _in_folder(source: Source) -> dict[str, tuple[str, str | None]]:
    """Names that are no UTF-8 are those of no image."""
    entries = (e for e in source.mask_root.list() if readable_name(e.name) == e.name)
    by_stem = labels_by_stem(entries, source.config.masks)
    return {stem: (entry.name, entry.etag) for stem, entry in by_stem.items()}


def _pages(source: Source, row: Row) -> Iterator[tuple[str, str, int]]:
    """Image id and key of a row; those of its file too, with its page, if it may be one of many."""
    yield row["image_id"], row["key"], 0
    image_id, hash_, page = row["image_id"].rpartition("#")
    if source.config.pages == "expand" and hash_ and page.isdecimal():
        yield image_id, row["key"].removesuffix(f"#{page}"), int(page)


def _names(image_id: str, key: str, shard: Shard) -> Iterator[str]:
    """What the label image of an image may be called, without its extension."""
    yield image_id
    if is_image(image_id):
        yield stem_of(image_id)
    if shard.uri and image_id.startswith(f"{shard.uri}/"):
        yield image_id.removeprefix(f"{shard.uri}/")
    yield key


def _decoded(
    decoder: TruthDecoder, sample: Sample, name: str, rows: list[tuple[Row, int]]
) -> Iterator[Found]:
    """For rows whose truth is in one file, with its pages: it is decoded once."""
    ok = [(row, page) for row, page in rows if row["status"] == "ok"]
    is_large = any(len(mask_windows(row["height"], row["width"])) > 1 for row, _ in ok)
    labels = iter(decoder.decode(sample, [page for _, page in ok], is_large) if ok else [])
    for row, _ in rows:
        yield Found(name, next(labels) if row["status"] == "ok" else None)


# --- beside the images ----------------------------------------------------------------------


@dataclass(frozen=True)
class BesideImages:
    """Members of the run's own tars, or a column of its own Parquet files."""

    source: Source
    classes: int
    digest: str = ""
    """None is needed: shards are held to the etags in the manifest."""

    def of(self, shard: Shard, rows: list[Row]) -> Iterator[Found]:
        """Read the shard again, beside its rows, which have the same order."""
        decoder, masks = TruthDecoder(self.classes, self.source.config), self.source.config.masks
        for sample, group in groupby(self._pairs(shard, rows), itemgetter(0)):
            if sample is None:
                yield from (Found() for _ in group)
            else:
                yield from _decoded(decoder, sample, masks, [(row, page) for _, page, row in group])

    def _pairs(self, shard: Shard, rows: list[Row]) -> Iterator[tuple[Sample | None, int, Row]]:
        """What holds the truth of each row, the page there, and the row."""
        samples = read_shard(self.source, shard)
        sample, given = next(samples, None), -1
        for row in rows:
            pages = {name: page for name, _, page in _pages(self.source, row)}
            while sample is not None and pages.get(sample.image_id, -1) <= given:
                sample, given = next(samples, None), -1  # another may have the same id
            if sample is None or sample.read_mask is None:
                yield None, 0, row
            else:
                given = pages[sample.image_id]
                yield sample, given, row
        for _ in samples:  # to the end, where the shard is held to its etag
            pass


# --- another run ----------------------------------------------------------------------------


@dataclass(frozen=True)
class OtherRun:
    """The masks of another run; ``name`` of what is found is the image's status there."""

    store: Store
    shards: dict[str, tuple[str, ...]]
    """Where the images of a shard are there, if not in the shard of the same id."""

    def of(self, shard: Shard, rows: list[Row]) -> Iterator[Found]:
        """By image id; one masks part is open at a time."""
        there: dict[str, tuple[str, Row]] = {}
        for shard_id in self.shards.get(shard.shard_id, (shard.shard_id,)):
            rows_there = read_columns(self.store, shard_id, "image_id", "status", "error_message")
            for row in rows_there.to_pylist():
                if row["image_id"] not in there or row["status"] == "ok":
                    there[row["image_id"]] = shard_id, row
        with ExitStack() as stack:
            opened, masks = "", None
            for row in rows:
                shard_id, other = there.get(row["image_id"], ("", None))
                if other is None:
                    yield Found()
                elif other["status"] != "ok":
                    reason = f"it failed there: {other['error_message']}"
                    yield Found("failed", ImageError("truth", reason))
                elif row["status"] != "ok":
                    yield Found("ok")
                else:
                    if masks is None or shard_id != opened:
                        stack.close()
                        masks = stack.enter_context(open_masks(self.store, shard_id))
                        opened = shard_id
                    mask = masks.mask(row["image_id"])
                    if mask is None:
                        raise ShardError(
                            f"{self.store.uri()} lacks the mask of {row['image_id']}; unet-jobs "
                            "verify tells more"
                        )
                    yield Found("ok", _pixels(mask))

    @classmethod
    def joined(cls, mine: Results, other: Results) -> "tuple[OtherRun, Images]":
        """The masks of ``other`` for the images of ``mine``, and the images that only ``other``
        has. Shards of one id have the same images; those of the rest are joined by id.
        """
        here, there = ({shard.shard_id for shard in results.shards()} for results in (mine, other))
        ours, theirs = _ids(mine.run.store, here - there), _ids(other.run.store, there - here)
        shards = {shard_id: set[str]() for shard_id in here - there}
        pairs = ours.join(theirs, "image_id", join_type="inner", right_suffix="_there")
        for pair in pairs.group_by(["shard_id", "shard_id_there"]).aggregate([]).to_pylist():
            shards[pair["shard_id"]].add(pair["shard_id_there"])
        only = theirs.join(ours, "image_id", join_type="left anti")["image_id"].to_pylist()
        found = cls(other.run.store, {i: tuple(sorted(ids)) for i, ids in shards.items()})
        return found, Images.of(sorted(only))


Truth = LabelImages | BesideImages | OtherRun
"""Knows the truth of images; travels to the nodes."""


def _ids(store: Store, shard_ids: set[str]) -> pa.Table:
    def read(shard_id: str) -> pa.Table:
        ids = read_columns(store, shard_id, "image_id")
        return ids.append_column("shard_id", pa.array([shard_id] * ids.num_rows, pa.string()))

    return pa.concat_tables([IDS.empty_table(), *map_in_order(read, sorted(shard_ids))])


def _pixels(mask: StoredMask) -> Pixels:
    size, kind = (mask.height, mask.width), np.dtype(np.uint16)
    return Pixels(1, size, kind, lambda *window: mask.cut(Box(*window))[None])
