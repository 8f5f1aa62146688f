"""Folders that are filled over several sessions: runs, trainings, evaluations, exports.

Each has a record, a JSON document that is published first and once and holds the identity of what
the folder is for. Whoever comes later joins it if its identity is the same.
"""

import json
from typing import Any

from unet_core.config.sections import with_new_names
from unet_core.errors import ConfigError, RunMismatchError, StoreError
from unet_core.runs.schema import FIRST_SCHEMA, SCHEMA_VERSION
from unet_core.storage.store import Store

Identity = dict[str, Any]
"""Resolved values by config key; two folders are for the same if all are equal."""
NEUTRAL: Identity = {
    "input.nodata": "none",
    "input.statistics": "image",
    "input.on_missing_mask": "skip",
    "model.background": "first",
}
"""What the code did before a key of the identity existed, so that folders made before still match a
config that does not use the key. Keys of a training's data are looked up as those of ``input``."""
SUCCESS = "_SUCCESS"
ANOTHER_FOLDER = "give output.uri (--out) a new folder, or restore these keys"


class RunFolder:
    """A folder with a record; raises StoreError if that is damaged or of something else.

    ``name`` is the record's file, ``kind`` what messages call the folder's content.
    """

    def __init__(self, store: Store, name: str, kind: str) -> None:
        self.store, self.name, self.kind = store, name, kind
        self.document: dict[str, Any] = self._read() if store.exists(name) else {}
        """The record; empty if the folder has none yet."""

    @property
    def identity(self) -> Identity:
        """Identity in the record; records of schema 1 have it at other places and old names."""
        found = self.document.get("identity") or self.document.get("options") or self.document
        return {
            key: with_new_names(value) if key == "model.preprocessing" else value
            for key, value in with_new_names(found).items()
            if key != "schema_version" and not key.endswith(".given")  # both only in schema 1
        }

    @property
    def schema_version(self) -> str:
        """Schema of the code that began the folder; records of schema 1 do not name it."""
        return str(self.document.get("schema_version", FIRST_SCHEMA))

    @property
    def is_of_schema_1(self) -> bool:
        """True if the first version began the folder: it can be read, but not continued."""
        return bool(self.document) and self.schema_version == FIRST_SCHEMA

    @property
    def is_finished(self) -> bool:
        """True if ``_SUCCESS`` exists, which is written last."""
        return self.store.exists(SUCCESS)

    def require_current_schema(self) -> None:
        """Raise RunMismatchError if a version with another schema began the folder."""
        if self.document and self.schema_version != SCHEMA_VERSION:
            raise RunMismatchError(
                f"{self.store.uri()} was begun by a version of unet-jobs with schema "
                f"{self.schema_version}, and this one has {SCHEMA_VERSION}: it can be read, but "
                f"only that version can continue it; a new {self.kind} needs a new folder"
            )

    def create_or_join(
        self, identity: Identity, advice: str = ANOTHER_FOLDER, **content: Any
    ) -> bool:
        """Publish the record, or join the one that another process published; return whether this
        process was first. Raises RunMismatchError with the keys that differ.
        """
        document = {"schema_version": SCHEMA_VERSION, **content, "identity": identity}
        data = json.dumps(document, indent=1).encode() + b"\n"
        is_first = self.store.publish_exclusively(self.name, data)
        self.document = document if is_first else self._read()
        self.check(identity, advice)
        return is_first

    def check(self, requested: Identity, advice: str = ANOTHER_FOLDER) -> None:
        """Check that the folder is for ``requested``; raises RunMismatchError with the keys that
        differ. Without a record, raises ConfigError if the folder holds other files.
        """
        if not self.document:
            require_empty(self.store, self.kind)
            return
        recorded = self.identity
        keys = recorded.keys() if self.is_of_schema_1 else {*recorded, *requested}
        differing = [
            f"  {key}: the {self.kind} has {_short(recorded.get(key))}, "
            f"this config {_short(requested.get(key))}"
            for key in sorted(keys)
            if _value(recorded, key) != _value(requested, key)
        ]
        if differing:
            raise RunMismatchError(
                f"{self.store.uri()} holds another {self.kind}:\n"
                + "\n".join(differing)
                + f"\n{advice}"
            )

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.store.read(self.name)))
        except (ValueError, TypeError) as error:
            raise StoreError(f"{self.store.uri(self.name)} is damaged: {error}") from error


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


def _value(identity: Identity, key: str) -> Any:
    if key in identity:
        return identity[key]
    data, part, name = (*key.split(".", 2), "", "")[:3]
    return NEUTRAL.get(f"input.{name}" if data == "data" and part else key)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
