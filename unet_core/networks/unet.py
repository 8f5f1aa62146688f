"""The U-Net (Ronneberger, Fischer, Brox 2015, arXiv 1505.04597) with options for its variants.

Shapes: N images, C channels, H×W pixels, K logits.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unet_core.config.presets import UNetSpec

LayerT = TypeVar("LayerT", bound=nn.Module)


def _resize(x_NCHW: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x_NCHW, like.shape[-2:], mode="bilinear", align_corners=True)


def _crop(decoder: Tensor, skip: Tensor, to_even: bool) -> tuple[Tensor, Tensor]:
    """Crop the skip's centre to the decoder's size; offsets are rounded down, or to even ones."""
    for axis in (-2, -1):
        spare = skip.shape[axis] - decoder.shape[axis]
        half = spare // 2
        offset = half + (spare % 2) * (half % 2) if to_even else half
        skip = skip.narrow(axis, offset, decoder.shape[axis])
    return decoder, skip


def _pad(decoder: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Pad the decoder's map with zeros to the skip's size; an odd pixel goes right and below."""
    below, right = (skip.shape[axis] - decoder.shape[axis] for axis in (-2, -1))
    pads = [right // 2, right - right // 2, below // 2, below - below // 2]
    return F.pad(decoder, pads), skip


JOINS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "equal": lambda decoder, skip: (decoder, skip),
    "crop": partial(_crop, to_even=False),
    "crop_even": partial(_crop, to_even=True),
    "pad": _pad,
    "resize": lambda decoder, skip: (decoder, _resize(skip, decoder)),
}


class UNet(nn.Module):
    """U-Net: encoder, bottom block, decoder with skip connections, head.

    ``forward`` maps NCHW (float, normalized, H and W from ``spec.sides``) to logits NKHW, which are
    smaller by ``2 * spec.margin`` pixels, without softmax or sigmoid.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        widths = [spec.width * 2**level for level in range(spec.depth)]
        bottom = widths[-1] * (2 if spec.bottom == "double" else 1)
        inputs = [spec.in_channels, *widths[:-1]]
        self.pool = nn.MaxPool2d(2, ceil_mode=spec.ceil_pool)
        self.encoder = nn.ModuleList(
            _block(spec, channels, out, dilation=spec.dilation, dropout=out == widths[-1])
            for channels, out in zip(inputs, widths, strict=True)
        )
        self.bottom = _block(spec, widths[-1], bottom, dropout=True)
        # channels after each decoder block; up-sampling without a convolution does not halve them
        outputs = widths if spec.bottom == "double" else [spec.width, *widths[:-1]]
        below = [*outputs[1:], bottom]
        self.up = nn.ModuleList(map(partial(_up, spec), below, widths))
        middles = widths if spec.decoder_middle == "wide" else outputs
        self.decoder = nn.ModuleList(
            _block(spec, 2 * width, out, middle)
            for width, out, middle in zip(widths, outputs, middles, strict=True)
        )
        self.head = _head(spec)
        _init_weights(self, spec.init)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Compute logits NKHW of images NCHW."""
        spec, x, skips = self.spec, x_NCHW, []
        for block in self.encoder:
            x = _apply_layers(block, x)
            pooled = self.pool(x)
            skips.append(x if spec.skip == "encoded" else pooled)
            x = pooled
        x = self.bottom(x)
        for level in reversed(range(spec.depth)):
            x = _apply_layers(self.decoder[level], self._joined(self.up[level](x), skips.pop()))
        logits: Tensor = self.head(x)
        return _resize(logits, x_NCHW) if spec.resize_logits else logits

    def _joined(self, decoder: Tensor, skip: Tensor) -> Tensor:
        """Concatenate two maps; a method, so that both are freed before the next convolution."""
        pair = JOINS[self.spec.join](decoder, skip)
        return torch.cat(pair[::-1] if self.spec.concat == "skip_decoder" else pair, dim=1)


def _apply_layers(block: nn.Module, x_NCHW: Tensor) -> Tensor:
    """Apply layers one by one, freeing each input after use; ``nn.Sequential`` would keep its first
    input to the end, and the widest maps decide the peak memory of a tile.
    """
    for layer in block.children():
        x_NCHW = layer(x_NCHW)
    return x_NCHW


def _block(
    spec: UNetSpec, channels: int, out: int, middle: int = 0, dilation: int = 1,
    dropout: bool = False,
) -> nn.Sequential:  # fmt: skip
    """Create two 3×3 convolutions, each with ReLU and optional BatchNorm; dropout comes last.

    ``middle``: channels between the convolutions; 0: ``out``.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    padding = dilation if spec.padding == "same" else 0
    middle = middle or out
    for number, (before, after) in enumerate(((channels, middle), (middle, out)), start=1):
        layers[f"conv{number}"] = nn.Conv2d(
            before, after, 3, padding=padding, dilation=dilation, bias=spec.bias
        )
        norm: tuple[str, nn.Module] = f"norm{number}", nn.BatchNorm2d(after)
        relu: tuple[str, nn.Module] = f"relu{number}", nn.ReLU(inplace=True)
        order = {"none": [relu], "before_relu": [norm, relu], "after_relu": [relu, norm]}
        layers.update(order[spec.norm])
    if dropout and spec.dropout != "none":
        layers["dropout"] = (nn.Dropout2d if spec.dropout == "channels" else nn.Dropout)(0.5)
    return nn.Sequential(layers)


def _up(spec: UNetSpec, channels: int, out: int) -> nn.Sequential:
    """Create an up-sampling by 2 with ``out`` channels (unchanged if it has no convolution)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if spec.up.startswith("bilinear"):
        layers["resize"] = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    match spec.up:
        case "transpose" | "transpose3":
            pad = int(spec.up == "transpose3")  # a pixel on each side, so that 3×3 doubles too
            layers["conv"] = nn.ConvTranspose2d(channels, out, 2 + pad, 2, pad, pad)
        case "bilinear_conv":
            layers["conv"] = nn.Conv2d(channels, out, 1)
    if spec.up_relu:
        layers["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def _head(spec: UNetSpec) -> nn.Sequential:
    """Create the last convolution, from ``spec.width`` channels to the logits."""
    size = 1 if spec.head == "1x1" else 3
    layers = OrderedDict[str, nn.Module](
        conv=nn.Conv2d(spec.width, spec.classes, size, padding=size // 2)
    )
    if spec.head == "3x3_relu_norm":
        layers["relu"] = nn.ReLU(inplace=True)
        layers["norm"] = nn.BatchNorm2d(spec.classes)
    return nn.Sequential(layers)


def _init_weights(network: UNet, init: str) -> None:
    """Initialise all convolutions: He normal by fan-in or Xavier normal, zero biases."""
    if init == "torch":
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # each output of a 2×2 transposed convolution of stride 2 has one tap per channel
            taps = module.kernel_size[0] ** 2 if isinstance(module, nn.Conv2d) else 1
            if init == "xavier":
                nn.init.xavier_normal_(module.weight)
            else:
                nn.init.normal_(module.weight, std=(2 / (module.in_channels * taps)) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def fold_batchnorm(network: nn.Module) -> nn.Module:
    """Merge every BatchNorm that directly follows a convolution into it, in place.

    For inference: w' = w·γ/√(σ²+ε), b' = (b−μ)·γ/√(σ²+ε) + β. The network must be in eval mode.
    Only layers of plain ``nn.Sequential`` are merged, and only if they are neither subclasses nor
    have hooks or parametrised weights, which may compute something else.
    """
    for module in network.modules():
        if type(module) is not nn.Sequential:
            continue
        for index in range(len(module) - 1):
            conv, norm = module[index], module[index + 1]
            if _is_plain(conv, nn.Conv2d) and _is_plain(norm, nn.BatchNorm2d):
                module[index] = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
                module[index + 1] = nn.Identity()
    return network


def _is_plain(layer: nn.Module, kind: type[LayerT]) -> TypeGuard[LayerT]:
    """Return True for a layer of exactly this class without hooks, and with running statistics."""
    is_hooked = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is kind and not is_hooked and getattr(layer, "running_mean", 0) is not None
