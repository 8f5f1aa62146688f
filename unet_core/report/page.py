"""Rendering of facts to one HTML file by Jinja templates, everything from data escaped."""

import datetime
import json
import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from unet_core.metrics import SCORE_NAMES
from unet_core.report.facts import RunFacts
from unet_core.report.panels import ERRORS, NO_DATA
from unet_core.report.training_facts import TrainingFacts

NAME = "report.html"
CELLS_WITH_TEXT = 12
"""Classes of the largest confusion matrix with numbers in it; a larger one is colours, and shows
its numbers to the pointer."""


def render(facts: RunFacts | TrainingFacts) -> bytes:
    """Render the page of a run or a training."""
    template = "run.html" if isinstance(facts, RunFacts) else "training.html"
    page = TEMPLATES.get_template(template).render(
        f=facts,
        title=facts.uri.rstrip("/").rpartition("/")[2] or facts.uri,
        written=datetime.datetime.now(datetime.UTC),
    )
    return page.encode("utf-8", "backslashreplace")


def text(value: object) -> str:
    """Format a value of a config."""
    if isinstance(value, dict):
        value = [f"{k} = {v}" for k, v in value.items() if v is not None]
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value)) or "–"


def toml(config: dict[str, Any], name: str = "") -> str:
    """Format every key that has a value, in sections; maps whose keys are no names are values."""
    sections = {
        key: value
        for key, value in config.items()
        if isinstance(value, dict) and value and all(map(str.isidentifier, value))
    }
    keys = [key for key, value in config.items() if key not in sections and value is not None]
    own = "\n".join([f"[{name}]", *(f"{key} = {_literal(config[key])}" for key in keys)])
    inner = (toml(value, f"{name}.{key}".strip(".")) for key, value in sections.items())
    return "\n\n".join([own] * bool(keys) + list(inner))


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def score(value: float | None) -> str:
    """Format with four decimals, or as a dash where it is undefined."""
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


def share(value: float | None, decimals: int = 1) -> str:
    """Format as percent, or a dash."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{decimals}f} %"


def span(seconds: float) -> str:
    """Format a duration in the unit that fits."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.1f} s"


TEMPLATES = Environment(
    loader=PackageLoader("unet_core.report", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals |= {
    "scores": SCORE_NAMES,
    "errors": ERRORS,
    "no_data": NO_DATA,
    "cells_with_text": CELLS_WITH_TEXT,
}
TEMPLATES.filters |= {
    "text": text,
    "toml": toml,
    "score": score,
    "share": share,
    "span": span,
    "count": "{:,}".format,
    "at": "{:%Y-%m-%d %H:%M} UTC".format,
}
TEMPLATES.tests["nan"] = math.isnan
