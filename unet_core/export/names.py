"""Names of exported files: the image's id and the extension of what is written, safe on all file
systems wherever the id came from.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from unet_core.errors import ImageError

RULES = (
    (r"[\p{Cc}\\]", "_"),  # control characters; backslashes separate folders on Windows
    ("/+", "/"),
    ("^/|/$", ""),
    (r"(^|/)\.", r"\1_"),  # hidden files, and the way up
    ("^$", "_"),
)
"""Patterns of RE2 and their replacements, in this order."""
MOST_BYTES = 200
"""Length of one part of a path: file systems allow 255, of which an unpublished file needs some."""
MOST_PATH_BYTES = 700  # object stores allow 1,024 with the prefix


@dataclass(frozen=True)
class Names:
    """Names of the files of all images of a run; images that would share one are refused."""

    extension: str
    shared: frozenset[str] = frozenset()
    """Folded names that several images would have."""

    @classmethod
    def among(cls, extension: str, ids_of_shards: Iterable[pa.Array]) -> "Names":
        """Names for the images of a run, given the ids of each shard."""
        ids = pa.chunked_array(ids_of_shards, pa.string())
        counts = pc.value_counts(_folded(_paths(ids, extension)))
        several = pc.greater(counts.field("counts"), 1)
        return cls(extension, frozenset(counts.field("values").filter(several).to_pylist()))

    @property
    def digest(self) -> str:
        """Digest of what decides a name besides its id."""
        told = [self.extension, [], sorted(self.shared)]  # [] is kept for COCO exports of 0.1
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]

    def of(self, image_id: str) -> str:
        """The path of an image's file below the export; raises ImageError where it has none."""
        paths = _paths(pa.chunked_array([[image_id]], pa.string()), self.extension)
        path = str(paths[0].as_py())
        if _folded(paths)[0].as_py() in self.shared:
            raise ImageError("duplicate_id", f"{path} would be the file of another image too")
        longest = max(len(part.encode()) for part in path.split("/"))
        if longest > MOST_BYTES or len(path.encode()) > MOST_PATH_BYTES:
            raise ImageError(
                "too_large",
                f"the id is too long for the name of a file: allowed are {MOST_BYTES} bytes "
                f"between slashes and {MOST_PATH_BYTES} in all",
            )
        return path


def _paths(ids: pa.ChunkedArray, extension: str) -> pa.ChunkedArray:
    """Relative paths that stay below their folder, and whose folders are named as no file is."""
    files = rf"(?i)({re.escape(extension)}|\.json|\.parquet)/"
    for pattern, replacement in (*RULES, (files, r"\1_/")):
        ids = pc.replace_substring_regex(ids, pattern, replacement)
    return pc.binary_join_element_wise(ids, extension, "")


def _folded(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts without what some file systems ignore: case and the form of Unicode."""
    return pc.utf8_lower(pc.utf8_upper(pc.utf8_normalize(texts, "NFC")))
