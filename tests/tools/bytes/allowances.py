"""What may differ between two executions, why, and how the rest of such a file is compared."""

import io
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pyarrow.parquet as pq

Normalise = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Allowance:
    """Files whose bytes may differ; what ``normalised`` makes of them may not."""

    glob: str
    reason: str
    normalised: Normalise

    def matches(self, name: str) -> bool:
        """Whether it is about a file."""
        return fnmatchcase(name, self.glob)


def nothing(data: bytes) -> bytes:
    """Compare nothing but that the file is there."""
    return b""


def without(*patterns: str) -> Normalise:
    """Compare all but what these expressions match, or the groups in them if they have some."""
    found = [re.compile(pattern, re.DOTALL | re.MULTILINE) for pattern in patterns]

    def normalised(data: bytes) -> bytes:
        text = data.decode("utf-8", "backslashreplace")
        for pattern in found:
            text = pattern.sub(_blank, text)
        return text.encode()

    return normalised


def _blank(found: re.Match[str]) -> str:
    text, start = found[0], found.start()
    for group in range(len(found.groups()), 0, -1):
        if found[group] is not None:
            begin, end = (at - start for at in found.span(group))
            text = f"{text[:begin]}*{text[end:]}"
    return text if found.groups() else ""


def without_columns(pattern: str, key: str) -> Normalise:
    """Compare the rows of a Parquet file in the order of ``key``, without columns that match."""

    def normalised(data: bytes) -> bytes:
        table = pq.ParquetFile(io.BytesIO(data)).read(use_threads=False)
        dropped = [name for name in table.schema.names if re.fullmatch(pattern, name)]
        rows = table.drop_columns(dropped).sort_by(key).to_pylist()
        return repr([table.schema.to_string(), rows]).encode()

    return normalised


def without_metadata(*keys: str) -> Normalise:
    """Compare the rows, row groups, types and metadata of a Parquet file, but these keys of it."""

    def normalised(data: bytes) -> bytes:
        file = pq.ParquetFile(io.BytesIO(data))
        table, groups = file.read(use_threads=False), range(file.metadata.num_row_groups)
        metadata = dict(table.schema.metadata or {})
        for key in keys:
            metadata.pop(key.encode(), None)
        cut = [file.metadata.row_group(number).num_rows for number in groups]
        types = table.schema.remove_metadata().to_string()
        return repr([types, list(metadata.items()), cut, table.to_pylist()]).encode()

    return normalised


def sorted_header(data: bytes) -> bytes:
    """Compare a safetensors file with its header in the order of its keys."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    return json.dumps(header, sort_keys=True).encode() + data[8 + length :]


SAID = (
    r"^[a-z ]+: [^\n]*(?:images|crops)/s[^\n]*\n",
    r"^epoch [^\n]*?  ([\d.–]+ (?:images|crops)/s, \d+% waiting for data  [\d.]+ s)",
    r"^device: +([^\n]*)$",
    r'^ "seconds": \{(.*?)^ \}',
    r"^(?:WARNING|ERROR) (\S+) ",
)
ALLOWED = (
    Allowance(
        "*/timings/*.parquet",
        "seconds and instants of attempts, and their order: the other columns are compared",
        without_columns(r".*_s|finished", key="shard_id"),
    ),
    Allowance(
        "*/metrics.parquet",
        "`parts`, a digest in which the times of files count: all else is compared",
        without_metadata("parts"),
    ),
    Allowance(
        "*.safetensors",
        "safetensors writes the keys of its metadata in a random order: they are compared sorted",
        sorted_header,
    ),
    Allowance(
        "*/report.html",
        "when it was written, and the times, rates and shares of the section Time",
        without(
            r"<p>Written ([^<]*) UTC by",
            r"<dt>Images/s</dt><dd>(.*?)</dd>",
            r"<dt>At work</dt><dd>([^<]*)<",
            r'<h2 id="time">Time</h2>\n<p>(.*?)</p>',
            r"<figcaption>Images per second(.*?)</figure>",
            r"<figcaption>What the devices did(.*?)</figure>",
            r"<td>[\d,]+</td><td>[\d,]+</td>((?:<td>[\d.]+ %</td>){4})</tr>",
        ),
    ),
    Allowance(
        "*/said/*.txt",
        "progress lines, rates and seconds; the name of the module that warns",
        without(*SAID),
    ),
    Allowance(
        "*/said/*.txt",
        "a process that aborted at its end, its work done: a thread of a library outlived it",
        without(*SAID, r"\Aexit code (0|-6)$", r"^terminate called without an active exception\n"),
    ),
    Allowance("tmp/*/.ses", "the session of onnxruntime's telemetry", nothing),
)
"""What differs between two executions of one tree, and nothing else."""

RENAMED = {r"timings/\d{8}T\d{6}[0-9a-f]{6}-(\d+\.parquet)$": r"timings/*-\1"}
"""Names with an instant or a random part, and what they are compared as."""


def stable_name(name: str) -> str:
    """A file's name without what is another one in each execution."""
    for pattern, replacement in RENAMED.items():
        name = re.sub(pattern, replacement, name)
    return name


def given(texts: list[str]) -> tuple[Allowance, ...]:
    """Allowances of one comparison, each as ``GLOB=REASON``; raises ValueError without a reason."""
    found = []
    for text in texts:
        glob, _, reason = text.partition("=")
        if not glob or not reason:
            raise ValueError(f"--allow {text}: write GLOB=REASON")
        found.append(Allowance(glob, reason, nothing))
    return tuple(found)
