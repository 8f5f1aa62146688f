"""The output folder of a training: ``run.json``, manifest, checkpoints, history, published weights.

The same command continues from the newest checkpoint; ``_SUCCESS`` has the final position. The
history of the steps before a checkpoint is published before it.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from unet_core import __version__
from unet_core.config.train import TrainConfig
from unet_core.errors import RunMismatchError, StoreError
from unet_core.inputs.shards import masks_at
from unet_core.networks import checkpoint
from unet_core.networks.header import checkpoint_digest, read_header, read_metadata
from unet_core.runs.manifest import manifest_name
from unet_core.runs.run import RUN_JSON
from unet_core.runs.run_folder import SUCCESS, Identity, RunFolder
from unet_core.runs.schema import HISTORY
from unet_core.storage.parquet_files import encode_parquet
from unet_core.storage.store import Store, is_temporary
from unet_core.training.dataset import Splits

BEST, LAST = "best.safetensors", "last.safetensors"
CHECKPOINT, HISTORY_FILE = "checkpoints/{:09d}/state.safetensors", "history/{:09d}.parquet"
"""File names of a checkpoint and of a history file, to be formatted with the step."""


@dataclass
class TrainingState:
    """Progress of a training; JSON in checkpoints, as ``position``, and in ``_SUCCESS``."""

    step: int = 0
    """Optimizer steps taken."""
    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    """Sum of the losses of this epoch's steps."""
    best: float | None = None
    """Best value of ``train.best`` so far; None if it was undefined in every validation."""
    best_step: int = 0
    """Step of the best weights; 0 before the first validation."""


def identity(config: TrainConfig) -> Identity:
    """Return the settings that determine the weights, by config key.

    Two configs with equal identities may share a folder. Workers, output, storage, device and
    checkpoint interval are excluded. Raises CheckpointError if ``model.checkpoint`` cannot be read.
    """
    table = config.model_dump(mode="json", exclude={"workers", "output", "storage"})
    for name, part in config.data.parts.items():
        row = table["data"][name]
        row |= {
            "uri": Store(part.uri, config.storage).uri(),
            "masks": masks_at(part, config.storage),
        }
        del row["shard_images"], row["shard_mb"]
        if part.instances and "ignore_index" not in part.model_fields_set:
            row["ignore_index"] = None  # every value but 0 is an object
    del table["model"]["device"], table["train"]["checkpoint_minutes"]
    if initial := config.model.checkpoint:
        table["model"]["checkpoint"] = checkpoint_digest(initial, config.storage)
        header = read_header(initial, config.storage)
        of_header = {"classes": list(header.class_names), "background": header.background}
        given = config.model.model_fields_set
        table["model"] |= {key: value for key, value in of_header.items() if key not in given}
    return _flat(table)


def _flat(table: dict[str, Any], prefix: str = "") -> Identity:
    """Flatten nested tables to dotted keys; ``label_map`` and ``arguments`` are values."""
    flat: Identity = {}
    for key, value in table.items():
        is_section = isinstance(value, dict) and key not in ("label_map", "arguments")
        flat |= _flat(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat


class TrainingRun(RunFolder):
    """The output folder of a training; raises StoreError for a damaged or foreign ``run.json``."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, RUN_JSON, "training")
        self.requested: Identity = {}
        """The identity that ``create`` publishes; ``open_training`` sets it."""
        self.history: list[dict[str, Any]] = []
        """Rows since the last checkpoint, not published yet."""
        if self.document and self.document.get("kind") != "training":
            raise StoreError(f"{store.uri(RUN_JSON)}: not the run.json of a training")

    def create(self, config: TrainConfig, data: dict[str, Any]) -> None:
        """Publish ``run.json``; raises RunMismatchError if another driver has just done so."""
        digest = hashlib.sha256(json.dumps(self.requested, sort_keys=True).encode()).hexdigest()
        is_first = self.create_or_join(
            self.requested,
            kind="training",
            fingerprint=digest,
            data=data,
            config=config.model_dump(mode="json"),
            version=__version__,
        )
        if not is_first:
            raise RunMismatchError(
                f"{self.store.uri()}: another driver has just begun a training here; wait for it, "
                "or choose a new folder"
            )

    def publish_manifest(self, splits: Splits) -> None:
        """Publish the number of images in each shard."""
        rows = [
            {"split": split.name, "shard_id": shard.shard_id, "images": count}
            for split in splits
            for shard, count in zip(split.input.shards, split.counts, strict=True)
        ]
        self.store.publish(manifest_name(0), encode_parquet(pa.Table.from_pylist(rows)))

    def load_counts(self, splits: Splits) -> None:
        """Set the image counts from the manifest; raises RunMismatchError if the shards changed."""
        rows = self._rows_of(manifest_name(0))
        for split in splits:
            then = {row["shard_id"]: row["images"] for row in rows if row["split"] == split.name}
            now = {shard.shard_id: shard for shard in split.input.shards}
            if then.keys() != now.keys():
                new = [now[i].uri or now[i].members[0].key for i in now.keys() - then.keys()]
                raise RunMismatchError(
                    f"{split.input.name}: the images changed since the training began: "
                    f"{len(then.keys() - now.keys())} of its shards are gone or rewritten, "
                    f"{len(new)} are new ({', '.join(sorted(new)[:3])}); restore them, or train "
                    "into a new folder"
                )
            split.counts = [then[shard.shard_id] for shard in split.input.shards]

    def save(self, position: TrainingState, tensors: dict[str, Any]) -> None:
        """Publish the history since the last checkpoint, then a checkpoint; remove older ones."""
        if self.history:
            table = pa.Table.from_pylist(self.history, schema=HISTORY)
            self.store.publish(HISTORY_FILE.format(position.step), encode_parquet(table))
            self.history = []
        data = checkpoint.pack(tensors, {"position": json.dumps(vars(position))})
        self.store.publish(CHECKPOINT.format(position.step), data)
        for step in self._steps(CHECKPOINT):
            if step != position.step:
                self.store.remove(CHECKPOINT.format(step))

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint, or None."""
        return max(self._steps(CHECKPOINT), default=None)

    def remove_leftovers(self, after: int | None) -> None:
        """Remove temporary files, and the history after a step; all of it if that is None."""
        for folder in ("checkpoints", "history"):
            for entry in self.store.list(folder):
                if is_temporary(entry.name):
                    self.store.remove(f"{folder}/{entry.name}")
        for step in self._steps(HISTORY_FILE):
            if after is None or step > after:
                self.store.remove(HISTORY_FILE.format(step))

    def load(self, step: int) -> tuple[TrainingState, dict[str, Any]]:
        """Read a checkpoint: position, tensors. Raises StoreError if missing, CheckpointError if
        damaged.
        """
        name = CHECKPOINT.format(step)
        tensors = checkpoint.unpack(self.store.read(name), self.store.uri(name))
        return self._position_at(step), tensors

    def rows(self) -> list[dict[str, Any]]:
        """Read the published history, in the order of the steps."""
        names = map(HISTORY_FILE.format, self._steps(HISTORY_FILE))
        return [row for name in names for row in self._rows_of(name)]

    def finish(self, position: TrainingState) -> None:
        """Publish ``_SUCCESS``, the last file of a training."""
        self.store.publish(SUCCESS, json.dumps(vars(position), indent=1).encode() + b"\n")

    def position(self) -> TrainingState:
        """Read the progress from ``_SUCCESS`` or the newest checkpoint, without its tensors."""
        if self.is_finished:
            return TrainingState(**json.loads(self.store.read(SUCCESS)))
        newest = self.newest_step()
        return TrainingState() if newest is None else self._position_at(newest)

    def _rows_of(self, name: str) -> list[dict[str, Any]]:
        with self.store.open_parquet(name) as file:
            return file.read().to_pylist()

    def _position_at(self, step: int) -> TrainingState:
        metadata = read_metadata(self.store.uri(CHECKPOINT.format(step)), self.store.storage)
        return TrainingState(**json.loads(metadata["position"]))

    def _steps(self, pattern: str) -> list[int]:
        """List the steps of files named by a pattern, ascending; temporary files do not match."""
        folder = pattern.partition("/")[0]
        names = {f"{folder}/{entry.name}" for entry in self.store.list(folder)}
        steps = {int(digits) for name in names for digits in re.findall(r"\d+", name)[:1]}
        return sorted(step for step in steps if pattern.format(step) in names)


def open_training(config: TrainConfig) -> TrainingRun:
    """Open the output folder of a config.

    Raises RunMismatchError, with the keys that differ, if it holds another training, ConfigError if
    it holds anything else.
    """
    run = TrainingRun(Store(config.output.uri, config.storage))
    run.requested = identity(config)
    written: Identity = {  # schema 1 did not resolve these
        "model.classes": list(config.model.classes),
        **{f"data.{name}.ignore_index": p.ignore_index for name, p in config.data.parts.items()},
    }
    run.check(run.requested | written if run.is_of_schema_1 else run.requested)
    if not run.is_finished:
        run.require_current_schema()
    return run


def is_training(store: Store) -> bool:
    """Return True for the folder of a training; raises StoreError if ``run.json`` is damaged."""
    return RunFolder(store, RUN_JSON, "training").document.get("kind") == "training"
