"""A checked config with its checkpoint header, input, run folder and tile grid. No torch or Ray."""

from dataclasses import dataclass, replace

from pydantic import ValidationError

from unet_core.config.messages import sentences
from unet_core.config.normalization import SPANS
from unet_core.config.predict import PredictConfig
from unet_core.config.sections import InputConfig
from unet_core.errors import ConfigError
from unet_core.images.preprocessing import Limits, Preprocessing
from unet_core.images.statistics import Statistics
from unet_core.inputs.formats import open_source
from unet_core.inputs.shards import Source
from unet_core.networks.header import Header, read_header_and_digest, trained_stretch
from unet_core.runs import schema
from unet_core.runs.compute import Compute, ReplicaSpec, RunSettings
from unet_core.runs.manifest import Draft
from unet_core.runs.run import Record, Run, fingerprint, identity
from unet_core.runs.run_folder import Identity
from unet_core.runs.sampled_statistics import sample_limits
from unet_core.tiling.tile_grid import TileGrid, tile_grid_for

SAMPLED = ("group", "dataset")
"""Statistics that are measured once, on a sample, and kept in ``run.json``."""
LIMITS = "input.limits"
"""Key of the identity that holds them."""


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
    statistics: Statistics
    """Source of the limits of normalization."""

    def with_sampled_limits(self, draft: Draft) -> "Job":
        """Measure the limits of groups or of the dataset, if a new run needs them."""
        kind = self.identity["input.statistics"]
        if kind not in SAMPLED or self.statistics.by_group:
            return self
        limits = sample_limits(
            self.source, draft.heads, draft.with_members, self.header.preprocessing, kind == "group"
        )
        pairs = {group: [[*pair] for pair in pairs] for group, pairs in limits.items()}
        identity = {**self.identity, LIMITS: pairs}
        return replace(self, statistics=Statistics(limits), identity=identity)

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
            self.config, self.source, self.model_sha256, self.tile_grid, self.statistics,
            max(1, int(cpus)),
        )  # fmt: skip

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
    kind, statistics = resolve_statistics(config, header)
    requested = identity(config, source, sha256, header, tile_grid, kind)
    if kind in SAMPLED and LIMITS in run.identity:
        requested[LIMITS] = run.identity[LIMITS]
        statistics = Statistics(
            {g: [Limits(*pair) for pair in pairs] for g, pairs in requested[LIMITS].items()}
        )
    run.check(requested)
    return Job(config, header, sha256, source, run, tile_grid, requested, statistics)


def resolve_statistics(config: PredictConfig, header: Header) -> tuple[str, Statistics]:
    """Resolve ``input.statistics`` and the limits that ``input.low`` and ``input.high`` fix.

    Raises ConfigError for what the checkpoint's normalization cannot use.
    """
    wanted, asked, checkpoint = header.preprocessing, config.input, config.model.checkpoint
    trained = trained_stretch(checkpoint, header)
    if asked.low is not None:
        return "image", Statistics({"": _fixed_limits(asked, wanted)})
    if wanted.is_fixed and asked.statistics not in ("auto", "image"):
        raise ConfigError(
            f"input.statistics is {asked.statistics!r}, but this checkpoint normalizes all images "
            f"alike ({wanted.normalization}); leave it out"
        )
    if asked.statistics == "guarded" and trained is None:
        raise ConfigError(
            "input.statistics is 'guarded', but the checkpoint does not tell how far its training "
            "images were stretched; train it with this version, or use 'dataset' or 'group'"
        )
    is_builtin = checkpoint.startswith("builtin:") and trained is not None
    usual = "guarded" if is_builtin and not wanted.is_fixed else "image"
    kind = usual if asked.statistics == "auto" else asked.statistics
    return kind, Statistics(trained=trained, is_guarded=kind == "guarded")


def _fixed_limits(asked: InputConfig, wanted: Preprocessing) -> list[Limits]:
    if wanted.normalization not in SPANS:
        raise ConfigError(
            "input.low and input.high are ends of a stretch, but this checkpoint normalizes by "
            f"mean and deviation ({wanted.normalization})"
        )
    try:
        fixed = Preprocessing.model_validate(
            {"color": wanted.color, "normalization": "range", "low": asked.low, "high": asked.high}
        )
    except ValidationError as error:
        problem = sentences(Preprocessing, error)[0]
        raise ConfigError(f"input.low, input.high: {problem}") from error
    return fixed.fixed_limits(1.0)
