"""A config as people write it: as TOML, and as the command that repeats it."""

import json
import shlex
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from unet_core.config.loading import build, override_values
from unet_core.config.predict import PredictConfig

Table = dict[str, Any]


def toml(config: Table) -> str:
    """Every key that has a value, in sections."""
    sections: dict[str, list[str]] = defaultdict(list)
    for path, value in _flat(config).items():
        section, _, key = path.rpartition(".")
        if value is not None:
            sections[section].append(f"{key} = {_literal(value)}")
    return "\n\n".join("\n".join([f"[{name}]", *lines]) for name, lines in sections.items())


def command(
    verb: list[str], config: Table, defaults: Table, leave_out: set[str], keep: Collection[str] = ()
) -> str:
    """A verb with plain arguments, and an override for each key that is to be kept or has another
    value than ``defaults``; those that its arguments say are left out.
    """
    usual = _flat(defaults)
    changed = [
        f"{key}={_override(key, value)}"
        for key, value in _flat(config).items()
        if key not in leave_out and value is not None
        if key in keep or value != usual.get(key)
    ]
    return " ".join(shlex.quote(word) for word in ["unet-jobs", *verb, *changed])


def predict_command(config: Table, checkpoint: str, out: str) -> str:
    """The command that predicts with a config, or with a part of one, into a folder."""
    uri = config["input"]["uri"]
    places = {"input": {"uri": uri}, "output": {"uri": out}}
    defaults = build(PredictConfig, places, []).model_dump(mode="json")
    told = {"model.checkpoint", "output.uri"}
    return command(["predict", uri, "--model", checkpoint, "--out", out], config, defaults, told)


def _flat(table: Table, prefix: str = "") -> Table:
    """Values by the paths of their keys; maps whose keys are no names are values."""
    found: Table = {}
    for key, value in table.items():
        is_section = isinstance(value, dict) and value and all(map(str.isidentifier, value))
        found |= _flat(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return found


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _override(key: str, value: Any) -> str:
    """As short as it can be: a text without quotes, unless it would mean something else."""
    if isinstance(value, str) and override_values([f"{key}={value}"])[key] == value:
        return value
    return _literal(value)
