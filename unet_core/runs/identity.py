"""The identity of a folder: a document that is published first and once, and compared on resume.

Runs, trainings, evaluations and exports each create or join their folder by an identity.
"""

import json
from typing import Any

from unet_core.errors import ConfigError, RunMismatchError, StoreError
from unet_core.storage.store import Store

Identity = dict[str, Any]
"""Resolved values by config key; two runs (trainings, ...) are the same if all are equal."""
ANOTHER_FOLDER = "give output.uri (--out) a new folder, or restore these keys"


def create_or_read(store: Store, name: str, document: dict[str, Any]) -> dict[str, Any]:
    """Publish the JSON document that identifies a folder, or read the one that exists.

    Raises StoreError if the existing one is damaged.
    """
    if store.publish_exclusively(name, json.dumps(document, indent=1).encode() + b"\n"):
        return document
    try:
        return dict(json.loads(store.read(name)))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{store.uri(name)} is damaged: {error}") from error


def check_identity_or_empty(store: Store, recorded: Identity | None, requested: Identity) -> None:
    """Check that a folder is empty or has the ``requested`` identity; without one, ``recorded`` is
    None.

    Raises RunMismatchError with the keys that differ, ConfigError if it holds other files.
    """
    if recorded is None:
        require_empty(store)
    else:
        check_identity(store.uri(), recorded, requested)


def check_identity(
    where: str,
    recorded: Identity,
    requested: Identity,
    what: str = "run",
    advice: str = ANOTHER_FOLDER,
) -> None:
    """Check that two identities are equal; raises RunMismatchError with the keys that differ."""
    differing = [
        f"  {key}: the {what} has {_short(recorded.get(key))}, "
        f"this config {_short(requested.get(key))}"
        for key in sorted({*recorded, *requested})
        if recorded.get(key) != requested.get(key)
    ]
    if differing:
        raise RunMismatchError(
            f"{where} holds another {what}:\n" + "\n".join(differing) + f"\n{advice}"
        )


def require_empty(store: Store, kind: str = "run", key_of_place: str = "output.uri") -> None:
    """Check that a folder holds no files; raises ConfigError that names one."""
    if not store.exists():
        return
    there = [e.name for e in store.list() if not e.name.rpartition("/")[2].startswith("_")]
    if there:
        raise ConfigError(
            f"{key_of_place}: {store.uri()} holds other files ({there[0]}) and no {kind}; "
            "choose a new folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
