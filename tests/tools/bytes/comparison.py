"""Comparison of two folders by the SHA-256 of their files, and of what differs in more detail."""

import hashlib
import io
import json
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import unified_diff
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.tools.bytes.allowances import Allowance, stable_name

LINES = 8
WIDTH = 160
TEXTS = (".csv", ".html", ".txt", "_SUCCESS")


@dataclass
class Comparison:
    """What two folders have in common, and what not."""

    same: int = 0
    allowed: dict[str, list[str]] = field(default_factory=dict)
    """Names of files that may differ, by the reason."""
    different: dict[str, str] = field(default_factory=dict)
    """The first difference of files that may not differ."""
    only_in: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    """Names of files that only one folder has."""

    @property
    def files(self) -> int:
        """How many names there are in both folders together."""
        allowed = sum(map(len, self.allowed.values()))
        return self.same + allowed + len(self.different) + sum(map(len, self.only_in))

    @property
    def is_clean(self) -> bool:
        """Whether nothing differs but what may."""
        return not self.different and not any(self.only_in)


def compare(
    first: Path, second: Path, allowed: Sequence[Allowance], given: Sequence[Allowance] = ()
) -> Comparison:
    """Compare all files below two folders. What is ``given`` counts where ``allowed`` does not
    suffice, and for files that only one folder has.
    """
    ours, theirs = files_below(first), files_below(second)
    found = Comparison()
    for name in sorted(ours.keys() | theirs.keys()):
        if name in ours and name in theirs:
            _compare_file(found, name, ours[name], theirs[name], (*allowed, *given))
        elif (reason := _reason(name, given)) is not None:
            found.allowed.setdefault(reason, []).append(name)
        else:
            found.only_in[name not in ours].append(name)
    return found


def files_below(folder: Path) -> dict[str, Path]:
    """All files by their stable names; those that would have the same are numbered in order."""
    found: dict[str, Path] = {}
    times = Counter[str]()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = stable_name(path.relative_to(folder).as_posix())
        times[name] += 1
        found[name if times[name] == 1 else f"{times[name]} of {name}"] = path
    return found


def _reason(name: str, allowances: Sequence[Allowance]) -> str | None:
    return next((a.reason for a in allowances if a.matches(name)), None)


def _compare_file(
    found: Comparison, name: str, first: Path, second: Path, allowances: Sequence[Allowance]
) -> None:
    if sha256(first) == sha256(second):
        found.same += 1
        return
    ours, theirs = first.read_bytes(), second.read_bytes()
    for allowance in filter(lambda a: a.matches(name), allowances):
        left, right = allowance.normalised(ours), allowance.normalised(theirs)
        if left == right:
            found.allowed.setdefault(allowance.reason, []).append(name)
            return
        if name.endswith(TEXTS):
            ours, theirs = left, right
    found.different[name] = first_difference(name, ours, theirs)


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- where files differ ---------------------------------------------------------------------------


def first_difference(name: str, first: bytes, second: bytes) -> str:
    """Where two files differ, as far as their kind tells; lines in words."""
    try:
        return "\n".join(islice(_differences(name, first, second), LINES))
    except (ValueError, KeyError, struct.error, pa.ArrowException, OSError) as error:
        return f"{_at(first, second)} (not read as its name says: {error})"


def _differences(name: str, first: bytes, second: bytes) -> Iterator[str]:
    if name.endswith(".json"):
        yield from _in_json(json.loads(first), json.loads(second), "")
    elif name.endswith(".parquet"):
        yield from _in_parquet(first, second)
    elif name.endswith(".safetensors"):
        yield from _in_json(_tensors(first), _tensors(second), "")
    elif name.endswith(TEXTS):
        yield from _in_text(first.decode("utf-8", "replace"), second.decode("utf-8", "replace"))
    else:
        yield _at(first, second)
        return
    if first != second:
        yield _at(first, second)


def _at(first: bytes, second: bytes) -> str:
    pairs = enumerate(zip(first, second, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))
    return f"byte {at:,} of {len(first):,} and {len(second):,}"


def _in_json(first: Any, second: Any, where: str) -> Iterator[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        if [*first] != [*second] and first.keys() == second.keys():
            yield f"{where.lstrip('.') or 'document'}: keys in another order"
        for key in sorted(first.keys() | second.keys(), key=str):
            yield from _in_json(first.get(key, ...), second.get(key, ...), f"{where}.{key}")
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for number, pair in enumerate(zip(first, second, strict=True)):
            yield from _in_json(*pair, f"{where}[{number}]")
    elif first != second:
        yield f"{where.lstrip('.') or 'document'}: {_short(first)} | {_short(second)}"


def _short(value: Any) -> str:
    text = "(absent)" if value is ... else repr(value)
    return text if len(text) <= WIDTH // 2 else f"{text[: WIDTH // 2]}…"


def _in_parquet(first: bytes, second: bytes) -> Iterator[str]:
    ours, theirs = (pq.ParquetFile(io.BytesIO(data)) for data in (first, second))
    pair = [_metadata(file.schema_arrow) for file in (ours, theirs)]
    yield from (f"metadata {line}" for line in _in_json(*pair, ""))
    counts = [(f.metadata.num_rows, f.metadata.num_row_groups) for f in (ours, theirs)]
    if counts[0] != counts[1]:
        yield f"rows and row groups: {counts[0]} | {counts[1]}"
    yield from _in_columns(*(file.read(use_threads=False) for file in (ours, theirs)))


def _metadata(schema: pa.Schema) -> dict[str, str]:
    return {k.decode(): v.decode("utf-8", "replace") for k, v in (schema.metadata or {}).items()}


def _in_columns(ours: pa.Table, theirs: pa.Table) -> Iterator[str]:
    if not ours.schema.equals(theirs.schema):
        yield f"columns: {_short(_types(ours))} | {_short(_types(theirs))}"
    for name in (n for n in ours.column_names if n in theirs.column_names):
        left, right = ours[name].to_pylist(), theirs[name].to_pylist()
        rows = enumerate(zip(left, right, strict=False))
        row = next((n for n, (a, b) in rows if repr(a) != repr(b)), None)
        if row is not None:
            yield f"column {name}, row {row}: {_short(left[row])} | {_short(right[row])}"


def _types(table: pa.Table) -> dict[str, str]:
    return {column.name: str(column.type) for column in table.schema}


def _tensors(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file, with digests instead of offsets."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry.pop("data_offsets")
            entry["sha256"] = hashlib.sha256(body[begin:end]).hexdigest()[:12]
    return header


def _in_text(first: str, second: str) -> Iterator[str]:
    lines = unified_diff(first.splitlines(), second.splitlines(), lineterm="", n=0)
    for line in islice(lines, 2, None):
        yield line if len(line) <= WIDTH else f"{line[:WIDTH]}…"
