"""Construction of networks and their headers: U-Nets of presets, and networks of user functions."""

import functools
import hashlib
import importlib.metadata
import inspect
import os
import sys
from dataclasses import replace

import torch
from pydantic import ValidationError
from torch import nn

from unet_core.config.import_weights import ForeignConfig
from unet_core.config.messages import sentences
from unet_core.config.normalization import NormalizationSection
from unet_core.config.presets import COLORS, Factory, NetworkSpec, UNetSpec
from unet_core.config.train import NetworkConfig
from unet_core.errors import CheckpointError, ConfigError, one_line
from unet_core.images.preprocessing import Preprocessing
from unet_core.networks.header import Header
from unet_core.networks.reach import tiling_of, tiling_of_module
from unet_core.networks.unet import UNet
from unet_core.tiling.geometry import Tiling

distributions = functools.cache(importlib.metadata.packages_distributions)
"""Names of the distributions of each installed package; cached, since it takes 0.25 s."""


def build(spec: NetworkSpec) -> nn.Module:
    """Build a network with initial weights; raises CheckpointError for a factory that fails."""
    if isinstance(spec, UNetSpec):
        return UNet(spec)
    module, _, function = spec.factory.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not see the user's own modules
    arguments = {key: None if v == "null" else v for key, v in spec.arguments.items()}
    try:
        network = getattr(importlib.import_module(module), function)(**arguments)
    except Exception as error:  # the function is the user's, and so are its errors
        raise CheckpointError(
            f"model.factory: {spec.factory} failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise CheckpointError(
            f"model.factory: {spec.factory} gave {type(network).__name__}, not a torch.nn.Module"
        )
    return network


def measure_tiling(
    spec: NetworkSpec, network: nn.Module, stride: int | None = None
) -> tuple[NetworkSpec, Tiling]:
    """Measure the tiling of a network; return it with the spec, whose ``classes`` is measured too.

    ``stride``: that of a factory's network if known, else searched. Raises CheckpointError for a
    network whose output is not N×K×H×W.
    """
    if isinstance(spec, UNetSpec):
        return spec, tiling_of(spec)
    tiling = tiling_of_module(network, spec.in_channels, stride)
    height, width = tiling.sides.smallest, tiling.sides.smallest + tiling.sides.step
    with torch.inference_mode():
        shape = network.eval()(torch.zeros(1, spec.in_channels, height, width)).shape
    if len(shape) != 4:
        raise CheckpointError(
            f"the network gives {list(shape)} for one image of {height}×{width} pixels, but "
            "logits N×K×H×W are needed; wrap it so that it does"
        )
    return replace(spec, classes=int(shape[1])), tiling


def header_of(
    network: nn.Module, spec: NetworkSpec, model: ForeignConfig | NetworkConfig
) -> Header:
    """Create the header of a network from its config and measured tiling.

    Raises ConfigError for class names and colours that do not fit the network.
    """
    stride = model.stride if isinstance(model, ForeignConfig) else "auto"
    spec, tiling = measure_tiling(spec, network, None if stride == "auto" else stride)
    count = max(2, spec.classes)
    others = ["foreground"] if count == 2 else [f"class {number}" for number in range(1, count)]
    names = tuple(model.classes or ["background", *others])
    given = model.model_dump(include={*NormalizationSection.model_fields})
    if model.color == "auto":
        by_channels = {channels: color for color, channels in COLORS.items()}
        given["color"] = by_channels.get(spec.in_channels, spec.in_channels)
    try:
        preprocessing = Preprocessing.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"model: {sentences(Preprocessing, error)[0]}") from error
    return Header(spec, tiling, names, preprocessing, background=model.background)


def origin(spec: Factory) -> str:
    """Identify the code of a factory: distribution, version, and digest of its module's source."""
    module = importlib.import_module(spec.factory.partition(":")[0])
    digest = hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:16]
    names = distributions().get(module.__name__.partition(".")[0], [])
    versions = [f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names))]
    return " ".join([*versions, digest])
