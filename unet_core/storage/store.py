"""The one door to storage, through fsspec: read, list, and publish whole files.

``with fs.open(path, "wb")`` publishes a half-written object when its block raises, and fsspec's
exclusive create is not exclusive on local disk. So a file is always built completely first and
then published whole, here and nowhere else.
"""

import contextlib
import errno
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, BinaryIO, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from unet_core.concurrency import map_in_order
from unet_core.config.sections import StorageConfig
from unet_core.errors import ChangedError, NotFoundError, StoreError
from unet_core.storage import object_stores
from unet_core.storage.parquet_files import whole_parquet
from unet_core.storage.ranges import Ranged, RangeFile

ResultT = TypeVar("ResultT")

COPY_BYTES = 16 * 2**20
"""Bytes per request of streams: large enough that latency does not count."""
ZARR = {"zarr.json", ".zattrs", ".zarray"}
"""A folder that directly holds a file of one of these names is a Zarr store."""
HIDDEN = {
    "@eadir", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "desktop.ini", "lost+found",
    "system volume information", "thumbs.db",
}  # fmt: skip
"""Files and folders that systems leave between those of people, in lower case."""
TEMPORARY = ".tmp"
"""Suffix of files that are not published yet; their names begin with ``_``."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object below a root: its relative name, size in bytes, and etag."""

    name: str
    bytes: int
    etag: str


class Store:
    """A folder or prefix; names are relative to it and use ``/``.

    Every method raises StoreError for permanent errors, of which ObjectErrors may be true of one
    object alone; transient ones are retried until ``storage.deadline_s``. Pickled as its URI;
    connects again in the other process.
    """

    def __init__(self, uri: str, storage: StorageConfig | None = None) -> None:
        self.storage = storage or StorageConfig()
        self._given = uri
        self.fs, path = object_stores.connect(uri, self.storage)
        self.root = path.rstrip("/") or "/"
        self.is_local, self._is_s3 = "file" in self.fs.protocol, "s3" in self.fs.protocol
        self._last_read = ""
        """Name of an object that could be read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.root if self.is_local else self._given, self.storage)

    def uri(self, name: str = "") -> str:
        """Return the URI of an object, in the form that other programs accept."""
        path = self._path(name)
        return path if self.is_local else str(self.fs.unstrip_protocol(path))

    @cached_property
    def size(self) -> int | None:
        """Size in bytes of the root if it is itself an object; None for a folder or nothing."""
        with contextlib.suppress(NotFoundError):
            info = self._info("")
            return int(info["size"]) if info["type"] == "file" else None
        return None

    def entry(self, name: str) -> Entry:
        """Look one object up, as a listing would give it. Raises NotFoundError if it is missing."""
        if self.is_local:
            return _local_entry(name, self._try("look at", name, lambda: os.stat(self._path(name))))
        return _object_entry(name, self._info(name))

    def exists(self, name: str = "") -> bool:
        """Whether an object or folder of this name exists."""
        if self.is_local:
            return os.path.exists(self._path(name))
        with contextlib.suppress(NotFoundError):
            self._info(name)  # not ``exists``: s3fs calls a bucket missing that it could not ask
            return True
        return False

    def read(
        self, name: str, start: int | None = None, stop: int | None = None, etag: str | None = None
    ) -> bytes:
        """Read an object, or its bytes [start, stop); raises ObjectError."""
        path = self._path(name)
        if self.is_local:
            call: Callable[[], bytes] = partial(self._read_locally, name, start, stop, etag)
        elif etag and self._is_s3:
            call = partial(object_stores.read_if_match, self.fs, path, start, stop, etag)
        else:
            call = partial(self.fs.cat_file, path, start=start, end=stop)
        data = bytes(self._try("read", name, call))
        if data:
            self._last_read = name
        return data

    def require_access(self) -> None:
        """Read again what could be read before, or list the root. Raises StoreError if that is
        denied too: then it is not one object that cannot be read.
        """
        with contextlib.suppress(NotFoundError):
            if self._last_read:
                self.read(self._last_read, 0, 1)
            else:
                self.first()

    def open(self, name: str, size: int | None = None, etag: str | None = None) -> BinaryIO:
        """Open an object as a stream to be read once from front to back in large pieces."""
        return cast(BinaryIO, io.BufferedReader(self.open_raw(name, size, etag), COPY_BYTES))

    def open_raw(self, name: str, size: int | None = None, etag: str | None = None) -> io.RawIOBase:
        """Open an object as a file without a buffer: each read is one request.

        Raises ObjectError like ``read``; for local files when they are opened.
        """
        if self.is_local:
            self.require_etag(name, etag)
            return self._try("open", name, lambda: open(self._path(name), "rb", buffering=0))
        size = self.entry(name).bytes if size is None else size
        ranged = Ranged(size, lambda start, stop: self.read(name, start, stop, etag))
        return RangeFile(ranged, self.uri(name))

    @contextlib.contextmanager
    def open_parquet(
        self,
        name: str,
        size: int | None = None,
        etag: str | None = None,
        metadata: pq.FileMetaData | None = None,
    ) -> Iterator[pq.ParquetFile]:
        """Open a Parquet file whose column chunks are read in few requests.

        ``metadata``: its footer, if it is known. Raises ParquetDamagedError if it is not a whole
        Parquet file, ObjectError like ``read``.
        """
        with (
            self.open_raw(name, size, etag) as raw,
            whole_parquet(self.uri(name)),
            # where it can be, a file that is no Python object, for the reason in decode_parquet
            pa.OSFile(self._path(name)) if self.is_local else pa.PythonFile(raw, "r") as source,
            pq.ParquetFile(source, metadata=metadata, pre_buffer=True) as file,
        ):
            yield file

    def list(self, folder: str = "") -> list[Entry]:
        """List objects below a folder at any depth, by name; skips hidden ones.

        Of a Zarr store, a folder that directly holds a file of ``ZARR``, it gives one such file
        alone: a store may have millions of chunks, and no reader knows it yet.
        """
        try:
            return sorted(self._entries(folder), key=lambda entry: entry.name)
        except NotFoundError:
            return []

    def first(self) -> Entry | None:
        """Return some object below the root; None if there is none. Lists only what it needs."""
        entry = next(self._entries(), None)
        if entry is None and self._is_s3:  # whose pages of keys do not tell what is missing
            self._try("list", "", lambda: self.fs.info(self.root))
        return entry

    def _entries(self, folder: str = "") -> Iterator[Entry]:
        path = self._path(folder.rstrip("/"))
        try:
            yield from self._walk(path) if self.is_local else self._find(path)
        except OSError as error:
            raise object_stores.as_store_error("list", self.uri(folder), error) from error

    def publish(self, name: str, source: bytes | BinaryIO) -> None:
        """Make an object appear whole, replacing any earlier one."""
        self._publish(name, source, os.replace)

    def publish_exclusively(self, name: str, source: bytes | BinaryIO) -> bool:
        """Make an object appear whole if there is none; False if there was one.

        Also False if an earlier try of this call succeeded and only its answer was lost: callers
        to whom that matters compare the bytes.
        """
        with contextlib.suppress(FileExistsError):
            self._publish(name, source, os.link, mode="create")
            return True
        return False

    def _publish(
        self, name: str, source: bytes | BinaryIO, settle: Callable[[str, str], None], **how: str
    ) -> None:
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        if self.is_local:
            write: Callable[[], None] = partial(self._locally, name, stream, settle)
        else:
            limit_s = self.storage.deadline_s
            write = partial(object_stores.write, self.fs, self._path(name), stream, limit_s, **how)
        self._try("write", name, write)

    def require_writable(self) -> None:
        """Make and remove a small object, locally in the nearest folder; StoreError if refused."""
        if not self.is_local:
            name = f"_probe-{uuid.uuid4().hex}"
            self.publish(name, b"probe")
            self.remove(name)
        else:
            folder = self.root
            while not os.path.exists(folder):
                folder = os.path.dirname(folder)
            try:
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(b"probe")
            except OSError as error:
                raise object_stores.as_store_error("write", folder, error) from error

    def supports_exclusive_create(self) -> bool:
        """Whether the store refuses a second object of one name, as ``publish_exclusively`` needs.

        Local disks do. On others a small object is created twice, and removed.
        """
        if self.is_local:
            return True
        name = f"_probe-{uuid.uuid4().hex}"
        self.publish_exclusively(name, b"first")
        try:
            return not self.publish_exclusively(name, b"second")
        finally:
            with contextlib.suppress(StoreError):  # a policy may allow writing only
                self.remove(name)

    def remove(self, name: str) -> None:
        """Delete one object, and a local folder that becomes empty; a missing one is ignored."""
        path = self._path(name)
        with contextlib.suppress(NotFoundError):
            if self.exists(name):
                self._try("remove", name, lambda: self.fs.rm_file(path))
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(path))

    def remove_all(self) -> None:
        """Delete the folder with all its contents; a missing one is ignored."""
        with contextlib.suppress(NotFoundError):
            self._try("remove", "", lambda: self.fs.rm(self._path(""), recursive=True))

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def _info(self, name: str) -> dict[str, Any]:
        return self._try("look at", name, lambda: self.fs.info(self._path(name)))

    def _try(self, verb: str, name: str, call: Callable[[], ResultT]) -> ResultT:
        """Call with retries on an object store, once on local disk."""
        if self.is_local:
            try:
                return call()
            except FileExistsError:
                raise
            except OSError as error:
                raise object_stores.as_store_error(verb, self.uri(name), error) from error
        return object_stores.retry_transient(call, verb, self.uri(name), self.storage.deadline_s)

    def _read_locally(
        self, name: str, start: int | None, stop: int | None, etag: str | None
    ) -> bytes:
        with open(self._path(name), "rb") as file:
            self._hold_to(name, os.fstat(file.fileno()), etag)
            file.seek(start or 0)
            data = file.read() if stop is None else file.read(stop - (start or 0))
            self._hold_to(name, os.fstat(file.fileno()), etag)  # written in place meanwhile
            return data

    def require_etag(self, name: str, etag: str | None) -> None:
        """Raises ChangedError if a local file has another etag, NotFoundError if it is gone."""
        self._hold_to(name, self._try("read", name, lambda: os.stat(self._path(name))), etag)

    def _hold_to(self, name: str, stat: os.stat_result, etag: str | None) -> None:
        if etag and _local_entry(name, stat).etag != etag:
            raise ChangedError(f"{self.uri(name)} {object_stores.REWRITTEN}")

    def _locally(self, name: str, source: BinaryIO, settle: Callable[[str, str], None]) -> None:
        try:
            _settle(self._path(name), source, settle)
        except FileNotFoundError:  # another driver finished the run and swept leftovers
            _settle(self._path(name), source, settle)

    def _find(self, path: str) -> Iterator[Entry]:
        """List an object store: S3 by one page of keys; if that is not all, and any other, by the
        prefixes of each level, side by side.
        """
        ask = partial(object_stores.one_page, self.fs, path)
        page = self._try("list", self._name(path), ask) if self._is_s3 else None
        prefixes = [path]
        while prefixes:
            levels = map_in_order(partial(self._level, path, page), prefixes)
            prefixes = []
            for info in chain.from_iterable(levels):
                if info["type"] == "directory":
                    prefixes.append(info["name"])
                elif info["size"] or not info["name"].endswith("/"):  # or it marks a folder
                    yield _object_entry(info["name"][len(path.rstrip("/")) + 1 :], info)

    def _level(
        self, root: str, page: dict[str, dict[str, object_stores.Info]] | None, path: str
    ) -> Sequence[object_stores.Info]:
        """Take from the page, or list, what is directly below a prefix and not hidden: nothing if
        it is gone, one file of a Zarr store. Raises if the root is gone.
        """
        try:
            found = page[path].values() if page else self._below(path)
        except NotFoundError:
            if self.exists(self._name(root)):
                return []
            raise
        files = [info for info in found if info["type"] != "directory"]
        if of_zarr := [info for info in files if split(info["name"])[1] in ZARR]:
            return [min(of_zarr, key=itemgetter("name"))]
        return [info for info in found if not is_hidden(split(info["name"])[1])]

    def _below(self, path: str) -> Sequence[object_stores.Info]:
        """List what is directly below a prefix."""
        if self._is_s3:
            one_level = partial(object_stores.one_level, self.fs, path)
            return self._try("list", self._name(path), one_level)
        found = self._try("list", self._name(path), lambda: self.fs.ls(path, detail=True))
        itself = [info["type"] for info in found if info["name"].rstrip("/") == path.rstrip("/")]
        if "directory" in itself:
            raise StoreError(
                f"{self.fs.unstrip_protocol(path)} holds keys with an empty part ('//'), which "
                "cannot be listed by prefix; name them in a list (input.format = 'list')"
            )
        return [info for info in found if info["name"].rstrip("/") != path.rstrip("/")]

    def _name(self, path: str) -> str:
        return path[len(self.root.rstrip("/")) + 1 :]

    def _walk(self, root: str) -> Iterator[Entry]:
        """Files below a local folder; links to folders are followed, each real folder once."""
        seen: set[tuple[int, int]] = set()
        folders = [""]
        while folders:
            below = folders.pop()
            folder = os.path.join(root, below)
            try:
                stat, items = os.stat(folder), list(os.scandir(folder))
            except FileNotFoundError:
                if not below:
                    raise
                continue  # deleted since it was listed
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            of_zarr = [item for item in items if item.name in ZARR and item.is_file()]
            for item in sorted(of_zarr, key=attrgetter("name"))[:1] or items:
                if is_hidden(item.name) and not of_zarr:
                    continue
                name = f"{below}{item.name}"
                if item.is_dir():
                    folders.append(f"{name}/")
                elif item.is_file() or item.is_symlink():
                    with contextlib.suppress(FileNotFoundError):  # it was temporary
                        yield _local_entry(name, item.stat(follow_symlinks=item.is_file()))


def is_hidden(part: str) -> bool:
    """Whether files of this name, or what lies in a folder of it, are no part of an input."""
    return part.startswith(".") or part.lower() in HIDDEN


def is_temporary(name: str) -> bool:
    """Whether a file is not published yet, or was left by a killed process."""
    return name.rpartition("/")[2].startswith("_") and name.endswith(TEMPORARY)


def split(uri: str) -> tuple[str, str]:
    """Split the URI of a file into its folder and its name."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    return (folder or ("/" if uri.startswith("/") else "."), name)


def _object_entry(name: str, info: dict[str, Any]) -> Entry:
    etag = info.get("ETag") or f"{info.get('created', '')}-{info['size']}"
    return Entry(name, int(info["size"]), str(etag).strip('"'))


def _local_entry(name: str, stat: os.stat_result) -> Entry:
    return Entry(name, stat.st_size, f"{stat.st_mtime_ns}-{stat.st_size}")


def _settle(path: str, source: BinaryIO, settle: Callable[[str, str], None]) -> None:
    """Put a complete, synced file in place; until then it begins with ``_``: readers skip it."""
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:  # which would mean that there is a winner already
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file") from error
    twin = os.path.join(folder, f"_{name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with open(twin, "xb") as file:
            source.seek(0)
            shutil.copyfileobj(source, file, COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        settle(twin, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(twin)
