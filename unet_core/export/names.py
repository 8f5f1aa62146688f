"""Names of exported files: an image's path with another extension, safe wherever its id came from.

Different images get different names, because what is escaped can be told from what was there.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from unet_core.images.codec import EXTENSIONS

EXTENSION = rf"(?i)\.({'|'.join(e.removeprefix('.') for e in EXTENSIONS)})"
AT_END = re.compile(rf"{EXTENSION}\Z")
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]|^\.|%(?=[0-9A-Fa-f]{2}|[-+])")
"""Characters that are escaped: of control, a first dot, and what would look like an escape."""
MOST_BYTES, KEPT_BYTES = 200, 150
"""Of one part of a path: file systems allow 255, of which an unpublished file needs some."""
MOST_PATH_BYTES = 700


@dataclass(frozen=True)
class Names:
    """The names of all images of a run."""

    extension: str
    full: frozenset[str] = frozenset()
    """Ids that keep their own extension: without it, they would be named as another image."""
    twice: frozenset[str] = frozenset()
    """Ids that several shards have; their names end in the shard's id."""
    alike: frozenset[str] = frozenset()
    """Ids that some file systems take for one: of another case or form of Unicode."""

    @classmethod
    def among(cls, extension: str, ids_of_shards: Iterable[pa.Array]) -> "Names":
        """Those that tell all images apart, given the ids of each shard."""
        ids = pa.chunked_array(ids_of_shards, pa.string())
        folded, once = _folded(ids), pc.unique(ids)
        stems = pc.replace_substring_regex(folded, rf"{EXTENSION}\z", "")
        is_full = pc.is_in(stems, _repeated(stems))
        while True:  # a full id may be what is left of another
            is_met = pc.and_not(pc.is_in(stems, folded.filter(is_full).combine_chunks()), is_full)
            if not pc.any(is_met).as_py():
                break
            is_full = pc.or_(is_full, is_met)
        alike = once.filter(pc.is_in(_folded(once), _repeated(_folded(once))))
        found = ids.filter(is_full), _repeated(ids), alike
        return cls(extension, *(frozenset(some.to_pylist()) for some in found))

    @property
    def digest(self) -> str:
        """Of all that decides a name beside its id."""
        told = [self.extension, sorted(self.full), sorted(self.twice)]
        told += [sorted(self.alike)] if self.alike else []
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]

    def of(self, image_id: str, shard_id: str) -> str:
        """The path of an image's file below the export."""
        stem = image_id if image_id in self.full else AT_END.sub("", image_id)
        *folders, last = (_safe(part) for part in stem.split("/"))
        path = "/".join([*(self._as_folder(folder) for folder in folders), last])
        if len(path.encode()) > MOST_PATH_BYTES:
            path = f"%-{_digest(stem)}"
        suffix = f"%+{shard_id}" if image_id in self.twice else ""
        suffix += f"%-{_digest(image_id)}" if image_id in self.alike else ""
        return f"{path}{suffix}{self.extension}"

    def _as_folder(self, part: str) -> str:
        """A folder that no file of the export is named as."""
        stem, dot, extension = part.rpartition(".")
        is_as_file = (dot + extension).lower() in (self.extension, ".json", ".parquet")
        return f"{stem}%2E{extension}" if is_as_file else part


def _folded(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """What is the same for file systems that mind neither case nor form."""
    return pc.utf8_lower(pc.utf8_upper(pc.utf8_normalize(texts, "NFC")))


def _repeated(values: pa.ChunkedArray) -> pa.Array:
    counts = pc.value_counts(values)
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))


def _safe(part: str) -> str:
    safe = UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", part) or "%2F"
    data = safe.encode()
    if len(data) <= MOST_BYTES:
        return safe
    return f"{data[:KEPT_BYTES].decode(errors='ignore')}%-{_digest(part)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
