"""Measurement of receptive fields, which determine the halo that tiles need to be exact.

The reach of a logit is the range of input pixels on which it depends. It is measured for all phases
of the stride at once by the response to an impulse, in a copy of the network with positive weights.
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
"""Longest strip for measuring, in pixels; a reach that does not fit is taken as unlimited."""
STRIDES = (1, 2, 4, 8, 16, 32, 64)
"""Strides to try for networks of unknown architecture: powers of two, as pooling gives."""
TOLERANCE = 1e-9
"""Largest relative difference of logits in double precision that counts as equal."""

Reaches = list[tuple[int, int]]
"""First and last input pixel, relative to a logit, for each phase of the stride."""


@functools.cache
def tiling_of(spec: UNetSpec) -> Tiling:
    """Measure the tiling of a U-Net with width 1: it does not depend on widths and channels."""
    with torch.random.fork_rng(devices=()):  # leaves the caller's random state alone
        thin = UNet(replace(spec, in_channels=1, classes=1, width=1))
    tiling = _tiling(thin, 1, spec.sides, spec.stride, spec.margin)
    with torch.device("meta"):
        widest = _values_per_pixel(
            UNet(replace(spec, init="torch")).eval(), spec.in_channels, spec.sides
        )
    return replace(tiling, is_exact=tiling.is_exact and spec.moves_with_input, channels=widest)


def tiling_of_module(network: nn.Module, in_channels: int, stride: int | None = None) -> Tiling:
    """Measure the tiling of any network whose logits have the size of its input.

    ``stride``: if known, else ``STRIDES`` are tried. Raises CheckpointError for a network that does
    not give logits NKHW of its input's size.
    """
    found = None
    for candidate in [stride] if stride else STRIDES:
        if (sides := _sides_of(network, in_channels, candidate)) is None:
            continue
        tiling = _tiling(network, in_channels, sides, candidate, margin=0)
        if tiling.is_exact and is_exact(network, in_channels, tiling):
            found = tiling
            break
        found = found or replace(tiling, is_exact=False)
    if found is None:
        raise CheckpointError(
            f"the network does not give logits N×K×H×W for N×{in_channels}×H×W with sides that are "
            f"multiples of {stride or STRIDES[-1]}; wrap it so that it does, or declare its stride"
        )
    return replace(found, channels=_values_per_pixel(network, in_channels, found.sides))


@torch.inference_mode()
def is_exact(network: nn.Module, in_channels: int, tiling: Tiling, at_edges: bool = True) -> bool:
    """Check that windows give the same logits as a whole image, on random strips along both axes;
    without ``at_edges``, only for one window amid the strip.

    Outside of the window the whole strip is NaN, so that any dependence on it is detected. Computed
    in double precision: in single precision, convolutions let NaN leak into neighbours.
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
            masked = torch.full_like(strip, torch.nan)
            masked[..., inside] = strip[..., inside]
            whole = network(masked if axis == -1 else masked.mT)
            cut = network(x_NCHW.narrow(axis, inside.start, span.stop - span.start))
            kept = span.keep_stop - span.keep_start
            got = cut.narrow(axis, span.keep_start - span.start - margin, kept)
            expected = whole.narrow(axis, span.keep_start, kept)
            if not (got - expected).abs().max() <= TOLERANCE * (1 + got.abs().max()):
                return False
    return True


def _tiling(network: nn.Module, in_channels: int, sides: Sides, stride: int, margin: int) -> Tiling:
    """Compute halo and receptive field from the reaches; not exact if a reach is unlimited."""
    tiling = Tiling(sides, stride, margin, 0, 0, is_exact=False, channels=1)
    if (reaches := _reaches(network, in_channels, sides, stride, margin)) is None:
        return tiling
    end, halo = tiling.tile_sides.smallest, 0
    for at in range(LONGEST):  # from a window's first logit on, and from its last one back
        back = end - 2 * margin - 1 - at
        sees_before = at + reaches[at % stride][0] < 0
        if sees_before or back + reaches[back % stride][1] >= end:
            halo = round_up(at + 1, stride)
    return replace(
        tiling,
        halo=halo,
        receptive_field=max(last - first + 1 for first, last in reaches),
        is_exact=True,
    )


def _reaches(
    network: nn.Module, in_channels: int, sides: Sides, stride: int, margin: int
) -> Reaches | None:
    """Measure the reaches, united over both axes; None if one is unlimited."""
    responses_in = functools.partial(
        _responses, _positive(network), in_channels, sides.smallest, stride
    )
    result = [(0, 0)] * stride
    for axis in (-1, -2):
        length = _strip_length(
            functools.partial(responses_in, axis, 1), sides, 2 * margin + 16 * stride
        )
        if length is None:
            return None
        for phase, at in responses_in(axis, stride, length):
            first, last = result[at % stride]
            result[at % stride] = min(first, phase - at), max(last, phase - at)
    return result


def _strip_length(
    responses_in: Callable[[int], list[tuple[int, int]]], sides: Sides, shortest: int
) -> int | None:
    """Find a strip length whose ends do not affect the response to an impulse at its middle; None
    if it would exceed ``LONGEST``.
    """
    length, before = sides.at_least(shortest), None
    while length <= LONGEST:
        lit = responses_in(length)
        if lit and (lit[0], lit[-1]) == before:
            return length
        before = (lit[0], lit[-1]) if lit else None
        length = sides.at_least(length * 3 // 2)
    return None


@torch.inference_mode()
def _responses(
    network: nn.Module, in_channels: int, width: int, stride: int, axis: int, phases: int,
    length: int,
) -> list[tuple[int, int]]:  # fmt: skip
    """List pairs (input line, logit that depends on it), relative to the strip's middle; empty if
    an end of the strip is among them.

    A line of ones among zeros changes exactly the logits that depend on it: with positive weights
    nothing cancels, and max pooling passes it on.
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
    """Copy a network with positive weights that neither vanish nor explode over many layers."""
    network = copy.deepcopy(network).cpu().eval()
    convolutions = sum(parameter.ndim >= 2 for parameter in network.parameters())
    # through so many layers, contributions of single paths underflow single precision
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
    """Find the sides that a network of this stride accepts; None if it fails for all."""
    network = network.eval()
    device = next(network.parameters()).device
    for smallest in (stride, 2 * stride, 4 * stride):
        shapes = [(side, side + stride) for side in (smallest, smallest + stride)]
        images = (torch.zeros(1, in_channels, *shape, device=device) for shape in shapes)
        with contextlib.suppress(Exception):  # networks raise anything for sizes that do not fit
            if [tuple(network(image).shape[-2:]) for image in images] == shapes:
                return Sides(smallest, stride)
    return None


@torch.inference_mode()
def _values_per_pixel(network: nn.Module, in_channels: int, sides: Sides) -> int:
    """Measure the largest number of output values per input pixel over all layers."""
    height, width = sides.smallest, sides.smallest + sides.step
    counts = [1]

    def record(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, Tensor):
            counts.append(-(-output[0].numel() // (height * width)))

    with contextlib.ExitStack() as hooks:
        for module in network.modules():
            hooks.enter_context(module.register_forward_hook(record))
        device = next(network.parameters()).device
        network(torch.zeros(1, in_channels, height, width, device=device))
    return max(counts)
