"""The run folder: identity, manifest and progress of a run.

``run.json`` and the manifest are published exclusively; the metrics parts are the only record of
progress. Running the same command again is the resume.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from itertools import compress
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from unet_core import __version__
from unet_core.concurrency import map_in_order
from unet_core.config.predict import PredictConfig
from unet_core.config.sections import Background, StorageConfig
from unet_core.errors import RunMismatchError, StoreError
from unet_core.inputs.shards import Shard, Source, masks_at
from unet_core.metrics import Totals
from unet_core.networks.header import Header
from unet_core.runs.compute import Compute
from unet_core.runs.manifest import FOLDER, Draft, manifest_name, read_heads
from unet_core.runs.parts import list_shard_ids, metrics_name, read_totals
from unet_core.runs.run_folder import SUCCESS, Identity, RunFolder
from unet_core.storage.store import Store, is_temporary
from unet_core.tiling.tile_grid import TileGrid

log = logging.getLogger(__name__)

RUN_JSON = "run.json"
METRICS = "metrics.parquet"
"""File with the rows of all metrics parts, made by ``compact``."""


def identity(
    config: PredictConfig, source: Source, model_sha256: str, header: Header, tile_grid: TileGrid,
    statistics: str,
) -> Identity:  # fmt: skip
    """Resolve the identity of a run: values by config key.

    It holds all settings that may change the bytes of a part or the list of shards: neither workers
    nor the path of the output. The device is in ``compute``.
    """
    settings = config.input.model_dump(exclude={"uri"}) | {
        "statistics": statistics,
        "format": source.format,
        "masks": masks_at(config.input, config.storage),
        "label_map": {str(k): v for k, v in sorted(config.input.label_map.items())},
    }
    return {
        "input.uri": source.root.uri(),
        "input.names": list(source.names),
        **{f"input.{key}": value for key, value in settings.items()},
        "model.sha256": model_sha256,
        "model.preprocessing": header.preprocessing.model_dump(),
        "model.threshold": config.model.threshold,
        "model.precision": config.model.precision,
        "tile.size": tile_grid.size,
        "tile.batch": config.tile.batch,
        "tile.mode": "blend" if tile_grid.blends else "exact",
        "tile.tta": config.tile.tta,
        "output.encoding": config.output.encoding,
        "output.probabilities": config.output.probabilities,
    }


class Record(BaseModel):
    """Contents of ``run.json``."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    """Digest of the identity, and of precision, back end and pixels per batch."""
    identity: Identity
    compute: Compute
    config: dict[str, Any]
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    version: str = __version__
    background: Background = "first"

    @property
    def first_foreground(self) -> int:
        """Lowest id of a foreground class."""
        return int(self.background == "first")


def fingerprint(identity: Identity, compute: Compute) -> str:
    """Compute the digest that every part of a new run carries."""
    parts = {
        **identity,
        "compute.precision": compute.precision,
        "compute.backend": compute.backend,
        "compute.batch_pixels": compute.batch_pixels,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Run(RunFolder):
    """The folder of a run; raises StoreError if its ``run.json`` is damaged or of another kind."""

    def __init__(self, uri: str, storage: StorageConfig | None = None) -> None:
        self.uri = uri.rstrip("/") or uri
        """URI as given."""
        super().__init__(Store(uri, storage), RUN_JSON, "run")

    @cached_property
    def record(self) -> Record | None:
        """The record of the run; None before it began."""
        try:
            return Record.model_validate(self.document) if self.document else None
        except ValueError as error:
            raise StoreError(
                f"{self.store.uri(RUN_JSON)}: not the run.json of a run: {error}"
            ) from error

    def begin(self, record: Record) -> Record:
        """Publish ``run.json``, or join the run of another driver that published it first.

        Raises RunMismatchError if that run has another identity.
        """
        if not self.store.supports_exclusive_create():
            log.warning(
                "%s: this store overwrites what is to be created once, so nothing keeps two "
                "drivers of this run apart; start only one at a time",
                self.store.uri(),
            )
        self.create_or_join(**record.model_dump())
        self.record = joined = Record.model_validate(self.document)
        return joined

    def manifest(self) -> list[Shard] | None:
        """Read all shards found when the run began and at each refresh, without their members.

        None before the run began.
        """
        files = [
            f"{FOLDER}/{entry.name}"
            for entry in self.store.list(FOLDER)
            if entry.name.endswith(".parquet")
        ]
        wanted = [manifest_name(number) for number in range(len(files))]
        if files != wanted:
            raise StoreError(f"{self.store.uri(FOLDER)} holds {files}, expected: {wanted}")
        return [h for number in range(len(files)) for h in read_heads(self.store, number)] or None

    def publish_manifest(self, draft: Draft) -> None:
        """Publish the manifest, or what a refresh adds to it, unless it exists.

        Raises RunMismatchError if another driver has just published one of other shards.
        """
        is_first = self.store.publish_exclusively(manifest_name(draft.generation), draft.file)
        if not is_first and read_heads(self.store, draft.generation) != draft.heads:
            raise RunMismatchError(
                f"{self.store.uri()}: another driver made this run of another state of the input; "
                "run the command again to join it"
            )

    def committed(self) -> set[str]:
        """List the ids of committed shards, which have a metrics part. Uses one list request."""
        return list_shard_ids(self.store, "metrics")

    def totals(self, shard_ids: set[str]) -> Totals:
        """Sum the totals of committed shards, read from their metrics parts."""
        return sum(map_in_order(partial(read_totals, self.store), sorted(shard_ids)), Totals())

    def reopen(self) -> None:
        """Remove ``_SUCCESS`` and ``metrics.parquet``."""
        self.store.remove(SUCCESS)
        self.store.remove(METRICS)

    def uncommit_failed(self, shards: list[Shard], is_there: Callable[[Shard], bool]) -> int:
        """Remove the commits of shards with failed images, so that they are segmented again.

        Returns their number. A shard whose file changed or is gone keeps its commit.
        """

        def is_forgotten(shard: Shard) -> bool:
            return bool(read_totals(self.store, shard.shard_id).failed) and is_there(shard)

        committed = self.committed()
        heads = [shard for shard in shards if shard.shard_id in committed]
        again = list(compress(heads, map_in_order(is_forgotten, heads)))
        if again:
            self.reopen()
        list(map_in_order(lambda shard: self.store.remove(metrics_name(shard.shard_id)), again))
        return len(again)

    def has_all(self, shards: list[Shard]) -> bool:
        """Whether these are all shards of the run and all are committed.

        Another driver may have added shards or removed commits.
        """
        generations = 1 + max((shard.generation for shard in shards), default=0)
        files = [entry for entry in self.store.list(FOLDER) if not is_temporary(entry.name)]
        return (
            len(files) == generations and {shard.shard_id for shard in shards} <= self.committed()
        )

    def finish(self, totals: Totals) -> None:
        """Remove leftovers of killed attempts, then write ``_SUCCESS``, last of all."""
        for entry in self.store.list():
            if is_temporary(entry.name):
                self.store.remove(entry.name)
        self.store.publish(SUCCESS, json.dumps(asdict(totals), indent=1).encode() + b"\n")

    def finished_totals(self) -> Totals:
        """Read the totals in ``_SUCCESS``."""
        return TypeAdapter(Totals).validate_json(self.store.read(SUCCESS))


def open_existing(uri: str, storage: StorageConfig | None = None) -> tuple[Run, Record]:
    """Open an existing run folder; raises StoreError if it is none."""
    run = Run(uri, storage)
    if run.record is None:
        raise StoreError(f"{uri} is not a run folder: it has no {RUN_JSON}")
    return run, run.record
