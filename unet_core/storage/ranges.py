"""An object that is read in pieces, each by one ranged request."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unet_core.errors import ChangedError


@dataclass(frozen=True)
class Ranged:
    """An object that may be read in pieces, by several threads at once."""

    size: int
    read: Callable[[int, int], bytes]
    """Bytes [start, stop); raises StoreError."""


class RangeFile(io.RawIOBase):
    """A ranged object as a read-only file: seeking is free, every read is one request."""

    def __init__(self, ranged: Ranged, where: str) -> None:
        self._ranged, self._where, self._at = ranged, where, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move without a request."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._ranged.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer by one request. Raises ChangedError if the object has become shorter."""
        stop = max(self._at, min(self._at + len(buffer), self._ranged.size))
        data = self._ranged.read(self._at, stop) if stop > self._at else b""
        if len(data) != stop - self._at:
            raise ChangedError(
                f"{self._where} changed while it was read: {stop - self._at} bytes were asked for, "
                f"{len(data)} came"
            )
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
