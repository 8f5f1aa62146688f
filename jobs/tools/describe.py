"""``unet-jobs model``: the size of a network, what it sees, what it costs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unet_core.config.loading import override_values
from unet_core.config.presets import PRESETS, NetworkSpec, UNetSpec, preset
from unet_core.errors import ConfigError
from unet_core.networks import checkpoint
from unet_core.networks.construction import build
from unet_core.networks.reach import tiling_of
from unet_core.tiling.geometry import Tiling

USUAL_SIDE = 512
"""Side of the image, in pixels, where none is given."""


@dataclass(frozen=True)
class Description:
    """A network, and its cost for a square image."""

    title: str
    parameters: int
    flop: int
    """Two for each multiply-add of a convolution or matrix product; the rest is not counted."""
    tiling: Tiling
    sides: tuple[int, int]
    """Side of the image and of the mask, in pixels."""


def describe(name: str, overrides: list[str], factory: str = "") -> Description:
    """Describe a preset with options, or a checkpoint; ``side=PIXELS`` sets the side of the image.

    Raises ConfigError for unknown options and for sides that the network cannot take.
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
    return Description(
        title=f"{name}: {spec.in_channels} channels in, {spec.classes} logits out",
        parameters=sum(p.numel() for p in network.parameters()),
        flop=count_flop(network.eval().to("meta"), [(1, spec.in_channels, side, side)]),
        tiling=tiling,
        sides=(side, side - 2 * tiling.margin),
    )


@torch.inference_mode()
def count_flop(network: nn.Module, shapes: Iterable[Sequence[int]]) -> int:
    """Count the operations of a network on the meta device, for one batch of each shape."""
    dtype = next(network.parameters()).dtype
    with FlopCounterMode(display=False) as counter:
        for shape in shapes:
            network(torch.zeros(shape, device="meta", dtype=dtype))
    return counter.get_total_flops()


def texts(described: Description) -> dict[str, str]:
    """Return the description as texts by name."""
    tiling, (side, out) = described.tiling, described.sides
    axis = tiling.receptive_field
    return {
        "network": described.title,
        "weights": f"{described.parameters:,} parameters",
        "cost": f"{described.flop / 1e9:,.1f} GFLOP for {side}² pixels in, {out}² out",
        "sides": str(tiling.sides),
        "margin": f"{tiling.margin} pixels lost on each side",
        "sees": f"{axis} pixels along an axis" if axis else "the whole window",
        "halo": f"{tiling.halo} pixels" if tiling.is_exact else "none",
        "tiles": f"exact: windows from {tiling.smallest_tile}, starts at multiples of "
        f"{tiling.stride}"
        if tiling.is_exact
        else "blended: the output depends on the whole window",
    }


def presets() -> list[tuple[str, ...]]:
    """Return the names of columns, then a row for each preset as it is without options."""
    return [
        ("preset", "in → out", "parameters", "sides", "e.g.", "sees", "halo"),
        *(_row(name, spec, describe(name, [])) for name, spec in PRESETS.items()),
    ]


def _row(name: str, spec: NetworkSpec, described: Description) -> tuple[str, ...]:
    tiling, (side, out) = described.tiling, described.sides
    return (
        name,
        f"{spec.in_channels} → {spec.classes}",
        f"{described.parameters:,}",
        str(tiling.sides),
        f"{side} → {out}",
        str(tiling.receptive_field or "window"),
        str(tiling.halo) if tiling.is_exact else "blended",
    )
