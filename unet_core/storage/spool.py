"""Bytes that wait on local disk."""

import tempfile
import threading
import weakref
from collections.abc import Callable

IN_MEMORY_BYTES = 8 * 2**20


class Spool:
    """Bytes that wait on local disk until the image that they belong to is known to be good."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115  # closed below
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()

    def keep(self, payload: dict[str, bytes]) -> Callable[[], dict[str, bytes]]:
        """Put bytes away; the result brings them back."""
        with self._lock:
            self._file.seek(0, 2)
            places = {}
            for name, data in payload.items():
                places[name] = self._file.tell(), self._file.write(data)
        return lambda: {name: self._at(*place) for name, place in places.items()}

    def _at(self, start: int, length: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            return self._file.read(length)
