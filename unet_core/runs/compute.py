"""Inputs of a replica, and the ``compute`` section of ``run.json``. No torch, for the driver."""

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from unet_core.config.predict import PredictConfig
from unet_core.errors import RunMismatchError
from unet_core.images.statistics import Statistics
from unet_core.inputs.shards import Source
from unet_core.tiling.tile_grid import TileGrid


class Compute(BaseModel):
    """Device properties that decide the bits of a mask; measured once, kept in ``run.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    """Model of the device, and for CPUs the instruction set that torch uses."""
    precision: str
    backend: str
    batch_pixels: int
    """Pixels (N·H·W) that a batch holds at most, unless a single tile is larger."""
    versions: dict[str, str]

    def batch_of(self, height: int, width: int) -> int:
        """Number of tiles of a shape in a batch."""
        return max(1, self.batch_pixels // (height * width))

    def require(self, other: "Compute") -> None:
        """Check that device, precision, back end and versions are equal; else RunMismatchError."""
        mine, theirs = self.model_dump(), other.model_dump()
        differing = [
            f"compute.{key}: the run has {mine[key]}, this actor {theirs[key]}"
            for key in ("device", "precision", "backend", "versions")
            if mine[key] != theirs[key]
        ]
        if differing:
            raise RunMismatchError(
                "masks could differ in their last bits:\n" + "\n".join(differing)
                + "\nuse the same machines and versions (workers.accelerator_type chooses among "
                "GPUs), or set workers.mixed_devices = true"
            )  # fmt: skip


@dataclass(frozen=True)
class RunSettings:
    """What every worker of a run must use."""

    compute: Compute
    """The ``compute`` section that the run has recorded."""
    footer: dict[str, str]
    """Key-value metadata of the parts."""


RecordRun = Callable[[Compute], RunSettings]
"""Called with the ``compute`` section of each worker that is loaded; the first one creates or joins
the run. Raises RunMismatchError if a worker differs from what is recorded."""


@dataclass(frozen=True)
class ReplicaSpec:
    """Everything needed to build a replica; pickled to the actors."""

    config: PredictConfig
    source: Source
    model_sha256: str
    tile_grid: TileGrid
    statistics: Statistics
    threads: int
    """CPU cores for decoding, encoding and, without a GPU, the network."""
