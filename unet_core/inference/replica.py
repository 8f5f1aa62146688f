"""One replica of the model, on its device and with the windows that it is shown."""

from torch import nn

from unet_core.config.presets import Factory
from unet_core.errors import CheckpointError
from unet_core.inference.engine import Engine, choose_device
from unet_core.inference.postprocessing import Postprocessing
from unet_core.networks import checkpoint
from unet_core.networks.header import Header
from unet_core.networks.reach import is_exact
from unet_core.runs.compute import Compute, ReplicaSpec
from unet_core.tiling.tile_grid import tile_grid_for


class Replica:
    """Loads the network and says what it computes with."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        config = spec.config
        network, header = checkpoint.load(
            config.model.checkpoint, spec.model_sha256, config.storage, config.model.factory
        )
        _require_tiling(network, header)
        self.tile_grid = tile_grid_for(
            header.tiling, config.tile.size, config.tile.mode, config.tile.tta
        )
        device = choose_device(config.model.device, config.workers.gpus)
        postprocessing = Postprocessing(
            header.network.classes,
            config.model.threshold,
            config.tile.tta,
            config.output.probabilities,
        )
        blends, precision = self.tile_grid.blends, config.model.precision
        self.engine = Engine(network, header, device, postprocessing, blends, precision)
        self.engine.share_cores(spec.threads, self.tile_grid.size)

    def probe(self) -> Compute:
        """This replica's ``compute`` section."""
        return self.engine.probe(self.tile_grid.size, self.spec.config.tile.batch)


def _require_tiling(network: nn.Module, header: Header) -> None:
    """Hold a network of somebody else to what was measured when its weights were imported."""
    if not isinstance(header.network, Factory) or not header.tiling.is_exact:
        return
    if not is_exact(network, header.network.in_channels, header.tiling, at_edges=False):
        raise CheckpointError(
            f"model.factory: {header.network.factory} now builds a network whose tiles are not "
            "exact; import its weights again"
        )
