"""Reads a config: a TOML file, then ``section.key=value`` overrides, checked as a whole."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from unet_core.config.messages import sentences
from unet_core.config.sections import ConfigT, with_new_names
from unet_core.errors import ConfigError


def load(kind: type[ConfigT], path: str, overrides: list[str]) -> ConfigT:
    """Read a TOML file, apply ``section.key=value`` overrides and check the whole.

    Raises ConfigError that lists every problem, one a line, each with where, what and what is
    allowed.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return build(kind, table, overrides, source=path)


def build(
    kind: type[ConfigT], table: dict[str, Any], overrides: list[str], source: str = "config"
) -> ConfigT:
    """Apply overrides to a table and check it, as ``load`` does for a file."""
    try:
        table = _with_new_names(table)
        for path, value in with_new_names(override_values(overrides)).items():
            _set(table, path, value)
        return kind.model_validate(table)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {p}" for p in sentences(kind, error))) from error
    except ValueError as error:  # of a key that is given by two names
        raise ConfigError(f"{source}: {error}") from error


def _with_new_names(table: dict[str, Any]) -> dict[str, Any]:
    """Copy nested tables, with keys by their new names, so that an override by either name replaces
    what a file says; ``arguments`` have names of the user's.
    """
    return with_new_names(
        {
            key: _with_new_names(value) if isinstance(value, dict) and key != "arguments" else value
            for key, value in table.items()
        }
    )


def override_values(overrides: list[str]) -> dict[str, Any]:
    """``key=value`` words as a table; a value is TOML, or else a plain string."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{override}: not an option; write key=value")
        try:
            values[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = text
    return values


def _set(table: dict[str, Any], path: str, value: Any) -> None:
    """Put a value where ``section.key`` says."""
    *sections, key = path.split(".")
    if not sections or not all((*sections, key)):
        raise ConfigError(f"{path}={value}: not an override; write section.key=value")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{path}={value}: {section} is a value, not a section")
    table[key] = value
