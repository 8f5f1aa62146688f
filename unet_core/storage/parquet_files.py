"""Writing Parquet files as bytes and row groups, and errors of damaged ones."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from unet_core.errors import ParquetDamagedError, one_line
from unet_core.storage.spool import drop, spooled

COMPRESSION = {"compression": "zstd", "compression_level": 3, "write_page_index": False}


@contextlib.contextmanager
def whole_parquet(uri: str) -> Iterator[None]:
    """Turn errors while a Parquet file is read into ParquetDamagedError."""
    try:
        yield
    except MemoryError:  # also Arrow's: it says nothing about the file
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow calls bad pages I/O errors, and names need not be UTF-8
        raise ParquetDamagedError(
            f"{uri} is not a whole Parquet file: {one_line(error)}"
        ) from error


def decode_parquet(data: bytes) -> pa.Table:
    """Read the rows of a Parquet file.

    Arrow's threads may still hold buffers when a reader returns. To release one of Python's just as
    the interpreter ends aborts the process ("terminate called without an active exception"), so the
    bytes are copied into Arrow's memory.
    """
    copy = pa.BufferOutputStream()
    copy.write(data)
    return pq.ParquetFile(pa.BufferReader(copy.getvalue())).read()


def encode_parquet(table: pa.Table, **how: Any) -> bytes:
    """Encode rows as a Parquet file; zstd unless ``how`` names another compression."""
    sink = io.BytesIO()
    pq.write_table(table, sink, **{"compression": "zstd", **how})
    return sink.getvalue()


class RowGroupWriter:
    """A Parquet file while it is being built, spooled to local disk once it is large.
    Row groups are cut by bytes, so the file depends on its rows alone.
    """

    def __init__(
        self,
        columns: pa.Schema,
        group_bytes: int,
        join: Callable[[list[Any]], pa.Table] = pa.concat_tables,
        **how: Any,
    ) -> None:
        """``join``: makes a table of what is appended, if that is not tables."""
        self._join = join
        self._file = spooled()
        self._writer = pq.ParquetWriter(self._file, columns, **COMPRESSION, **how)
        self._group_bytes = group_bytes
        self._held: list[Any] = []
        self._held_bytes = 0

    def append(self, rows: Any, size: int | None = None) -> None:
        """Add a table of these columns; ``size``: its bytes, if they are not those in memory."""
        self._held.append(rows)
        self._held_bytes += rows.nbytes if size is None else size
        if self._held_bytes >= self._group_bytes:
            self._flush()

    def complete(self) -> BinaryIO:
        """Finish the file and return it; ``close`` deletes it."""
        self._flush()
        self._writer.close()
        return self._file

    def close(self) -> None:
        """Drop the spooled file."""
        with contextlib.suppress(OSError):  # no room for a footer that nobody reads
            self._writer.close()
        drop(self._file)
        self._file.write = len  # type: ignore[method-assign, assignment]  # what C++ tries in the end

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(self._join(self._held))
            self._held, self._held_bytes = [], 0
