"""What went wrong with images, by cause: what a person has to know when too many failed."""

import functools
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

import pyarrow.compute as pc

from unet_core.metrics import Totals
from unet_core.ordered import side_by_side
from unet_core.parts import read_columns
from unet_core.run import Run

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
    for row in chain.from_iterable(
        side_by_side(functools.partial(_failed, run), sorted(run.committed()))
    ):
        code = row["error_code"]
        if len(found[code]) < wanted.get(code, 0):
            found[code].append(Example(row["image_id"], row["error_message"]))
        if all(len(found[code]) == n for code, n in wanted.items()):
            break
    return [Cause(code, counts[code], tuple(found[code])) for code in codes]


def _failed(run: Run, shard_id: str) -> list[dict[str, str]]:
    columns = ("image_id", "status", "error_code", "error_message")
    rows = read_columns(run.store, shard_id, *columns)
    failed: list[dict[str, str]] = rows.filter(pc.field("status") == "failed").to_pylist()
    return failed
