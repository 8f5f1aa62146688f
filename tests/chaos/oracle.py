"""Is every image accounted for exactly once, with the bytes of an undisturbed run?

Reads run folders with nothing of the product: Parquet, JSON, digests.
"""

import hashlib
import io
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CIRCUMSTANTIAL = {
    "worker_died", "timeout", "out_of_memory", "changed", "missing", "archived", "forbidden",
}  # fmt: skip
"""Error codes that an undisturbed run does not have."""
LAST_BITS = 64
"""Of a sum of round(p · 65535) over an image."""
KINDS = ("lost", "duplicated", "differing", "unaccounted", "orphaned", "uncovered")

MANIFEST = "manifest/00000.parquet"

Findings = dict[str, list[str]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A Parquet file of a run."""

    name: str
    data: bytes

    @property
    def table(self) -> pa.Table:
        return pq.read_table(io.BytesIO(self.data))

    @property
    def rows(self) -> list[Row]:
        return self.table.to_pylist()

    @property
    def footer(self) -> dict[str, str]:
        metadata = self.table.schema.metadata or {}
        return {key.decode(): value.decode() for key, value in metadata.items()}


def parts(run: Path, folder: str) -> dict[str, Part]:
    """By shard id."""
    return {
        path.stem: Part(f"{folder}/{path.name}", path.read_bytes())
        for path in sorted((run / folder).glob("[!_]*.parquet"))
    }


def examine(
    run: Path, undisturbed: Path, expected: list[tuple[str, str]], may_be_hit: dict[str, str]
) -> Findings:
    """What is wrong with a finished run.

    ``expected``: id and error code (or nothing) of each row that there must be.
    ``may_be_hit``: images that may have failed by mishap instead, with the code that is right.
    """
    found: Findings = {kind: [] for kind in KINDS}
    metrics, masks = parts(run, "metrics"), parts(run, "masks")
    try:
        planned = {row["shard_id"] for row in pq.read_table(run / MANIFEST).to_pylist()}
        rows = {shard: part.rows for shard, part in metrics.items()}
        windows = {shard: part.rows for shard, part in masks.items()}
    except (pa.ArrowException, OSError) as error:
        found["orphaned"].append(f"a part or the manifest cannot be read: {error}")
        return found
    _rows(rows, expected, may_be_hit, found)
    _bytes(run, undisturbed, rows, found)
    _counts(run, metrics, rows, found)
    _orphans(run, planned, metrics, masks, found)
    for shard, of_shard in rows.items():
        _windows(shard, of_shard, windows.get(shard, []), found)
    return found


def _rows(
    rows: dict[str, list[Row]],
    expected: list[tuple[str, str]],
    may_be_hit: dict[str, str],
    found: Findings,
) -> None:
    """Each expected image has its row, no image has another, and each says what it must."""
    there, wanted = Counter(), Counter(expected)
    shards: dict[str, set[str]] = defaultdict(set)
    for shard, of_shard in rows.items():
        for row in of_shard:
            name, code = row["image_id"], row["error_code"] or ""
            shards[name].add(shard)
            if code and code == may_be_hit.get(name):
                code = next((c for n, c in wanted if n == name), "")
            there[name, code] += 1
    names_there, names_wanted = Counter(), Counter()
    for (name, _), count in there.items():
        names_there[name] += count
    for (name, _), count in wanted.items():
        names_wanted[name] += count
    found["lost"] += sorted((names_wanted - names_there).elements())
    found["duplicated"] += sorted((names_there - names_wanted).elements())
    found["duplicated"] += [f"{n} in {len(s)} shards" for n, s in shards.items() if len(s) > 1]
    for (name, code), count in (there - wanted).items():
        if names_there[name] == names_wanted[name]:
            found["differing"].append(f"{count} rows of {name} say {code or 'ok'}")


def _bytes(run: Path, undisturbed: Path, rows: dict[str, list[Row]], found: Findings) -> None:
    """Parts are those of the undisturbed run; where a row tells of a mishap, the other rows are."""
    hit = {
        shard
        for shard, of_shard in rows.items()
        if any(row["error_code"] in CIRCUMSTANTIAL for row in of_shard)
    }
    for folder in ("metrics", "masks"):
        mine, theirs = parts(run, folder), parts(undisturbed, folder)
        for shard in sorted(mine.keys() ^ theirs.keys()):
            found["differing"].append(f"{folder}/{shard} is in one run only")
        for shard in sorted(mine.keys() & theirs.keys()):
            if mine[shard].data == theirs[shard].data:
                continue
            if shard in hit:
                found["differing"] += _other_rows(mine[shard], theirs[shard], rows[shard])
            else:
                found["differing"].append(f"{mine[shard].name} has other bytes")
    for name in (MANIFEST, "run.json"):
        mine, theirs = _content(run / name), _content(undisturbed / name)
        if mine != theirs:
            found["differing"].append(f"{name} says something else")


def _other_rows(mine: Part, theirs: Part, rows: list[Row]) -> list[str]:
    """Images whose rows differ, beside those that failed by mishap."""
    hit = {row["image_id"] for row in rows if row["error_code"] in CIRCUMSTANTIAL}
    kept = [[row for row in part.rows if row["image_id"] not in hit] for part in (mine, theirs)]
    for ours, other in zip(*kept, strict=False):  # batches are composed otherwise: last bits differ
        sums = ours.get("confidence_sum"), other.get("confidence_sum")
        if None not in sums and abs(sums[0] - sums[1]) <= LAST_BITS:
            ours["confidence_sum"] = other["confidence_sum"]
    if kept[0] == kept[1] and mine.footer.keys() == theirs.footer.keys():
        return []
    return [f"{mine.name}: rows beside {', '.join(sorted(hit))} differ"]


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        record = json.loads(path.read_text())
        return {key: record[key] for key in ("fingerprint", "identity", "compute")}
    return pq.read_table(path).to_pylist()


def _counts(
    run: Path, metrics: dict[str, Part], rows: dict[str, list[Row]], found: Findings
) -> None:
    """Images seen are rows, for every shard and for the run."""
    total: Counter[str] = Counter()
    for shard, of_shard in rows.items():
        ok = sum(row["status"] == "ok" for row in of_shard)
        failed = sum(row["status"] == "failed" for row in of_shard)
        seen = int(metrics[shard].footer["images_seen"])
        if seen != ok + failed or len(of_shard) != seen:
            found["unaccounted"].append(f"{shard}: {seen} seen, {ok} ok, {failed} failed")
        pixels = sum(row["height"] * row["width"] for row in of_shard if row["status"] == "ok")
        total.update(shards=1, images_seen=seen, ok=ok, failed=failed, pixels=pixels)
    try:
        claimed = json.loads((run / "_SUCCESS").read_text())
    except (FileNotFoundError, ValueError) as error:
        found["unaccounted"].append(f"_SUCCESS cannot be read: {error}")
        return
    for what, count in total.items():
        if claimed.get(what) != count:
            said = f"_SUCCESS says {claimed.get(what)} {what}, there are {count}"
            found["unaccounted"].append(said)


def _orphans(
    run: Path,
    planned: set[str],
    metrics: dict[str, Part],
    masks: dict[str, Part],
    found: Findings,
) -> None:
    """Nothing without its counterpart, and nothing that was left behind."""
    for shard in sorted(metrics.keys() | masks.keys() | planned):
        if shard not in planned:
            found["orphaned"].append(f"{shard} is not in the manifest")
        elif shard not in metrics:
            found["orphaned"].append(f"{shard} has no commit")
        elif shard not in masks:
            found["orphaned"].append(f"{shard} has a commit and no masks")
        else:
            claimed = metrics[shard].footer["masks_sha256"]
            if hashlib.sha256(masks[shard].data).hexdigest() != claimed:
                found["orphaned"].append(f"masks/{shard} has another SHA-256 than its commit says")
    left = [path for path in run.rglob("_*") if path.name != "_SUCCESS"]
    found["orphaned"] += [f"{path.relative_to(run)} was left behind" for path in sorted(left)]


def _windows(shard: str, rows: list[Row], windows: list[Row], found: Findings) -> None:
    """The mask windows of an image tile it without gap or overlap, and count what its row says."""
    by_image: dict[str, list[Row]] = defaultdict(list)
    for window in windows:
        by_image[window["image_id"]].append(window)
    ok = {row["image_id"]: row for row in rows if row["status"] == "ok"}
    for name in sorted(by_image.keys() ^ ok.keys()):
        found["uncovered"].append(f"{shard}: {name} has a mask or an ok row, not both")
    for name in sorted(by_image.keys() & ok.keys()):
        row, of_image = ok[name], by_image[name]
        sizes = [window["height"] * window["width"] for window in of_image]
        pixels = [
            sum(window["mask"].count(bytes([value])) for window in of_image)
            for value in range(len(row["class_pixels"]))
        ]
        if (
            sum(sizes) != row["height"] * row["width"]
            or not all(_is_inside(window, row) for window in of_image)
            or any(_overlap(a, b) for n, a in enumerate(of_image) for b in of_image[:n])
            or sizes != [len(window["mask"]) for window in of_image]
            or pixels != row["class_pixels"]
        ):
            found["uncovered"].append(f"{shard}: the mask of {name} does not fit its row")


def _is_inside(window: Row, row: Row) -> bool:
    return (
        (window["image_height"], window["image_width"]) == (row["height"], row["width"])
        and min(window["y"], window["x"]) >= 0
        and window["y"] + window["height"] <= row["height"]
        and window["x"] + window["width"] <= row["width"]
    )


def _overlap(a: Row, b: Row) -> bool:
    return (
        a["y"] < b["y"] + b["height"] and b["y"] < a["y"] + a["height"]
        and a["x"] < b["x"] + b["width"] and b["x"] < a["x"] + a["width"]
    )  # fmt: skip
