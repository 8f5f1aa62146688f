"""A config as people write it: as TOML, and as the command that repeats it."""

import json
import shlex
from typing import Any

from unet_core.config import override_values

Table = dict[str, Any]


def toml(config: Table) -> str:
    """Every key, in sections."""
    return "\n\n".join(
        f"[{name}]\n" + "\n".join(f"{key} = {_literal(value)}" for key, value in section.items()
                                  if value is not None and not _is_section(value))
        for name, section in _sections(config)
    )  # fmt: skip


def command(verb: list[str], config: Table, defaults: Table, leave_out: set[str]) -> str:
    """A verb with plain arguments, and an override for each key that has another value than
    ``defaults``; those that its arguments say are left out.
    """
    changed = [
        f"{key}={_override(key, value)}" for key, value in _flat(config).items()
        if key not in leave_out and value != _flat(defaults).get(key) and value is not None
    ]  # fmt: skip
    return " ".join(shlex.quote(word) for word in ["unet-jobs", *verb, *changed])


def _sections(config: Table, prefix: str = "") -> list[tuple[str, Table]]:
    found = []
    for key, value in config.items():
        if _is_section(value):
            found += [(prefix + key, value), *_sections(value, f"{prefix}{key}.")]
    return [
        (name, table) for name, table in found if any(not _is_section(v) for v in table.values())
    ]


def _is_section(value: Any) -> bool:
    """A table of keys that are names; maps of values are written in one line."""
    return isinstance(value, dict) and bool(value) and all(map(str.isidentifier, value))


def _flat(table: Table, prefix: str = "") -> Table:
    found: Table = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if _is_section(value) else {prefix + key: value}
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
