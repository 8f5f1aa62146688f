"""What ``peers`` found, as two tables and a picture between the marks of a page."""

import datetime
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unet_core.inference.engine import device_model

BEGIN, END = "<!-- peers: make bench -->", "<!-- /peers -->"


@dataclass(frozen=True)
class Found:
    """What one contender needed for one case, beside the first of its group."""

    case: str
    group: str
    name: str
    seconds: list[float]
    ratios: list[float]
    """Its seconds over those of the first of its group, by round."""
    differing: float
    """Share of mask pixels that are not as in the mask of the first."""

    @property
    def ratio(self) -> str:
        middle = statistics.median(self.ratios)
        return f"{middle:.2f} ({min(self.ratios):.2f}–{max(self.ratios):.2f})"


def rewrite(page: Path, found: Sequence[Found], cases: Sequence[str]) -> None:
    """Put tables and picture into the page; ``cases`` say what the columns are."""
    before, rest = page.read_text().split(BEGIN)
    picture = page.with_name("peers.png")
    plot(found, picture)
    groups = list(dict.fromkeys(result.group for result in found))
    body = [*cases, "", *(line for group in groups for line in table(group, found)), facts(found)]
    body += ["", f"![How much longer others need]({picture.name})"]
    page.write_text(before + BEGIN + "\n" + "\n".join(body) + "\n" + END + rest.split(END)[1])


def table(group: str, found: Sequence[Found]) -> list[str]:
    """Contenders by case: the seconds of the first, and how much longer the others took."""
    mine = [result for result in found if result.group == group]
    cases = list(dict.fromkeys(result.case for result in mine))
    cells = {(result.name, result.case): result for result in mine}
    names = list(dict.fromkeys(result.name for result in mine))
    lines = [
        f"| {group} | {' | '.join(cases)} | pixels that differ |",
        "|---" * (len(cases) + 2) + "|",
    ]
    for name in names:
        results = [cells.get((name, case)) for case in cases]
        texts = [_cell(result, name == names[0]) for result in results]
        differing = max(result.differing for result in results if result is not None)
        share = f"{differing:.0e}" if differing else "0"
        lines.append(f"| {name} | {' | '.join(texts)} | {share} |")
    return [*lines, ""]


def _cell(result: Found | None, is_first: bool) -> str:
    if result is None:
        return ""
    return f"{statistics.median(result.seconds):.2f} s" if is_first else result.ratio


def facts(found: Sequence[Found]) -> str:
    """Where and when."""
    rounds = len(found[0].ratios)
    version = torch.__version__.partition("+")[0]
    return (
        f"Medians of {rounds} rounds (least–most). {len(os.sched_getaffinity(0))} cores, "
        f"{device_model(torch.device('cpu'))}, torch {version}, {datetime.date.today()}."
    )


def plot(found: Sequence[Found], path: Path) -> None:
    """A bar for each ratio, a column for each case."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(result.case for result in found))
    names = list(dict.fromkeys(result.name for result in found))[::-1]
    border = len({result.name for result in found if result.group != found[0].group}) - 0.5
    figure = Figure(figsize=(2 + 1.6 * len(cases), 0.5 + 0.24 * len(names)), layout="constrained")
    for axes, case in zip(
        figure.subplots(1, len(cases), sharey=True, squeeze=False)[0], cases, strict=True
    ):
        for result in (result for result in found if result.case == case):
            ratio = statistics.median(result.ratios)
            color = "#0072b2" if "predict" in result.name else "#e69f00"
            axes.barh(names.index(result.name), ratio, color=color, height=0.7)
            axes.text(ratio, names.index(result.name), f" {ratio:.1f}", va="center", fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.axhline(border, color="gray", linewidth=0.8, linestyle=":")
        axes.set_title(case, fontsize=9)
        axes.set_yticks(range(len(names)), [name.replace("`", "") for name in names], fontsize=8)
        axes.margins(x=0.25)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "seconds over those of the first predict: inline above, on Ray below", fontsize=8
    )
    figure.savefig(path, dpi=90)
