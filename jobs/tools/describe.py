"""``unet-jobs model``: what a network is made of, what it sees, what it costs."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unet_core.config.loading import override_values
from unet_core.config.presets import PRESETS, NetworkSpec, UNetSpec, preset
from unet_core.errors import ConfigError
from unet_core.networks import checkpoint
from unet_core.networks.construction import build
from unet_core.networks.reach import tiling_of
from unet_core.tiling.geometry import Tiling

USUAL_SIDE = 512
UNSHOWN = (nn.ReLU, nn.Identity, nn.Dropout, nn.Dropout2d)


@dataclass(frozen=True)
class Layer:
    """One layer at a given image size."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """C×H×W that it gives."""
    parameters: int
    flop: int
    """Two for each multiply-add of a convolution or matrix product; the rest is not counted."""


@dataclass(frozen=True)
class Description:
    """A network, layer by layer."""

    title: str
    layers: list[Layer]
    tiling: Tiling
    sides: tuple[int, int]
    """In and out, in pixels."""

    @property
    def parameters(self) -> int:
        """Trained values."""
        return sum(layer.parameters for layer in self.layers)


def describe(name: str, overrides: list[str], factory: str = "") -> Description:
    """A preset with options, or a checkpoint; ``side=PIXELS`` chooses the image.

    Raises ConfigError for options that there are not and sides that the network cannot take.
    """
    options = override_values(overrides)
    side = options.pop("side", None)
    if side is not None and (type(side) is not int or side < 1):
        raise ConfigError(f"side: got {side!r}, allowed: a number of 1 or more")
    if name in PRESETS:
        for field in fields(UNetSpec):
            given = options.get(field.name)
            if given is not None and type(given) is not type(field.default):
                raise ConfigError(f"{field.name}: got {given!r}, allowed: like {field.default!r}")
        spec: NetworkSpec = preset(name, **options)
        tiling = tiling_of(spec)
        with torch.device("meta"):
            network = build(spec)
    elif options:
        raise ConfigError(f"{next(iter(options))}: options go with a preset: {', '.join(PRESETS)}")
    else:
        network, header = checkpoint.load(name, factory=factory)
        spec, tiling = header.network, header.tiling
    side = side or tiling.sides.at_least(USUAL_SIDE)
    if side not in tiling.sides:
        raise ConfigError(f"side: {side} is not possible with {name}; {tiling.sides.near(side)}")
    layers = _layers(network.eval(), spec.in_channels, side)
    title = f"{name}: {spec.in_channels} channels in, {spec.classes} logits out"
    return Description(title, layers, tiling, (side, side - 2 * tiling.margin))


@torch.inference_mode()
def _layers(network: nn.Module, channels: int, side: int) -> list[Layer]:
    network = network.to("meta")
    found: list[Layer] = []
    counter = FlopCounterMode(display=False)

    def look(name: str, module: nn.Module, _: object, given_NCHW: Tensor) -> None:
        parameters = sum(p.numel() for p in module.parameters())
        flop = counter.get_total_flops() - sum(layer.flop for layer in found)
        shape = tuple(given_NCHW.shape[1:])
        found.append(Layer(name, type(module).__name__, shape, parameters, flop))

    for name, module in network.named_modules():
        if not list(module.children()) and not isinstance(module, UNSHOWN):
            module.register_forward_hook(partial(look, name))
    with counter:
        network(torch.zeros(1, channels, side, side, device="meta"))
    return found


def layers_table(described: Description) -> Table:
    """A row per layer, and the whole below."""
    side, out = described.sides
    table = Table(title=f"{described.title}, {side}² in, {out}² out", show_footer=True)
    table.add_column("layer", footer="whole")
    table.add_column("kind")
    table.add_column("C × H × W")
    table.add_column("parameters", f"{described.parameters:,}", justify="right")
    gflop = sum(layer.flop for layer in described.layers) / 1e9
    table.add_column("GFLOP", f"{gflop:,.1f}", justify="right")
    for layer in described.layers:
        cost = f"{layer.flop / 1e9:,.2f}" if layer.flop else ""
        count = f"{layer.parameters:,}" if layer.parameters else ""
        table.add_row(layer.name, layer.kind, " × ".join(map(str, layer.shape)), count, cost)
    return table


def sentences(tiling: Tiling) -> dict[str, str]:
    """What the tiling means, by a name for each line."""
    axis = tiling.receptive_field
    exact = f"exact: windows from {tiling.smallest_tile}, starts at multiples of {tiling.stride}"
    return {
        "sides": str(tiling.sides),
        "margin": f"{tiling.margin} pixels lost on each side",
        "sees": f"{axis} pixels along an axis" if axis else "the whole window",
        "halo": f"{tiling.halo} pixels" if tiling.is_exact else "none",
        "tiles": exact if tiling.is_exact else "blended: the output depends on the whole window",
    }


def presets_table() -> Table:
    """A row per preset, as it is without options."""
    table = Table(title="presets")
    for name in ("preset", "in → out", "parameters", "sides", "e.g.", "sees", "halo"):
        justify: Literal["left", "right"] = "right" if name == "parameters" else "left"
        table.add_column(name, justify=justify, no_wrap=name in ("preset", "parameters"))
    for name, spec in PRESETS.items():
        described = describe(name, [])
        tiling, (side, out) = described.tiling, described.sides
        table.add_row(
            name,
            f"{spec.in_channels} → {spec.classes}",
            f"{described.parameters:,}",
            str(tiling.sides),
            f"{side} → {out}",
            str(tiling.receptive_field or "window"),
            str(tiling.halo) if tiling.is_exact else "blended",
        )
    return table
