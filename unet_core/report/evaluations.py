"""What later evaluations of a run found: against truth that came later, or another run."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from unet_core.evaluate import EVALUATION_JSON, FOLDER
from unet_core.metrics import RATIOS, Totals
from unet_core.storage.store import Store
from unet_core.tally import counted

SHOWN = 5


@dataclass(frozen=True)
class Compared:
    """One evaluation as a table of classes, and its most striking images."""

    name: str
    about: str
    images: int
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    striking: str
    """What ``examples`` are: the worst, or those that changed most."""
    examples: tuple[tuple[str, str], ...]
    """Image ids, and their figures."""
    warnings: tuple[str, ...] = ()


def evaluations(store: Store, totals: Totals) -> tuple[Compared, ...]:
    """All that are complete, by name; one of another version is left out. ``totals``: of the run,
    which may have gone on since.
    """
    found = []
    for entry in store.list(FOLDER):
        folder, _, name = entry.name.rpartition("/")
        if name == EVALUATION_JSON:
            try:
                document = json.loads(store.read(f"{FOLDER}/{entry.name}"))
                warnings = tuple(_warnings(document, totals))
                found.append(replace(_compared(folder, document), warnings=warnings))
            except (ValueError, KeyError, TypeError):
                continue
    return tuple(found)


def _warnings(document: dict[str, Any], totals: Totals) -> Iterator[str]:
    if document.get("counted") != counted(totals):
        yield "The run has gone on since: this is of masks that it had before. Evaluate again."
    elif not document["is_finished"]:
        yield "The run is not finished: this is of the shards that were committed."
    if "warning" in document:
        yield f"{document['warning'][:1].upper()}{document['warning'][1:]}."


def _compared(name: str, document: dict[str, Any]) -> Compared:
    images, of = document["images"]["compared"], document["of"]
    if "against" in of:
        about = f"compared with the run {of['against']}: {document['changed'] or 0:.4%} of all "
        return Compared(
            name, f"{about}{document['pixels']:,} pixels changed", images,
            ("before", "after", "IoU"),
            tuple((row["class"], (_share(row["before"]), _share(row["after"]), score(row["iou"])))
                  for row in document["classes"]),
            "changed most",
            tuple((e["image_id"], _share(e["changed"])) for e in document["flipped"][:SHOWN]),
        )  # fmt: skip
    label_map = ", ".join(f"{value} = {to}" for value, to in of["input.label_map"].items())
    about = f"compared with truth in {of['truth']}"
    rows = {row["class"]: row for row in document["classes"]} | {"mean": document["mean"]}
    return Compared(
        name, f"{about}, label_map {{{label_map}}}" if label_map else about, images,
        tuple(f"{kind} {how}" for kind in ("Dice", "IoU", "precision", "recall")
              for how in ("micro", "macro")),
        tuple((cls, tuple(score(row[how][kind]) for kind in RATIOS for how in
              ("micro", "macro"))) for cls, row in rows.items()),
        "worst by IoU",
        tuple((e["image_id"], score(e["iou"])) for e in document["worst"][:SHOWN]),
    )  # fmt: skip


def score(value: float | None) -> str:
    """Four decimals, or a dash where it is undefined."""
    return "–" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3%}"
