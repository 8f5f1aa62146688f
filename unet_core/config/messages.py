"""What pydantic finds in a config, in our own words: where, got, allowed."""

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError


def sentences(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """What pydantic found in our own words, one sentence for each key."""
    by_key: dict[tuple[int | str, ...], list[Any]] = {}
    for finding in error.errors(include_url=False):
        key = tuple(p for p in finding["loc"] if "[" not in str(p) and p not in _BRANCHES)
        by_key.setdefault(key, []).append(finding)
    return [_sentence(kind, key, found) for key, found in by_key.items()]


def _sentence(kind: type[BaseModel], key: tuple[int | str, ...], found: list[Any]) -> str:
    where = ".".join(str(part) for part in key)
    got = found[0]["input"]
    match found[0]["type"]:
        case "missing":
            return f"{where}: is required"
        case "extra_forbidden":
            known = _keys_at(kind, key[:-1])
            near = difflib.get_close_matches(str(key[-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(known)}"
            return f"{where}: unknown key; {hint}"
        case "value_error":
            text = str(found[0]["ctx"]["error"])
            return f"{where}: {text}" if where else text
    allowed = " or ".join(dict.fromkeys(_allowed(finding) for finding in found))
    shown = "a section" if isinstance(got, dict) else repr(got)
    return f"{where}: got {shown}, allowed: {allowed}"


_BRANCHES = {"int", "float", "constrained-int", "constrained-float"}
"""Arms of a union, like those with brackets: no keys, though pydantic locates by them."""
_LIMITS = {
    "greater_than_equal": "a number of {} or more",
    "greater_than": "a number above {}",
    "less_than_equal": "a number of {} or less",
    "less_than": "a number below {}",
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text in quotes",
    "list": "a list",
    "tuple": "a list",
    "dict": "a section of keys, e.g. {255 = 1}",
    "model": "a section of keys",
}


def _allowed(finding: Any) -> str:
    """What would have been right where pydantic found something wrong."""
    kind = str(finding["type"])
    if kind == "literal_error":
        return str(finding["ctx"]["expected"]).replace("'", '"')
    if kind in _LIMITS:
        return _LIMITS[kind].format(*finding["ctx"].values())
    return _KINDS.get(kind.partition("_")[0], str(finding["msg"]))


def _keys_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that the section at ``location`` has."""
    for part in location:
        field = kind.model_fields[str(part)].annotation
        options = [field, *getattr(field, "__args__", ())]
        kind = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(kind.model_fields)
