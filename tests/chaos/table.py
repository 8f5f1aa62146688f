"""The table: a row for each cell, and below it every finding with the command that repeats it."""

import statistics
from collections.abc import Iterator

from tests.chaos.cells import KINDS, Cell, Result

Row = list[str]
HEAD = ["cell", "runs", "fired", "alone", *KINDS, "over_s", "run_s"]


def row(cell: Cell, results: list[Result]) -> Row:
    """Sums over the runs of a cell; ``alone``: of the actors that died, how many had one shard, so
    that it may be charged. Seconds are medians.
    """
    held = [shards for result in results for shards in result.held]
    alone = f"{held.count(1)}/{len(held)}"
    counts = [str(sum(len(r.findings[kind]) for r in results)) for kind in KINDS]
    fired = str(sum(result.fired for result in results))
    seconds = [
        f"{statistics.median(getattr(r, name) for r in results):.2f}"
        for name in ("over", "seconds")
    ]
    return [cell.name, str(len(results)), fired, alone, *counts, *seconds]


def is_clean(results: list[Result]) -> bool:
    """Whether a cell's fault happened, and no run has a finding."""
    return any(result.fired for result in results) and all(r.is_clean for r in results)


def line(cells: Row, width: int) -> str:
    first, *rest = cells
    wide = [max(5, len(head)) for head in HEAD[1:]]
    return f"{first:<{width}} " + " ".join(f"{c:>{n}}" for c, n in zip(rest, wide, strict=True))


def findings(cell: Cell, results: dict[int, Result], command: str) -> Iterator[str]:
    """Every finding in a line, after the command that repeats its run."""
    for number, result in results.items():
        if result.is_clean:
            continue
        yield f"{cell.name}, run {number}: {command} --cells {cell.name} --only {number}"
        for kind, texts in result.findings.items():
            yield from (f"  {kind}: {text}" for text in texts)
    if not any(result.fired for result in results.values()):
        yield f"{cell.name}: its fault never fired: {command} --cells {cell.name}"
