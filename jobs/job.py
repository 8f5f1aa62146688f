"""A checked config with its checkpoint header, input, run folder and tile grid. No torch or Ray."""

from dataclasses import dataclass

from unet_core.config.predict import PredictConfig
from unet_core.inputs.formats import open_source
from unet_core.inputs.shards import Source
from unet_core.networks.header import Header, read_header_and_digest
from unet_core.runs import schema
from unet_core.runs.compute import Compute, ReplicaSpec, RunSettings
from unet_core.runs.run import Record, Run, fingerprint, identity
from unet_core.runs.run_folder import Identity
from unet_core.tiling.tile_grid import TileGrid, tile_grid_for


@dataclass(frozen=True)
class Job:
    """A checked config, and what it was resolved to: computed once, handed down."""

    config: PredictConfig
    header: Header
    model_sha256: str
    source: Source
    run: Run
    tile_grid: TileGrid
    identity: Identity

    def make_record(self, compute: Compute) -> Record:
        """Return the record for ``run.json``."""
        return Record(
            fingerprint=fingerprint(self.identity, compute),
            identity=self.identity,
            compute=compute,
            config=self.config.model_dump(mode="json"),
            class_names=self.header.class_names,
            palette=self.header.palette,
            background=self.header.background,
        )

    def replica_spec(self, cpus: float) -> ReplicaSpec:
        """Return what is needed to build one replica on ``cpus`` cores."""
        return ReplicaSpec(
            self.config, self.source, self.model_sha256, self.tile_grid, max(1, int(cpus))
        )

    def settings(self, record: Record) -> RunSettings:
        """Return what every worker of the recorded run must use."""
        kept = self.config.output.probabilities
        footer = schema.footer(self.header, self.model_sha256, record.fingerprint, kept)
        return RunSettings(record.compute, footer)


def prepare(config: PredictConfig) -> Job:
    """Check everything that needs no GPU: checkpoint header, tile size, input, run folder."""
    header, sha256 = read_header_and_digest(
        config.model.checkpoint, config.storage, config.model.factory
    )
    tile_grid = tile_grid_for(header.tiling, config.tile.size, config.tile.mode, config.tile.tta)
    config.input.require_free_ignore_index(header.classes)
    run = Run(config.output.uri, config.storage)
    is_known = run.record is not None and config.input.format == "auto"
    source = open_source(
        config.input, config.storage, run.identity["input.format"] if is_known else ""
    )
    requested = identity(config, source, sha256, header, tile_grid)
    run.check(requested)
    return Job(config, header, sha256, source, run, tile_grid, requested)
