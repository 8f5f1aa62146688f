"""The U-Net (Ronneberger, Fischer, Brox 2015, arXiv 1505.04597) with its variants as options.

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
    """Cut the centre of the skip; half a pixel rounds down, or to an even offset."""
    for axis in (-2, -1):
        spare = skip.shape[axis] - decoder.shape[axis]
        half = spare // 2
        offset = half + (spare % 2) * (half % 2) if to_even else half
        skip = skip.narrow(axis, offset, decoder.shape[axis])
    return decoder, skip


def _pad(decoder: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Surround the decoder's map with zeros, half a pixel less at the left and the top."""
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
    """Contracting path, bottom, expanding path with skips, head.

    ``forward`` maps NCHW (float, already normalised, H and W as ``spec.sides`` allows) to NKHW
    logits, ``2 * spec.margin`` pixels smaller; softmax and sigmoid belong to the caller.
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
        # what leaves each decoder block; without a convolution the up-sampling halves nothing
        outputs = widths if spec.bottom == "double" else [spec.width, *widths[:-1]]
        below = [*outputs[1:], bottom]
        self.up = nn.ModuleList(map(partial(_up, spec), below, widths))
        middles = widths if spec.decoder_middle == "wide" else outputs
        self.decoder = nn.ModuleList(
            _block(spec, 2 * width, out, middle)
            for width, out, middle in zip(widths, outputs, middles, strict=True)
        )
        self.head = _head(spec)
        _initialise(self, spec.init)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits NKHW of images NCHW."""
        spec, x, skips = self.spec, x_NCHW, []
        for block in self.encoder:
            x = _through(block, x)
            pooled = self.pool(x)
            skips.append(x if spec.skip == "encoded" else pooled)
            x = pooled
        x = self.bottom(x)
        for level in reversed(range(spec.depth)):
            x = _through(self.decoder[level], self._joined(self.up[level](x), skips.pop()))
        logits: Tensor = self.head(x)
        return _resize(logits, x_NCHW) if spec.resize_logits else logits

    def _joined(self, decoder: Tensor, skip: Tensor) -> Tensor:
        """Both maps in one; they are let go here, before the next convolution needs memory."""
        pair = JOINS[self.spec.join](decoder, skip)
        return torch.cat(pair[::-1] if self.spec.concat == "skip_decoder" else pair, dim=1)


def _through(block: nn.Module, x_NCHW: Tensor) -> Tensor:
    """One layer after the other, each input let go as soon as it was used: the widest maps decide
    what memory a tile takes, and ``nn.Sequential`` would hold its first input to the end.
    """
    for layer in block.children():
        x_NCHW = layer(x_NCHW)
    return x_NCHW


def _block(
    spec: UNetSpec, channels: int, out: int, middle: int = 0, dilation: int = 1,
    dropout: bool = False,
) -> nn.Sequential:  # fmt: skip
    """Two 3×3 convolutions, each with ReLU and (if asked for) BatchNorm."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    padding = dilation if spec.padding == "same" else 0
    middle = middle or out
    for number, (before, after) in enumerate(((channels, middle), (middle, out)), start=1):
        conv = nn.Conv2d(before, after, 3, padding=padding, dilation=dilation, bias=spec.bias)
        layers[f"conv{number}"] = conv
        norm: tuple[str, nn.Module] = f"norm{number}", nn.BatchNorm2d(after)
        relu: tuple[str, nn.Module] = f"relu{number}", nn.ReLU(inplace=True)
        order = {"none": [relu], "before_relu": [norm, relu], "after_relu": [relu, norm]}
        layers.update(order[spec.norm])
    if dropout and spec.dropout != "none":
        layers["dropout"] = (nn.Dropout2d if spec.dropout == "channels" else nn.Dropout)(0.5)
    return nn.Sequential(layers)


def _up(spec: UNetSpec, channels: int, out: int) -> nn.Sequential:
    """Twice the size; ``out`` channels, unless nothing is convolved."""
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
    size = 1 if spec.head == "1x1" else 3
    conv = nn.Conv2d(spec.width, spec.classes, size, padding=size // 2)
    layers = OrderedDict[str, nn.Module](conv=conv)
    if spec.head == "3x3_relu_norm":
        layers["relu"] = nn.ReLU(inplace=True)
        layers["norm"] = nn.BatchNorm2d(spec.classes)
    return nn.Sequential(layers)


def _initialise(network: UNet, init: str) -> None:
    """He's normal by fan-in for every convolution with a bias of zero, or Xavier's."""
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
    Only plain ``nn.Sequential`` is looked into, and only plain layers are merged: what else a
    module does, as a subclass, by hooks or with its weights made anew, is its own matter.
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
    """Whether a layer does what its class does and nothing else, with statistics if it has any."""
    is_hooked = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is kind and not is_hooked and getattr(layer, "running_mean", 0) is not None
