"""The one door to storage, through fsspec: read, list, and publish whole files.

``with fs.open(path, "wb")`` publishes a half-written object when its block raises, and fsspec's
exclusive create is not exclusive on local disk. So a file is always built completely first and
then published whole, here and nowhere else.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from unet_core.errors import StoreError

COPY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Entry:
    """One object below a root: its relative name, size in bytes, and what changes with it."""

    name: str
    bytes: int
    etag: str


class Store:
    """A folder or prefix; names are relative to it and use ``/``.

    Every method raises StoreError for what storage refuses.
    """

    def __init__(self, uri: str) -> None:
        self.fs, path = _resolve(uri)
        self.root = path.rstrip("/") or "/"
        self.is_local = _is_local(self.fs)

    def uri(self, name: str = "") -> str:
        """Where an object is, as people and other programs write it."""
        path = self._path(name)
        return path if self.is_local else str(self.fs.unstrip_protocol(path))

    def is_file(self) -> bool:
        """Whether the root itself is one object."""
        return bool(self.fs.isfile(self.root))

    def exists(self, name: str = "") -> bool:
        """Whether there is such an object or folder."""
        return bool(self.fs.exists(self._path(name)))

    def read(self, name: str) -> bytes:
        """All bytes of one object."""
        return _read(self.fs, self._path(name))

    def open(self, name: str) -> BinaryIO:
        """An object as a stream that is read once, from front to back."""
        path = self._path(name)
        try:
            options = {} if self.is_local else {"block_size": COPY_BYTES, "cache_type": "readahead"}
            stream: BinaryIO = self.fs.open(path, "rb", **options)
            return stream
        except OSError as error:
            raise _refused("open", path, error) from error

    def list(self, folder: str = "") -> list[Entry]:
        """All objects below a folder at any depth, by name; hidden ones (``.name``) are skipped."""
        path = self._path(folder)
        try:
            found = _walk(path) if self.is_local else self._find(path)
            return sorted(found, key=lambda entry: entry.name)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _refused("list", path, error) from error

    def publish(self, name: str, source: bytes | BinaryIO) -> None:
        """Make an object appear whole, replacing any earlier one."""
        path = self._path(name)
        try:
            if self.is_local:
                with _TemporaryTwin(path, source) as twin:
                    os.replace(twin, path)
            else:
                self.fs.pipe_file(path, _all_bytes(source))
        except OSError as error:
            raise _refused("write", path, error) from error

    def publish_exclusively(self, name: str, source: bytes | BinaryIO) -> bool:
        """Make an object appear whole if there is none; False if there was one."""
        path = self._path(name)
        try:
            if self.is_local:
                with _TemporaryTwin(path, source) as twin:
                    os.link(twin, path)
            else:
                self.fs.pipe_file(path, _all_bytes(source), mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            raise _refused("write", path, error) from error
        return True

    def remove(self, name: str) -> None:
        """Delete one object; none there is fine."""
        path = self._path(name)
        try:
            if self.fs.exists(path):
                self.fs.rm_file(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _refused("remove", path, error) from error

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def _find(self, path: str) -> Iterator[Entry]:
        for key, info in self.fs.find(path, detail=True).items():
            name = key[len(path.rstrip("/")) + 1 :]
            if not any(part.startswith(".") for part in name.split("/")):
                etag = info.get("ETag") or f"{info.get('created', '')}-{info['size']}"
                yield Entry(name, int(info["size"]), str(etag).strip('"'))


def split(uri: str) -> tuple[str, str]:
    """A file's URI as its folder and its name."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    return (folder or ("/" if uri.startswith("/") else "."), name)


def read_file(uri: str) -> bytes:
    """All bytes of one file given by path or URI."""
    return _read(*_resolve(uri))


def read_range(uri: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of one file given by path or URI."""
    fs, path = _resolve(uri)
    try:
        return bytes(fs.cat_file(path, start=start, end=stop))
    except OSError as error:
        raise _refused("read", path, error) from error


def _resolve(uri: str) -> tuple[Any, str]:
    try:
        fs, path = fsspec.core.url_to_fs(os.path.expanduser(uri))
    except (ValueError, ImportError) as error:
        raise StoreError(f"{uri}: not a path or URI that can be used: {error}") from error
    return fs, str(path)


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _read(fs: Any, path: str) -> bytes:
    try:
        return bytes(fs.cat_file(path))
    except OSError as error:
        raise _refused("read", path, error) from error


def _walk(root: str) -> Iterator[Entry]:
    """Files below a local folder; links to folders are followed, each real folder once."""
    seen: set[tuple[int, int]] = set()
    folders = [Path(root)]
    while folders:
        folder = folders.pop()
        stat = folder.stat()
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        for item in os.scandir(folder):
            if item.name.startswith("."):
                continue
            if item.is_dir():
                folders.append(Path(item.path))
            elif item.is_file():
                info = item.stat()
                name = os.path.relpath(item.path, root).replace(os.sep, "/")
                yield Entry(name, info.st_size, f"{info.st_mtime_ns}-{info.st_size}")


class _TemporaryTwin:
    """A complete, synced file beside ``path``; its name begins with ``_``, so readers skip it."""

    def __init__(self, path: str, source: bytes | BinaryIO) -> None:
        folder, name = os.path.split(path)
        self.source = source
        self.twin = os.path.join(folder, f"_{name}.{uuid.uuid4().hex}.tmp")

    def __enter__(self) -> str:
        os.makedirs(os.path.dirname(self.twin), exist_ok=True)
        try:
            with open(self.twin, "xb") as file:
                if isinstance(self.source, bytes):
                    file.write(self.source)
                else:
                    self.source.seek(0)
                    shutil.copyfileobj(self.source, file, COPY_BYTES)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            self.__exit__()
            raise
        return self.twin

    def __exit__(self, *_: object) -> None:
        if os.path.exists(self.twin):
            os.unlink(self.twin)


def _all_bytes(source: bytes | BinaryIO) -> bytes:
    if isinstance(source, bytes):
        return source
    source.seek(0)
    return source.read()


def _refused(verb: str, path: str, error: OSError) -> StoreError:
    reason = error.strerror or str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        reason = "there is no such file or folder"
    return StoreError(f"cannot {verb} {path}: {reason}")
