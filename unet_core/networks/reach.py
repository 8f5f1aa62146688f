"""How far a network sees, measured: what its tiles must carry to be exact.

The reach is where the gradient of a logit with respect to the input is not zero. It is found for
all inputs of a stride at once by the response to an impulse, in a copy with positive weights.
"""

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from unet_core.config.presets import UNetSpec
from unet_core.errors import CheckpointError
from unet_core.networks.unet import UNet
from unet_core.tiling.geometry import Sides, Tiling, exact_spans, round_up

LONGEST = 4096
"""Sides of the strips on which reaches are looked for, in pixels; whoever sees farther sees all."""
STRIDES = (1, 2, 4, 8, 16, 32, 64)
TOLERANCE = 1e-9

Reaches = list[tuple[int, int]]
"""For each phase of the stride: the first and the last input pixel that logit 0 depends on."""


@functools.cache
def tiling_of(spec: UNetSpec) -> Tiling:
    """The tiling of a U-Net; it does not depend on widths and channels, which are measured as 1."""
    with torch.random.fork_rng(devices=()):  # whoever seeded something does not notice
        thin = UNet(replace(spec, in_channels=1, classes=1, width=1))
    tiling = _tiling(thin, 1, spec.sides, spec.stride, spec.margin)
    with torch.device("meta"):
        widest = _widest(UNet(replace(spec, init="torch")).eval(), spec.in_channels, spec.sides)
    return replace(tiling, is_exact=tiling.is_exact and spec.moves_with_input, channels=widest)


def tiling_of_module(network: nn.Module, in_channels: int, stride: int | None = None) -> Tiling:
    """The tiling of any network whose logits have its input's size, found by trying.

    ``stride``: if its author knows it. Raises CheckpointError for a network that does not give
    logits NKHW of its input's size.
    """
    found = None
    for candidate in [stride] if stride else STRIDES:
        sides = _sides_of(network, in_channels, candidate)
        if sides is None:
            continue
        tiling = _tiling(network, in_channels, sides, candidate, margin=0)
        if tiling.is_exact and is_exact(network, in_channels, tiling):
            found = tiling
            break
        found = found or replace(tiling, is_exact=False)
    if found is None:
        tried = f"multiples of {stride or STRIDES[-1]}"
        raise CheckpointError(
            f"the network does not give logits N×K×H×W for N×{in_channels}×H×W with sides that are "
            f"{tried}; wrap it so that it does, or declare its stride"
        )
    return replace(found, channels=_widest(network, in_channels, found.sides))


@torch.inference_mode()
def is_exact(network: nn.Module, in_channels: int, tiling: Tiling, at_edges: bool = True) -> bool:
    """Whether windows reproduce the pass over the whole, on random strips along both axes; without
    ``at_edges`` one window amid the strip stands for all.

    Outside of the window in question the strip holds no numbers at all, so that a logit which
    depends on anything there, however little, is found. (In single precision, convolutions let
    such values leak into their neighbours.)
    """
    network = copy.deepcopy(network).cpu().double().eval()
    window, margin = tiling.smallest_tile, tiling.margin
    length = tiling.sides.at_least(window + 2 * tiling.stride + 1) - 2 * margin
    shape = (1, in_channels, tiling.sides.smallest, length + 2 * margin)
    strip = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    spans = list(exact_spans(length, window, tiling))
    for axis in (-1, -2):
        x_NCHW = strip if axis == -1 else strip.mT
        for span in spans if at_edges else spans[1:2]:
            inside = slice(span.start + margin, span.stop + margin)
            alone = torch.full_like(strip, torch.nan)
            alone[..., inside] = strip[..., inside]
            whole = network(alone if axis == -1 else alone.mT)
            cut = network(x_NCHW.narrow(axis, inside.start, span.stop - span.start))
            kept = span.keep_stop - span.keep_start
            mine = cut.narrow(axis, span.keep_start - span.start - margin, kept)
            theirs = whole.narrow(axis, span.keep_start, kept)
            if not (mine - theirs).abs().max() <= TOLERANCE * (1 + mine.abs().max()):
                return False
    return True


def _tiling(network: nn.Module, in_channels: int, sides: Sides, stride: int, margin: int) -> Tiling:
    tiling = Tiling(sides, stride, margin, 0, 0, is_exact=False, channels=1)
    if (reaches := _reaches(network, in_channels, sides, stride, margin)) is None:
        return tiling
    end, halo = tiling.tile_sides.smallest, 0
    for at in range(LONGEST):  # from a window's first logit on, and from its last one back
        back = end - 2 * margin - 1 - at
        sees_before = at + reaches[at % stride][0] < 0
        if sees_before or back + reaches[back % stride][1] >= end:
            halo = round_up(at + 1, stride)
    field = max(last - first + 1 for first, last in reaches)
    return replace(tiling, halo=halo, receptive_field=field, is_exact=True)


def _reaches(
    network: nn.Module, in_channels: int, sides: Sides, stride: int, margin: int
) -> Reaches | None:
    """Union over both axes; None if some logit depends on all that there is."""
    lit_in = functools.partial(_lit, _positive(network), in_channels, sides.smallest, stride)
    result = [(0, 0)] * stride
    for axis in (-1, -2):
        length = _length(functools.partial(lit_in, axis, 1), sides, 2 * margin + 16 * stride)
        if length is None:
            return None
        for phase, at in lit_in(axis, stride, length):
            first, last = result[at % stride]
            result[at % stride] = min(first, phase - at), max(last, phase - at)
    return result


def _length(
    lit_in: Callable[[int], list[tuple[int, int]]], sides: Sides, shortest: int
) -> int | None:
    """The side of a strip whose ends have no part in what an impulse at its middle does."""
    length, before = sides.at_least(shortest), None
    while length <= LONGEST:
        lit = lit_in(length)
        if lit and (lit[0], lit[-1]) == before:
            return length
        before = (lit[0], lit[-1]) if lit else None
        length = sides.at_least(length * 3 // 2)
    return None


@torch.inference_mode()
def _lit(
    network: nn.Module, in_channels: int, width: int, stride: int, axis: int, phases: int,
    length: int,
) -> list[tuple[int, int]]:  # fmt: skip
    """Pairs of an input line and a logit that depends on it, counted from the strip's middle; none
    if an end of the strip is among them.

    A line of ones among zeros lights up exactly the logits that depend on it: with positive
    weights nothing cancels, and a maximum finds it.
    """
    middle = length // 2 // stride * stride
    dtype = next(network.parameters()).dtype
    strips = torch.zeros(phases + 1, in_channels, width, length, dtype=dtype)
    for phase in range(phases):
        strips[phase, ..., middle + phase] = 1
    logits = network(strips if axis == -1 else strips.mT)
    lit = (logits != logits[-1:]).any(dim=1).any(dim=-2 if axis == -1 else -1)[:-1]
    if lit[:, 0].any() or lit[:, -1].any():
        return []
    return [(phase, at - middle) for phase, at in lit.nonzero().tolist()]


def _positive(network: nn.Module) -> nn.Module:
    """A copy whose weights are positive, and neither fade nor explode over many layers."""
    network = copy.deepcopy(network).cpu().eval()
    convolutions = sum(parameter.ndim >= 2 for parameter in network.parameters())
    # through so many, paths weigh too little for single precision
    network = network.double() if convolutions > 60 else network.float()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim >= 2:
                taps = parameter[0, 0].numel() if parameter.ndim > 2 else 1
                parameter.fill_(taps**0.5 / parameter[0].numel())
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.zero_()
            elif name.endswith("running_var"):
                buffer.fill_(1)
    return network


@torch.inference_mode()
def _sides_of(network: nn.Module, in_channels: int, stride: int) -> Sides | None:
    """The sides that a network takes if its stride is this one; None if it is not."""
    network = network.eval()
    device = next(network.parameters()).device
    for smallest in (stride, 2 * stride, 4 * stride):
        shapes = [(side, side + stride) for side in (smallest, smallest + stride)]
        images = (torch.zeros(1, in_channels, *shape, device=device) for shape in shapes)
        with contextlib.suppress(Exception):  # it says in its own way which sizes it does not take
            if [tuple(network(image).shape[-2:]) for image in images] == shapes:
                return Sides(smallest, stride)
    return None


@torch.inference_mode()
def _widest(network: nn.Module, in_channels: int, sides: Sides) -> int:
    """The most values per input pixel that any layer gives."""
    height, width = sides.smallest, sides.smallest + sides.step
    seen = [1]

    def look(_: nn.Module, __: object, given: object) -> None:
        if isinstance(given, Tensor):
            seen.append(-(-given[0].numel() // (height * width)))

    hooks = [module.register_forward_hook(look) for module in network.modules()]
    try:
        parameter = next(network.parameters())
        network(torch.zeros(1, in_channels, height, width, device=parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
    return max(seen)
