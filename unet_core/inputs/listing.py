"""``format = "list"``: a list of URIs, as Parquet, as CSV, or as an S3 Inventory.

Only what lies below an allowed prefix is ever opened: a URI in data is data, not an order.
"""

import csv
import gzip
import io
import json
import urllib.parse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pyarrow as pa

from unet_core.concurrency import map_in_order
from unet_core.config.uris import AUTHORITY, absolute, has_credentials, plain
from unet_core.errors import ConfigError, ObjectError
from unet_core.images.codec import is_image
from unet_core.images.sample import Sample
from unet_core.inputs.container import Container, LabelFiles
from unet_core.inputs.folder import ListedFile, group_into_shards, label_sample, samples_of
from unet_core.inputs.parquet import EXTENSIONS
from unet_core.inputs.shards import Known, Member, Shard, Source, ending_of, member_ids
from unet_core.storage.store import Store, is_hidden, split

INVENTORY_COLUMNS = {"key": "Key", "size": "Size", "e_tag": "ETag", "is_latest": "IsLatest",
                     "is_delete_marker": "IsDeleteMarker"}  # fmt: skip
"""Column names of its Parquet files → those of its manifest."""
CSV = (".csv", ".csv.gz")
BATCH_ROWS = 65_536
DAMAGED = (ValueError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error)
MAX_ROW_CHARACTERS = 2**20
"""A row of a list names an image; a packed list of a few kB can hold one of many GB."""


class Line(NamedTuple):
    """One row of a list; None where the list does not say."""

    uri: str
    mask: str | None = None
    bytes: int | None = None
    etag: str | None = None
    id: str | None = None


def list_shards(source: Source, known: Known) -> Iterator[Shard]:
    """Groups of rows, in the order of the list. Nothing listed is opened.

    Raises ConfigError for a list without ``uri`` and for a URI outside ``input.allow``.
    """
    yield from group_into_shards(source, all_members(source), known)


def all_members(source: Source) -> Iterator[Member]:
    """Every row of the list, with its truth if ``input.masks`` names its column."""
    return map(Allowed.of(source).member, _lines(source))


def read(source: Source, shard: Shard) -> Iterator[Sample]:
    """The images of one shard, in the order of the list; bytes are read when asked for."""
    file_at = partial(file_of, source)
    yield from samples_of(source, shard, file_at, file_at)


def file_of(source: Source, uri: str, etag: str | None) -> ListedFile:
    """One listed object, below the prefix that allows it."""
    prefix = Allowed.of(source).prefix_of(uri)
    store = _store_of(prefix, source.root)
    # what lists call an etag is that of object stores: on local disk it says nothing
    return ListedFile(store, uri[len(prefix) :], None if store.is_local else etag)


def list_labels(source: Source) -> dict[str, tuple[str, str | None]]:
    """Label images by the ids of their images. Lists say nothing of how they change, so each is
    looked at; the row of one that is gone or denied will say so.
    """

    def look(uri: str) -> tuple[str, str | None]:
        file = file_of(source, uri, None)
        try:
            return uri, file.store.entry(file.name).etag
        except ObjectError:
            return uri, None

    uris = {member.key: member.mask for member in all_members(source) if member.mask}
    return dict(zip(uris, map_in_order(look, uris.values()), strict=True))


def open_label(source: Source, uri: str, etag: str | None) -> Sample:
    """A label image of the list, as it was when ``list_labels`` looked at it."""
    return label_sample(uri, replace(file_of(source, uri, None), etag=etag))


@lru_cache(maxsize=64)
def _store_of(prefix: str, root: Store) -> Store:
    """One store for each allowed prefix, with the storage options of the input."""
    return Store(prefix, root.storage)


@dataclass(frozen=True)
class Allowed:
    """The prefixes below which the objects of a list may lie."""

    folder: str
    """The folder of the list, from which relative URIs start."""
    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, source: Source) -> "Allowed":
        """``input.allow``, or the folder of the list."""
        folder = source.root.uri()
        if not source.config.allow:
            return cls(folder, (folder.rstrip("/") + "/",))
        prefixes = (absolute(uri).rstrip("/") + "/" for uri in source.config.allow)
        return cls(absolute(folder), tuple(dict.fromkeys(prefixes)))

    def member(self, line: Line) -> Member:
        """The loose image that a line names; raises ConfigError if it may not be opened.

        Its id is its path below the prefix; of several prefixes, below which paths may be alike,
        all of its URI.
        """
        uri = self._absolute(line.uri)
        prefix = self.prefix_of(uri)
        image_id = line.id or (uri if len(self.prefixes) > 1 else uri[len(prefix) :])
        mask = self._absolute(line.mask) if line.mask else None
        if mask is not None:
            self.prefix_of(mask)
        return Member(image_id, line.bytes or 0, (line.etag or "").strip('"'), mask, uri=uri)

    def prefix_of(self, uri: str) -> str:
        """The allowed prefix above a URI; raises ConfigError if there is none."""
        for prefix in self.prefixes:
            if uri.startswith(prefix) and _is_plain(uri[len(prefix) :], prefix):
                return prefix
        named = "a URI that holds credentials" if has_credentials(uri) else repr(uri[:1000])
        raise ConfigError(
            f"input.allow: the list names {named}; allowed is what lies below "
            f"{', '.join(self.prefixes)}"
        )

    def _absolute(self, uri: str) -> str:
        """A URI as it stands, or below the folder of the list if it is relative."""
        if "://" in uri or uri.startswith("/"):
            return plain(uri)
        return f"{self.folder}/{uri}"


def _is_plain(path: str, prefix: str) -> bool:
    """Whether a path below a prefix names one object and leads nowhere else."""
    leads_away = ".." in path.split("/") or "\0" in path
    is_odd = path.endswith("/") or "::" in path or "\\" in path
    is_key = prefix.startswith("s3://")  # which S3 takes as it is
    return bool(path.strip("/")) and not leads_away and (is_key or not is_odd)


# --- the kinds of lists ---------------------------------------------------------------------


def _lines(source: Source) -> Iterator[Line]:
    endings = (*EXTENSIONS, *CSV, "manifest.json")
    for entry in source.entries(lambda name: name.lower().endswith(endings)):
        if entry.name.lower().endswith(EXTENSIONS):
            yield from _parquet_lines(source, entry.name, entry.bytes)
        elif entry.name.lower().endswith(CSV):
            yield from _csv_lines(source, entry.name)
        else:
            yield from _inventory_lines(source, entry.name)


def _parquet_lines(source: Source, name: str, size: int | None) -> Iterator[Line]:
    where = source.root.uri(name)
    with source.root.open_parquet(name, size) as file:
        columns = _columns(source, file.schema_arrow.names, where)
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
            fields = {columns[c]: _cast(batch[c], c, where) for c in batch.schema.names}
            if fields["uri"].null_count:
                raise ConfigError(f"{where}: a row has no uri")
            lists = {field: column.to_pylist() for field, column in fields.items()}
            nothing = [None] * batch.num_rows
            yield from map(Line, *(lists.get(field, nothing) for field in Line._fields))


def _cast(column: pa.Array, name: str, where: str) -> pa.Array:
    try:
        cast = column.cast(pa.int64() if name == "bytes" else pa.string())
        cast.validate(full=True)  # text may be no UTF-8
        return cast
    except pa.ArrowException as error:
        raise ConfigError(f"{where}: column {name!r} is {column.type}: {error}") from error


def _csv_lines(source: Source, name: str) -> Iterator[Line]:
    """Rows of a CSV file with a header; empty lines count nothing."""
    where, number = source.root.uri(name), 1
    try:
        rows = _rows(source.root, name)
        header = next(rows, [])
        columns = _columns(source, header, where)
        fields = [columns.get(column) for column in header]
        for number, row in enumerate(rows, start=2):
            known = {f: v for f, v in zip(fields, row, strict=False) if f and v}
            if not known:
                continue
            if "uri" not in known:
                raise ConfigError(f"{where}: line {number} has no uri")
            size = known.pop("bytes", None)
            yield Line(**known, bytes=int(size) if size else None)
    except DAMAGED as error:
        raise ConfigError(f"{where}: line {number} cannot be read: {error}") from error


def _rows(store: Store, name: str) -> Iterator[list[str]]:
    """Rows of a CSV file, packed or not. Raises ValueError for one that is too long."""
    left = MAX_ROW_CHARACTERS

    def lines(text: io.TextIOWrapper) -> Iterator[str]:
        nonlocal left
        while line := text.readline(left):
            left -= len(line)
            if not left:
                raise ValueError(f"a row has more than {MAX_ROW_CHARACTERS} characters")
            yield line

    with store.open(name) as stream:
        unpacked: Any = gzip.GzipFile(fileobj=stream) if name.lower().endswith(".gz") else stream
        with io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline="") as text:
            for row in csv.reader(lines(text)):
                left = MAX_ROW_CHARACTERS
                yield row


def _columns(source: Source, names: list[str], where: str) -> dict[str, str]:
    """Columns of the list → fields of a line."""
    if "uri" not in names:
        raise ConfigError(f"{where}: a list needs a column 'uri'; it has: {', '.join(names)}")
    mask = source.config.masks
    if mask and mask not in names:
        raise ConfigError(
            f"input.masks: {where} has no column {mask!r}; it has: {', '.join(names)}"
        )
    wanted = {"uri": "uri", "bytes": "bytes", "etag": "etag", "id": "id", mask: "mask"}
    return {column: field for column, field in wanted.items() if column and column in names}


def _inventory_lines(source: Source, name: str) -> Iterator[Line]:
    """An S3 Inventory: ``manifest.json`` names its files and, for CSV, their columns.

    Its files lie in the bucket of the inventory, by their whole keys; only images are taken.
    """
    where = source.root.uri(name)
    if source.config.masks:
        raise ConfigError(
            f"input.masks: got {source.config.masks!r}, but the S3 Inventory {where} names no "
            "masks; make a list of URIs with a column of masks of it"
        )
    try:
        manifest = json.loads(source.root.read(name))
        bucket = str(manifest["sourceBucket"])
        files = [str(file["key"]) for file in manifest["files"]]
        columns = [column.strip() for column in str(manifest["fileSchema"]).split(",")]
        kind = manifest.get("fileFormat", "CSV")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: not the manifest.json of an S3 Inventory: {error}") from error
    if kind not in ("CSV", "Parquet"):
        raise ConfigError(f"{where}: the inventory is {kind}, allowed: CSV, Parquet")
    bucket_of_files = AUTHORITY.match(where)
    home = Store(bucket_of_files[0] if bucket_of_files else split(where)[0], source.root.storage)
    for file in files:
        try:
            for row in _inventory_rows(home, file, columns):
                is_old = str(row.get("IsLatest")).lower() == "false"
                is_deleted = str(row.get("IsDeleteMarker")).lower() == "true"
                *folders, name = row["Key"].split("/")
                if is_old or is_deleted or not name or any(map(is_hidden, (*folders, name))):
                    continue
                if not is_image(name):
                    source.passed_over[ending_of(name)] += 1
                else:
                    yield Line(
                        f"s3://{bucket}/{row['Key']}",
                        bytes=int(row.get("Size") or 0),
                        etag=row.get("ETag") or "",
                    )
        except (*DAMAGED, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{home.uri(file)}: not a file of an inventory: {error}") from error


def _inventory_rows(home: Store, file: str, columns: list[str]) -> Iterator[dict[str, str]]:
    if file.lower().endswith(EXTENSIONS):
        with home.open_parquet(file) as opened:
            there = [column for column in INVENTORY_COLUMNS if column in opened.schema_arrow.names]
            for batch in opened.iter_batches(BATCH_ROWS, columns=there):
                for row in batch.to_pylist():
                    yield {INVENTORY_COLUMNS[key]: value for key, value in row.items()}
    else:
        for cells in _rows(home, file):
            named = dict(zip(columns, cells, strict=False))
            yield {**named, "Key": urllib.parse.unquote_plus(named["Key"])}


LABELS = LabelFiles(list_labels, lambda _, image_id: [image_id], open_label)
CONTAINER = Container(list_shards, read, is_loose=True, labels=LABELS, recount=member_ids)
