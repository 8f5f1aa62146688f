"""What went wrong with images, by cause: what a person has to know when too many failed."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow.compute as pc

from unet_core.ordered import side_by_side
from unet_core.runs.parts import read_columns
from unet_core.runs.run import Run
from unet_core.scores.metrics import Totals

MOST_CAUSES = 5
MOST_EXAMPLES = 3


@dataclass(frozen=True)
class Cause:
    """Images that failed with one error code."""

    code: str
    images: int
    examples: tuple[tuple[str, str], ...]
    """Image ids, and what was wrong."""


def causes(run: Run, totals: Totals) -> list[Cause]:
    """The most frequent causes with examples; reads parts until it has them."""
    counts = {code: n for code, n in totals.errors.items() if code != "truth"}
    codes = sorted(counts, key=lambda code: (-counts[code], code))[:MOST_CAUSES]
    wanted = {code: min(counts[code], MOST_EXAMPLES) for code in codes}
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)

    def failed(shard_id: str) -> list[dict[str, Any]]:
        columns = ("image_id", "status", "error_code", "error_message")
        rows = read_columns(run.store, shard_id, *columns)
        return [*rows.filter(pc.field("status") == "failed").to_pylist()]

    for row in chain.from_iterable(side_by_side(failed, sorted(run.committed()))):
        code = row["error_code"]
        if len(found[code]) < wanted.get(code, 0):
            found[code].append((row["image_id"], row["error_message"]))
        if all(len(found[code]) == n for code, n in wanted.items()):
            break
    return [Cause(code, counts[code], tuple(found[code])) for code in codes]
