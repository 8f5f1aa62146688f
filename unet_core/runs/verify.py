"""Does a run folder hold what it claims? Reads every part; ``deep`` also recounts the input and the
masks with code that shares nothing with the writing side.
"""

import gzip
import hashlib
import io
import os
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from unet_core.concurrency import map_in_order
from unet_core.config.sections import StorageConfig
from unet_core.errors import StoreError, one_line
from unet_core.images.codec import is_image
from unet_core.inputs.shards import Shard, readable_name
from unet_core.inputs.webdataset import MASK_WORDS
from unet_core.metrics import Totals
from unet_core.runs.manifest import with_members
from unet_core.runs.parts import ids_in, masks_name, read_metrics
from unet_core.runs.run import Record, Run, open_existing
from unet_core.storage.parquet_files import table_of
from unet_core.storage.store import Store, is_temporary

PARTS_AT_ONCE = 4
"""Each is in memory as a whole."""


@dataclass
class Findings:
    """What ``verify`` saw."""

    shards: int = 0
    committed: int = 0
    totals: Totals = field(default_factory=Totals)
    class_names: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is not wrong, but worth knowing."""


def verify(uri: str, deep: bool = False, storage: StorageConfig | None = None) -> Findings:
    """Check digests, footers, rows against windows, reconciliation and orphans of a run.

    Raises StoreError if there is no run at ``uri``.
    """
    run, record = open_existing(uri, storage)
    shards = run.manifest()
    if shards is None:
        return Findings(notes=["the run has no manifest yet; run predict again"])
    committed = run.committed()
    findings = Findings(len(shards), len(committed), class_names=record.class_names)
    expected = {shard.shard_id for shard in shards}
    _check_orphans(run, expected, committed, findings)
    images = []
    there = (shard for shard in shards if shard.shard_id in committed)
    check = partial(_check_shard, run, record, deep)
    for totals, ids, problems in map_in_order(check, there, PARTS_AT_ONCE):
        findings.totals += totals
        findings.problems += problems
        images.append(ids)
    if findings.problems:
        findings.notes.append(
            "a shard whose commit, metrics/<shard>.parquet, is removed is done again by predict"
        )
    counts = pa.table({"id": pa.chunked_array(images, pa.string())}).group_by("id")
    twice = counts.aggregate([([], "count_all")]).filter(pc.field("count_all") > 1)
    findings.problems += [f"image {i} has ok rows in two shards" for i in twice["id"].to_pylist()]
    if deep:
        _check_input_unchanged(record, shards, run, findings)
    _check_success(run, expected - committed, findings)
    return findings


def _check_input_unchanged(
    record: Record, shards: list[Shard], run: Run, findings: Findings
) -> None:
    """Note what was rewritten or deleted in the input since the run began."""
    if record.identity["input.format"] not in ("folder", "webdataset"):
        return
    known: dict[str, str | None] = {}
    for shard in shards:
        known.update((m.key, m.etag) for m in with_members(run.store, shard).members)
        if shard.uri:
            known[shard.uri] = shard.etag
    entries = Store(record.identity["input.uri"], run.store.storage).list()
    there = {entry.name: entry.etag for entry in entries}
    gone = sum(name not in there for name in known)
    changed = sum(there.get(name, etag) != etag for name, etag in known.items())
    if gone or changed:
        findings.notes.append(
            f"the input changed since the run began: {changed} objects rewritten, {gone} deleted"
        )


def _check_orphans(run: Run, expected: set[str], committed: set[str], findings: Findings) -> None:
    found = {"metrics": committed, "masks": ids_in(run.store, "masks") - committed}
    findings.problems += [
        f"{folder}/{shard_id}.parquet belongs to no shard of the manifest"
        for folder, ids in found.items()
        for shard_id in sorted(ids - expected)
    ]
    if waiting := len(found["masks"] & expected):
        findings.notes.append(f"{waiting} masks parts without a commit; predict will redo them")
    if leftovers := sum(is_temporary(entry.name) for entry in run.store.list()):
        findings.notes.append(f"{leftovers} temporary files of killed attempts")


def _check_shard(
    run: Run, record: Record, deep: bool, shard: Shard
) -> tuple[Totals, pa.Array, list[str]]:
    """Of one committed shard: what its rows add up to, the ids of its ok images, and problems."""
    name = shard.shard_id
    try:
        rows, footer = read_metrics(run.store, name)
        masks_bytes = run.store.read(masks_name(name))
    except StoreError as error:
        return Totals(), pa.array([], pa.string()), [f"shard {name}: {error}"]
    problems = []
    seen = int(footer.get("images_seen", -1))
    totals = Totals.of_rows(rows, seen)
    if footer.get("fingerprint") != record.fingerprint:
        problems.append("metrics part has the fingerprint of another run")
    if not totals.is_reconciled:
        problems.append(f"{seen} images seen, but {totals.ok} ok + {totals.failed} failed rows")
    has_pages = record.identity["input.pages"] == "expand"
    if shard.count is not None and shard.count != seen and not has_pages:
        problems.append(f"the manifest has {shard.count} images, the commit {seen}")
    if hashlib.sha256(masks_bytes).hexdigest() != footer.get("masks_sha256"):
        problems.append("masks part has another SHA-256 than its commit says")
    else:
        windows = table_of(masks_bytes)
        problems += _check_windows(rows, windows)
        if deep:
            problems += _recount_masks(rows, windows)
    if deep:
        problems += _recount_input(record, with_members(run.store, shard), rows, run.store.storage)
    ids = rows.filter(pc.field("status") == "ok")["image_id"].combine_chunks()
    return totals, ids, [f"shard {name}: {problem}" for problem in problems]


def _ok(rows: pa.Table) -> list[dict[str, Any]]:
    return [row for row in rows.to_pylist() if row["status"] == "ok"]


def _check_windows(rows: pa.Table, windows: pa.Table) -> list[str]:
    """Every ok row's mask windows cover its image, and no other image has any."""
    area: Counter[str] = Counter()
    for window in windows.select(["image_id", "height", "width"]).to_pylist():
        area[window["image_id"]] += window["height"] * window["width"]
    problems = []
    for row in _ok(rows):
        pixels = row["height"] * row["width"]
        if area.pop(row["image_id"], 0) != pixels:
            problems.append(f"image {row['image_id']}: its mask windows do not cover it")
        if sum(row["class_pixels"]) != pixels:
            problems.append(f"image {row['image_id']}: class_pixels do not sum to its pixels")
    return problems + [f"image {image_id} has a mask but no ok row" for image_id in area]


def _recount_masks(rows: pa.Table, windows: pa.Table) -> list[str]:
    """Count the classes of every mask again, from its bytes."""
    counted: dict[str, Counter[int]] = defaultdict(Counter)
    for window in windows.to_pylist():
        counts = np.bincount(_decode_window(window).ravel())
        counted[window["image_id"]].update(dict(enumerate(counts.tolist())))
    return [
        f"image {row['image_id']}: class_pixels are not those of its mask"
        for row in _ok(rows)
        if counted[row["image_id"]] != Counter(dict(enumerate(row["class_pixels"])))
    ]


def _decode_window(window: dict[str, Any]) -> Any:
    shape = (window["height"], window["width"])
    if window["encoding"] == "png":
        return np.asarray(Image.open(io.BytesIO(window["mask"]["bytes"])))
    dtype = np.uint8 if len(window["mask"]) == shape[0] * shape[1] else np.dtype("<u2")
    return np.frombuffer(window["mask"], dtype=dtype).reshape(shape)


def _recount_input(
    record: Record, shard: Shard, rows: pa.Table, storage: StorageConfig
) -> list[str]:
    """Count a shard's images again, from the input itself."""
    if record.identity["input.format"] == "webdataset":
        root = Store(record.identity["input.uri"], storage)
        there = Counter(_names_in_tar(root, shard, record.identity["input.masks"]))
    elif shard.has_members:
        there = Counter(member.key for member in shard.members)
    else:
        return []  # row ranges: the count in the manifest is that of the footer
    mine = Counter(row["image_id"] for row in rows.to_pylist() if row["error_code"] != "tar")
    if record.identity["input.pages"] == "expand":
        there = Counter({*there})
        mine = Counter({i if i in there else re.sub(r"#\d+$", "", i) for i in mine})
    problems = [f"{name} is in the input but has no row" for name in sorted(there - mine)]
    return problems + [f"{name} has a row but is not in the input" for name in sorted(mine - there)]


def _names_in_tar(root: Store, shard: Shard, masks: str) -> Iterator[str]:
    """Image ids of a tar by its headers alone, one block after the other."""
    suffix = masks.lstrip(".")
    try:
        with root.open(shard.uri) as stream:
            is_packed = cast(io.BufferedReader, stream).peek(2)[:2] == b"\x1f\x8b"
            plain = gzip.GzipFile(fileobj=stream) if is_packed else stream
            names = list(_headers(cast(BinaryIO, plain)))
    except StoreError:
        return  # gone: all its rows will be told
    for name in names:
        stem, _ = os.path.splitext(name)
        is_hidden = re.search(r"(^|/)\.(?!\.?(/|$))", name)  # not of "." and ".." themselves
        is_mask = bool(suffix) and name.endswith(f".{suffix}")
        is_mask |= os.path.splitext(stem)[1].lstrip(".") in MASK_WORDS
        if is_image(name) and not is_hidden and not is_mask:
            yield f"{shard.uri}/{stem}"


def _headers(stream: BinaryIO) -> Iterator[str]:
    """Names of the members whose content is whole; long names (GNU and pax) included."""
    long_name = None
    try:
        while len(block := stream.read(512)) == 512:
            if not _is_header(block):
                continue
            size, kind = int(tarfile.nti(block[124:136])), block[156:157]  # type: ignore[attr-defined]  # missing from the stubs
            told = stream.read(max(size, 0)) if kind in (b"L", b"x") else b""
            if not _skip(stream, size - len(told), -size % 512):
                return
            if kind == b"L":
                long_name = told.rstrip(b"\0")
            elif kind == b"x":
                found = re.search(rb"\d+ path=([^\n]*)\n", told)
                long_name = found.group(1) if found else long_name
            elif kind not in (b"K", b"g"):
                if kind != b"5":
                    name = (long_name or _short_name(block)).decode("utf-8", "surrogateescape")
                    yield readable_name(name.removeprefix("./"))
                long_name = None
    except (tarfile.HeaderError, OSError, EOFError, zlib.error):
        return  # cut short or damaged: its own failed row says so


def _short_name(block: bytes) -> bytes:
    prefix = block[345:500].rstrip(b"\0") if block[257:263] == b"ustar\0" else b""
    plain = block[:100].partition(b"\0")[0]
    return prefix + b"/" + plain if prefix else plain


def _skip(stream: BinaryIO, size: int, padding: int) -> bool:
    """Pass over what is left of a member's content, and its padding; whether it is whole."""
    for left in range(size, 0, -(2**20)):
        if len(stream.read(min(left, 2**20))) < min(left, 2**20):
            return False
    stream.read(padding)
    return size >= 0


def _is_header(block: bytes) -> bool:
    """Whether a block's checksum is right."""
    try:
        claimed = int(block[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    return claimed == sum(block[:148]) + 8 * 32 + sum(block[156:])


def _check_success(run: Run, missing: set[str], findings: Findings) -> None:
    if not run.is_finished:
        left = f"{len(missing)} shards are not committed"
        if not missing:
            left = "all shards are committed, but perhaps too many images failed; predict says it"
        findings.notes.append(f"not finished: {left}")
        return
    findings.problems += [f"finished, but shard {s} is not committed" for s in sorted(missing)]
    try:
        claimed = run.finished_totals()
    except ValueError as error:
        findings.problems.append(f"_SUCCESS cannot be read: {one_line(error)}")
        return
    if claimed != findings.totals:
        findings.problems.append("the totals in _SUCCESS are not the sums of the metrics parts")
