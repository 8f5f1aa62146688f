"""Checks of a run folder: digests, footers and sums of every part; ``deep`` also counts the input
and the masks again.
"""

import hashlib
import io
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_core.concurrency import map_in_order
from unet_core.config.sections import StorageConfig
from unet_core.errors import StoreError, one_line
from unet_core.inputs.formats import FORMATS
from unet_core.inputs.shards import Shard, Source
from unet_core.metrics import Totals
from unet_core.runs.manifest import with_members
from unet_core.runs.parts import list_shard_ids, masks_name, read_metrics
from unet_core.runs.reader import OpenMasks, open_run
from unet_core.runs.run import Record, Run
from unet_core.runs.schema import nodata_id
from unet_core.storage.store import is_temporary


@dataclass
class Findings:
    """Result of ``verify``."""

    shards: int = 0
    committed: int = 0
    totals: Totals = field(default_factory=Totals)
    class_names: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Facts that are worth knowing and no problem."""


def verify(uri: str, deep: bool = False, storage: StorageConfig | None = None) -> Findings:
    """Check digests, footers, rows against windows, reconciliation and orphans of a run.

    Raises StoreError if there is no run at ``uri``.
    """
    results = open_run(uri, storage)
    run, record = results.run, results.record
    source = results.source if deep else None
    shards = run.manifest()
    if shards is None:
        return Findings(notes=["the run has no manifest yet; run predict again"])
    committed = run.committed()
    findings = Findings(len(shards), len(committed), class_names=record.class_names)
    expected = {shard.shard_id for shard in shards}
    _check_orphans(run, expected, committed, findings)
    images = []
    there = (shard for shard in shards if shard.shard_id in committed)
    check = partial(_check_shard, run, record, source)
    # four parts at once: each is in memory as a whole
    for totals, ids, problems in map_in_order(check, there, 4):
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
    if source is not None:
        _check_input_unchanged(source, shards, run, findings)
    _check_success(run, expected - committed, findings)
    return findings


def _check_input_unchanged(
    source: Source, shards: list[Shard], run: Run, findings: Findings
) -> None:
    """Note what was rewritten or deleted below the root of the input since the run began."""
    known: dict[str, str | None] = {}
    for shard in shards:
        members = with_members(run.store, shard).members
        known.update((m.key, m.etag) for m in members if m.uri is None)
        if shard.uri:
            known[shard.uri] = shard.etag
    there = {entry.name: entry.etag for entry in source.root.list()} if known else {}
    gone = sum(name not in there for name in known)
    changed = sum(there.get(name, etag) != etag for name, etag in known.items())
    if gone or changed:
        findings.notes.append(
            f"the input changed since the run began: {changed} objects rewritten, {gone} deleted"
        )


def _check_orphans(run: Run, expected: set[str], committed: set[str], findings: Findings) -> None:
    found = {"metrics": committed, "masks": list_shard_ids(run.store, "masks") - committed}
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
    run: Run, record: Record, source: Source | None, shard: Shard
) -> tuple[Totals, pa.Array, list[str]]:
    """Check one committed shard: the sums of its rows, the ids of its ok images, and problems."""
    name = shard.shard_id
    try:
        rows, footer = read_metrics(run.store, name)
        masks_bytes = run.store.read(masks_name(name))
    except StoreError as error:
        return Totals(), pa.array([], pa.string()), [f"shard {name}: {error}"]
    problems = []
    ok = rows.filter(pc.field("status") == "ok")
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
        file = pq.ParquetFile(io.BytesIO(masks_bytes))
        problems += _check_windows(ok, file.read(columns=["image_id", "height", "width"]))
        if source is not None:
            problems += _recount_masks(ok, OpenMasks(file, run.store.uri(masks_name(name))))
    if source is not None:
        problems += _recount_input(source, with_members(run.store, shard), rows)
    return (
        totals,
        ok["image_id"].combine_chunks(),
        [f"shard {name}: {problem}" for problem in problems],
    )


def _check_windows(ok: pa.Table, windows: pa.Table) -> list[str]:
    """Every ok row's mask windows cover its image, and no other image has any."""
    area: Counter[str] = Counter()
    for window in windows.to_pylist():
        area[window["image_id"]] += window["height"] * window["width"]
    problems = []
    for row in ok.to_pylist():
        pixels = row["height"] * row["width"]
        if area.pop(row["image_id"], 0) != pixels:
            problems.append(f"image {row['image_id']}: its mask windows do not cover it")
        if sum(_counts(row).values()) != pixels:
            problems.append(f"image {row['image_id']}: class_pixels do not sum to its valid pixels")
    return problems + [f"image {image_id} has a mask but no ok row" for image_id in area]


def _counts(row: dict[str, Any]) -> Counter[int]:
    """Count the pixels of each class id, with the reserved one, as a metrics row says."""
    counts, classes = dict(enumerate(row["class_pixels"])), len(row["class_pixels"])
    return Counter({**counts, nodata_id(classes): row.get("invalid_pixels") or 0})


def _recount_masks(ok: pa.Table, masks: OpenMasks) -> list[str]:
    """Count the classes of every mask again, from its bytes."""
    problems = []
    for row in ok.to_pylist():
        mask, counted = masks.mask(row["image_id"]), Counter[int]()
        for read in mask.windows.values() if mask is not None else ():
            counted.update(dict(enumerate(np.bincount(read().ravel()).tolist())))
        if counted != _counts(row):
            problems.append(f"image {row['image_id']}: class_pixels are not those of its mask")
    return problems


def _recount_input(source: Source, shard: Shard, rows: pa.Table) -> list[str]:
    """Count a shard's images again, from the input itself."""
    recount = FORMATS[source.format].recount
    if recount is None:
        return []  # row ranges: the count in the manifest is that of the footer
    there = Counter(recount(source, shard))
    mine = Counter(row["image_id"] for row in rows.to_pylist() if row["error_code"] != "tar")
    if source.config.pages == "expand":
        there = Counter({*there})
        mine = Counter({i if i in there else re.sub(r"#\d+$", "", i) for i in mine})
    problems = [f"{name} is in the input but has no row" for name in sorted(there - mine)]
    return problems + [f"{name} has a row but is not in the input" for name in sorted(mine - there)]


def _check_success(run: Run, missing: set[str], findings: Findings) -> None:
    if not run.is_finished:
        left = (
            f"{len(missing)} shards are not committed"
            if missing
            else "all shards are committed, but perhaps too many images failed; predict says it"
        )
        findings.notes.append(f"not finished: {left}")
        return
    findings.problems += [f"finished, but shard {s} is not committed" for s in sorted(missing)]
    try:
        claimed = run.finished_totals()
    except ValueError as error:
        findings.problems.append(f"_SUCCESS cannot be read: {one_line(error)}")
    else:
        if claimed != findings.totals:
            findings.problems.append("the totals in _SUCCESS are not the sums of the metrics parts")
