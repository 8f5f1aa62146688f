"""From data to a network: our own U-Nets, and whatever a user's function makes."""

import importlib

from torch import nn

from unet_core.errors import CheckpointError
from unet_core.geometry import Tiling
from unet_core.presets import Factory, NetworkSpec, UNetSpec
from unet_core.reach import tiling_of, tiling_of_module
from unet_core.unet import UNet


def build(spec: NetworkSpec) -> nn.Module:
    """The network, with initial weights. Raises CheckpointError for a factory that gives none."""
    return UNet(spec) if isinstance(spec, UNetSpec) else _made_by(spec)


def tiling(spec: NetworkSpec, network: nn.Module, stride: int | None = None) -> Tiling:
    """How the network may be tiled, measured; ``stride`` if the author of a factory knows it."""
    if isinstance(spec, UNetSpec):
        return tiling_of(spec)
    return tiling_of_module(network, spec.in_channels, stride)


def _made_by(spec: Factory) -> nn.Module:
    module, _, function = spec.factory.partition(":")
    arguments = {key: None if v == "null" else v for key, v in spec.arguments.items()}
    try:
        made = getattr(importlib.import_module(module), function)(**arguments)
    except Exception as error:  # the function is the user's, and so are its errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"model.factory: {spec.factory} failed: {reason}") from error
    if not isinstance(made, nn.Module):
        raise CheckpointError(
            f"model.factory: {spec.factory} gave {type(made).__name__}, not a torch.nn.Module"
        )
    return made
