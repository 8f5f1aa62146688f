"""Temporary files on local disk."""

import contextlib
import errno
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO, cast

from unet_core.errors import StoreError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
IN_MEMORY_BYTES = 8 * 2**20
"""Smaller temporary files stay in memory, which spares a disk access for each small part."""


@contextlib.contextmanager
def reports_full_disk() -> Iterator[None]:
    """Turn errors for want of temporary space into a StoreError that names the folder."""
    try:
        yield
    except OSError as error:
        has_none = isinstance(error, FileNotFoundError) and tempfile.tempdir is None
        if error.errno not in FULL and not has_none:
            raise
        folder = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")
        raise StoreError(
            f"local temporary space is full: {folder}: {error.strerror}; make room there, or set "
            "TMPDIR to a larger folder; then the same command continues"
        ) from error


def spooled() -> BinaryIO:
    """Open a temporary file that stays in memory while it is small."""
    return cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES))


def drop(file: IO[Any]) -> None:
    """Close a temporary file; errors of its last write for want of space are ignored."""
    with contextlib.suppress(OSError):
        file.close()


class Spool:
    """Bytes kept on local disk until the image that they belong to is known to be good."""

    def __init__(self) -> None:
        self._file = spooled()
        weakref.finalize(self, drop, self._file)
        self._lock = threading.Lock()

    def keep(self, payload: dict[str, bytes]) -> Callable[[], dict[str, bytes]]:
        """Store bytes; returns a function that reads them back."""
        with self._lock:
            self._file.seek(0, 2)
            places = {
                name: (self._file.tell(), self._file.write(data)) for name, data in payload.items()
            }
        return lambda: {name: self._at(*place) for name, place in places.items()}

    def _at(self, start: int, length: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            return self._file.read(length)
