"""What later evaluations of a run found: against truth that came later, or another run."""

import json
from dataclasses import dataclass
from typing import Any

from unet_core.evaluate import EVALUATION_JSON
from unet_core.storage.store import Store

FOLDER = "evaluation"
SHOWN = 5
SCORES = ("dice", "iou", "precision", "recall")


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


def evaluations(store: Store) -> tuple[Compared, ...]:
    """All that are complete, by name; one of another version is left out."""
    found = []
    for entry in store.list(FOLDER):
        folder, _, name = entry.name.rpartition("/")
        if name == EVALUATION_JSON:
            try:
                found.append(_compared(folder, json.loads(store.read(f"{FOLDER}/{entry.name}"))))
            except (ValueError, KeyError, TypeError):
                continue
    return tuple(found)


def _compared(name: str, document: dict[str, Any]) -> Compared:
    images, of = document["images"]["compared"], document["of"]
    if "against" in of:
        about = f"compared with the run {of['against']}: {document['changed'] or 0:.4%} of all "
        return Compared(
            name, f"{about}{document['pixels']:,} pixels changed", images,
            ("before", "after", "IoU"),
            tuple((row["class"], (_share(row["before"]), _share(row["after"]), _score(row["iou"])))
                  for row in document["classes"]),
            "changed most",
            tuple((e["image_id"], _share(e["changed"])) for e in document["flipped"][:SHOWN]),
        )  # fmt: skip
    rows = {row["class"]: row for row in document["classes"]} | {"mean": document["mean"]}
    return Compared(
        name, f"compared with truth in {of['truth']}", images,
        tuple(f"{score} {how}" for score in ("Dice", "IoU", "precision", "recall")
              for how in ("micro", "macro")),
        tuple((cls, tuple(_score(row[how][score]) for score in SCORES for how in
              ("micro", "macro"))) for cls, row in rows.items()),
        "worst by IoU",
        tuple((e["image_id"], _score(e["iou"])) for e in document["worst"][:SHOWN]),
    )  # fmt: skip


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3%}"
