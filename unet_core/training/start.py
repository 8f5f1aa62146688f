"""The network that a training begins with, and what its checkpoints will say of themselves."""

from dataclasses import replace

import torch
from torch import nn

from unet_core.errors import ConfigError
from unet_core.geometry import Sides
from unet_core.networks import checkpoint
from unet_core.networks.checkpoint import Header
from unet_core.networks.construction import build, header_of
from unet_core.networks.presets import UNetSpec
from unet_core.train_config import TrainConfig


def new_network(config: TrainConfig) -> tuple[nn.Module, Header]:
    """A network with initial weights, or with those of ``model.checkpoint``; the same for the same
    seed.

    Raises ConfigError for classes or a crop that it cannot give.
    """
    torch.manual_seed(config.train.seed)
    model = config.model
    if model.checkpoint:
        network, header = _loaded(config)
    else:
        network = build(model.spec)
        header = header_of(network, model.spec, model)
    crop, tiling = config.train.crop, header.tiling
    crops = Sides(tiling.sides.smallest - 2 * tiling.margin, tiling.sides.step)
    if crop not in crops:
        raise ConfigError(f"train.crop: {crop} is not possible here; {crops.near(crop)}")
    weights = config.loss.class_weights
    if isinstance(weights, list) and len(weights) != len(header.class_names):
        raise ConfigError(
            f"loss.class_weights holds {len(weights)} numbers, but the classes are "
            f"{', '.join(header.class_names)}"
        )
    return network, header


def _loaded(config: TrainConfig) -> tuple[nn.Module, Header]:
    """Somebody's weights; where other classes are named, the last layer begins anew."""
    model = config.model
    network, header = checkpoint.load(
        model.checkpoint, storage=config.storage, factory=model.factory
    )
    header = replace(header, training={})
    names = tuple(model.classes)
    if "classes" not in model.model_fields_set or names == header.class_names:
        return network, header
    if len(names) == len(header.class_names):
        return network, replace(header, class_names=names)
    if not isinstance(header.network, UNetSpec):
        raise ConfigError(
            f"model.classes names {len(names)}, but {model.checkpoint} has "
            f"{len(header.class_names)}, and only U-Nets of presets get a new last layer"
        )
    spec = replace(header.network, classes=1 if len(names) == 2 else len(names))
    wider, kept = build(spec), network.state_dict()
    fitting = {n: kept[n] for n, t in wider.state_dict().items() if kept[n].shape == t.shape}
    wider.load_state_dict(fitting, strict=False)
    return wider, replace(header, network=spec, class_names=names, palette=())
