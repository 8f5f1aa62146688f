"""A loaded network with its device and tile grid."""

from torch import nn

from unet_core.config.presets import Factory
from unet_core.errors import CheckpointError
from unet_core.inference.engine import Engine, choose_device
from unet_core.inference.postprocessing import Postprocessing
from unet_core.networks import checkpoint
from unet_core.networks.header import Header
from unet_core.networks.reach import is_exact
from unet_core.runs.compute import Compute, ReplicaSpec


class Replica:
    """A network loaded on its device; reports its ``compute`` section."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        config = spec.config
        network, header = checkpoint.load(
            config.model.checkpoint, spec.model_sha256, config.storage, config.model.factory
        )
        _require_tiling(network, header)
        self.tile_grid = spec.tile_grid
        postprocessing = Postprocessing(
            header.network.classes,
            config.model.threshold,
            config.tile.tta,
            config.output.probabilities,
        )
        self.engine = Engine(
            network,
            header,
            choose_device(config.model.device, config.workers.gpus),
            postprocessing,
            self.tile_grid.blends,
            config.model.precision,
        )
        self.engine.share_cores(spec.threads, self.tile_grid.size)

    def probe(self) -> Compute:
        """Return the ``compute`` section of this replica."""
        return self.engine.probe(self.tile_grid.size, self.spec.config.tile.batch)


def _require_tiling(network: nn.Module, header: Header) -> None:
    """Check that a factory's network still has the tiling that was measured at its import."""
    if (
        isinstance(header.network, Factory)
        and header.tiling.is_exact
        and not is_exact(network, header.network.in_channels, header.tiling, at_edges=False)
    ):
        raise CheckpointError(
            f"model.factory: {header.network.factory} now builds a network whose tiles are not "
            "exact; import its weights again"
        )
