"""From facts to one HTML file: Jinja templates beside this module, everything from data escaped."""

import datetime
import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from unet_core.report.evaluations import score
from unet_core.report.facts import RunFacts
from unet_core.report.pictures import ERROR_COLORS, ERROR_NAMES
from unet_core.report.training import TrainingFacts

NAME = "report.html"
CELLS_WITH_TEXT = 12
"""A larger confusion matrix is colours, with its numbers for the pointer."""


def run_page(facts: RunFacts, now: datetime.datetime | None = None) -> bytes:
    """The page of a run."""
    legend = list(zip(ERROR_NAMES, ERROR_COLORS, strict=True))
    about = {"error_legend": legend, "cells_with_text": CELLS_WITH_TEXT}
    return _render("run.html", facts, now, about)


def training_page(facts: TrainingFacts, now: datetime.datetime | None = None) -> bytes:
    """The page of a training."""
    return _render("training.html", facts, now, {})


def _render(name: str, facts: Any, now: datetime.datetime | None, about: dict[str, Any]) -> bytes:
    written = now or datetime.datetime.now(datetime.UTC)
    title = facts.uri.rstrip("/").rpartition("/")[2] or facts.uri
    text = TEMPLATES.get_template(name).render(f=facts, title=title, written=written, **about)
    return text.encode("utf-8", "backslashreplace")


def share(value: float | None, decimals: int = 1) -> str:
    """Percent, or a dash."""
    return "–" if value is None else f"{100 * value:.{decimals}f} %"


def span(seconds: float) -> str:
    """A duration in the unit that fits."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.1f} s"


def at(when: datetime.datetime) -> str:
    """A moment, to the minute, in UTC."""
    return f"{when:%Y-%m-%d %H:%M} UTC"


TEMPLATES = Environment(
    loader=PackageLoader("unet_core.report", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"score": score, "share": share, "span": span, "at": at}
TEMPLATES.filters["count"] = "{:,}".format
TEMPLATES.tests["nan"] = math.isnan
