"""What went wrong with images, by cause: what a person has to know when too many failed."""

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.compute as pc

from unet_core.metrics import Totals
from unet_core.parts import metrics_name
from unet_core.run import READ_THREADS, Run

MOST_CAUSES = 5
MOST_EXAMPLES = 3


@dataclass(frozen=True)
class Example:
    """One failed image."""

    image_id: str
    message: str


@dataclass(frozen=True)
class Cause:
    """Images that failed with one error code."""

    code: str
    images: int
    examples: tuple[Example, ...]


def causes(run: Run, totals: Totals) -> list[Cause]:
    """The most frequent causes with examples; reads parts until it has them."""
    counts = {code: n for code, n in totals.errors.items() if code != "truth"}
    codes = sorted(counts, key=lambda code: (-counts[code], code))[:MOST_CAUSES]
    wanted = {code: min(counts[code], MOST_EXAMPLES) for code in codes}
    found: dict[str, list[Example]] = defaultdict(list)
    for code, example in _failed(run):
        if len(found[code]) < wanted.get(code, 0):
            found[code].append(example)
        if all(len(found[code]) == n for code, n in wanted.items()):
            break
    return [Cause(code, counts[code], tuple(found[code])) for code in codes]


def _failed(run: Run) -> Iterator[tuple[str, Example]]:
    """Code and image of every failed row, part by part."""
    ids = sorted(run.committed())
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for at in range(0, len(ids), READ_THREADS):
            for rows in pool.map(lambda name: _rows(run, name), ids[at : at + READ_THREADS]):
                yield from rows


def _rows(run: Run, shard_id: str) -> list[tuple[str, Example]]:
    columns = ["image_id", "status", "error_code", "error_message"]
    with run.store.open_parquet(metrics_name(shard_id)) as file:
        rows = file.read(columns=columns).filter(pc.field("status") == "failed").to_pylist()
    return [(row["error_code"], Example(row["image_id"], row["error_message"])) for row in rows]
