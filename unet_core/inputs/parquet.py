"""``format = "parquet"``: encoded images in a column; runs of whole row groups are shards."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unet_core.errors import ConfigError, ImageError, ParquetDamagedError, StoreError, one_line
from unet_core.images.sample import Sample
from unet_core.inputs.container import Container
from unet_core.inputs.shards import Known, Shard, Source, make_shard
from unet_core.storage.parquet_files import whole_parquet
from unet_core.storage.store import Entry

EXTENSIONS = (".parquet", ".pq")
TEXTS = (pa.string(), pa.large_string())
MAX_ROW_GROUP_BYTES = 2**30
SHARD_BYTES = 2**28  # a minute's work or less, and little to do again
"""Uncompressed bytes of the columns that are read; a row group is read as one."""


def list_shards(source: Source, known: Known) -> Iterator[Shard]:
    """Row ranges of about ``input.shard_images`` rows, made of whole row groups. Reads footers.

    Raises ConfigError for a column that is not there, StoreError for a file that is no Parquet or
    has row groups that do not fit memory.
    """
    entries = source.entries(lambda name: name.lower().endswith(EXTENSIONS))
    files = [entry for entry in entries if entry.name not in known]
    with ThreadPoolExecutor(16) as pool:
        for entry, footer in zip(files, pool.map(lambda e: _footer(source, e), files), strict=True):
            yield from _ranges(source, entry, footer)


def read(source: Source, shard: Shard) -> Iterator[Sample]:
    """The images of one row range. What is damaged inside the file fails the rows that are left.

    Raises ConfigError for a column that is not there, StoreError if storage fails, ObjectError if
    the file is not the one that was listed or cannot be read.
    """
    assert shard.first is not None
    assert shard.count is not None
    row = shard.first
    try:
        with source.root.open_parquet(shard.uri, etag=shard.etag) as file:
            _check_columns(source, file.schema_arrow, source.root.uri(shard.uri))
            groups = _groups_of(file.metadata, shard.first, shard.count)
            columns = list(_columns(source))
            # one by one: rows of a dictionary may all be the same image of 1 GiB
            for batch in file.iter_batches(1, row_groups=groups, columns=columns):
                # nothing in a file makes sure that its text is UTF-8
                schema = pa.schema([(f.name, _bytes_for_text(f.type)) for f in batch.schema])
                for values in batch.cast(schema).to_pylist():
                    yield _sample(source, shard, row, values)
                    row += 1
            if row != shard.first + shard.count:
                raise ParquetDamagedError("it has fewer rows than when the run began")
    except ParquetDamagedError as error:
        failure = ImageError("parquet", f"the file is damaged here: {one_line(error)[:200]}")
        uri = source.root.uri(shard.uri)
        for number in range(row, shard.first + shard.count):
            yield Sample(f"{shard.uri}#{number}", str(number), uri, bytes, failure=failure)


def _footer(source: Source, entry: Entry) -> pq.FileMetaData:
    with source.root.open_parquet(entry.name, entry.bytes) as file:
        _check_columns(source, file.schema_arrow, source.root.uri(entry.name))
        return file.metadata


def _columns(source: Source) -> dict[str, str]:
    """The columns to read, each with the key of the config that names it."""
    config = source.config
    wanted = {
        config.image_column: "input.image_column",
        config.masks: "input.masks",
        config.id_column: "input.id_column",
    }
    return {column: key for column, key in wanted.items() if column}


def _check_columns(source: Source, schema: pa.Schema, where: str) -> None:
    for column, key in _columns(source).items():
        if schema.names.count(column) > 1:
            raise ConfigError(f"{key}: {where} has several columns {column!r}")
        if column not in schema.names:
            there = ", ".join(schema.names)
            raise ConfigError(f"{key}: {where} has no column {column!r}; it has: {there}")
        kind = schema.field(column).type
        is_id = column not in (source.config.image_column, source.config.masks)
        if not (_is_id(kind) if is_id else _holds_bytes(kind)):
            allowed = "text or numbers" if is_id else "binary, or struct<bytes, path>"
            raise ConfigError(f"{key}: {column!r} in {where} is {kind}, allowed: {allowed}")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return kind in (pa.binary(), pa.large_binary())


def _is_id(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_id(kind.value_type)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return is_number or pa.types.is_decimal(kind) or kind in TEXTS or _holds_bytes(kind)


def _bytes_for_text(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _bytes_for_text(field.type)) for field in kind])
    if pa.types.is_dictionary(kind) and kind.value_type in TEXTS:
        return pa.dictionary(kind.index_type, pa.binary())
    return pa.large_binary() if kind in TEXTS else kind


def _ranges(source: Source, entry: Entry, metadata: pq.FileMetaData) -> Iterator[Shard]:
    """Join row groups until there are enough rows or bytes of the columns that are read."""
    first = rows = size = 0
    wanted = _columns(source)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if rows and (rows >= source.config.shard_images or size >= SHARD_BYTES):
            yield make_shard(entry.name, size, entry.etag, first, rows)
            first, rows, size = first + rows, 0, 0
        columns = map(group.column, range(group.num_columns))
        with whole_parquet(source.root.uri(entry.name)):  # names may be no UTF-8
            read = [c for c in columns if c.path_in_schema.partition(".")[0] in wanted]
        if (more := sum(column.total_uncompressed_size for column in read)) > MAX_ROW_GROUP_BYTES:
            where = f"{source.root.uri(entry.name)}: row group {number}"
            raise StoreError(
                f"{where} holds {more / 2**30:.1f} GiB of images, allowed: "
                f"{MAX_ROW_GROUP_BYTES / 2**30:.0f}; write it again with smaller row groups"
            )
        rows, size = rows + group.num_rows, size + more
    if rows:
        yield make_shard(entry.name, size, entry.etag, first, rows)


def _groups_of(metadata: pq.FileMetaData, first: int, count: int) -> list[int]:
    """The row groups that are just these rows; raises ParquetDamagedError if there are none."""
    numbers = range(metadata.num_row_groups)
    starts = [0, *accumulate(metadata.row_group(number).num_rows for number in numbers)]
    groups = [number for number in numbers if first <= starts[number] < first + count]
    if not groups or (starts[groups[0]], starts[groups[-1] + 1]) != (first, first + count):
        raise ParquetDamagedError("its row groups are not those of when the run began")
    return groups


def _sample(source: Source, shard: Shard, row: int, values: dict[str, Any]) -> Sample:
    config = source.config
    data, path = _payload(values[config.image_column])
    given = _text(values.get(config.id_column))
    mask = _payload(values[config.masks])[0] if config.masks else None
    name = path or (given if given is not None else str(row))
    return Sample(
        image_id=f"{shard.uri}#{row}" if given is None else given,
        key=PurePosixPath(name).stem if path or "/" in name else name,
        source_uri=source.root.uri(shard.uri),
        read=lambda: data or b"",
        read_mask=(lambda: mask) if mask is not None else None,
        failure=(
            ImageError("empty", "the row has no bytes; paths inside data are not followed")
            if data is None
            else None
        ),
        encoded_bytes=len(data or b"") + len(mask or b""),
    )


def _payload(value: Any) -> tuple[bytes | None, str | None]:
    """Bytes and path of a cell: binary, or the struct that dataset libraries write."""
    if isinstance(value, dict):
        path = value.get("path")
        return _payload(value.get("bytes"))[0], _text(path) if isinstance(path, bytes) else None
    return value, None


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return None if value is None else str(value)


CONTAINER = Container(list_shards, read, EXTENSIONS)
