"""Failed images by cause, with examples: shown when too many failed."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

import pyarrow.compute as pc

from unet_core.metrics import Totals
from unet_core.runs.compact import batches
from unet_core.runs.run import Run

MOST_CAUSES = 5
"""Causes shown: few have more, and all fit on a screen."""
MOST_EXAMPLES = 3
"""Examples shown of each cause."""


@dataclass(frozen=True)
class Cause:
    """Images that failed with one error code."""

    code: str
    images: int
    examples: tuple[tuple[str, str], ...]
    """Image ids and error messages."""


def causes(run: Run, totals: Totals) -> list[Cause]:
    """Find the most frequent causes with examples; reads rows until it has them."""
    counts = {code: n for code, n in totals.errors.items() if code != "truth"}
    codes = sorted(counts, key=lambda code: (-counts[code], code))[:MOST_CAUSES]
    wanted = {code: min(counts[code], MOST_EXAMPLES) for code in codes}
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    tables = batches(run.store, ["image_id", "status", "error_code", "error_message"])
    failed = (table.filter(pc.field("status") == "failed") for table in tables)
    for row in chain.from_iterable(table.to_pylist() for table in failed):
        code = row["error_code"]
        if len(found[code]) < wanted.get(code, 0):
            found[code].append((row["image_id"], row["error_message"]))
        if all(len(found[code]) == n for code, n in wanted.items()):
            break
    return [Cause(code, counts[code], tuple(found[code])) for code in codes]
