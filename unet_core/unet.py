"""The U-Net (Ronneberger, Fischer, Brox 2015, arXiv 1505.04597) with its variants as options.

Shapes: N images, C channels, H×W pixels, K logits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from unet_core.presets import UNetSpec, preset


class DoubleConv(nn.Sequential):
    """Two padded 3×3 convolutions, each followed by BatchNorm (if asked for) and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: bool) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers.append(nn.Conv2d(channels, out_channels, 3, padding=1))
            if norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class UNet(nn.Module):
    """Contracting path, bottom, expanding path with skips, 1×1 head.

    ``forward`` maps NCHW (float, already normalised, H and W multiples of ``spec.stride``) to
    NKHW logits; softmax and sigmoid belong to the caller.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        widths = [spec.width * 2**level for level in range(spec.depth + 1)]
        inputs = [spec.in_channels, *widths]
        self.encoder = nn.ModuleList(
            DoubleConv(inputs[level], widths[level], spec.norm) for level in range(spec.depth)
        )
        self.bottom = DoubleConv(inputs[spec.depth], widths[spec.depth], spec.norm)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(widths[level + 1], widths[level], 2, stride=2)
            for level in range(spec.depth)
        )
        self.decoder = nn.ModuleList(
            DoubleConv(2 * widths[level], widths[level], spec.norm) for level in range(spec.depth)
        )
        self.head = nn.Conv2d(spec.width, spec.classes, 1)

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> "UNet":
        """Build a named network; options are fields of ``UNetSpec``."""
        return cls(preset(name, **options))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits NKHW of images NCHW."""
        x, skips = x_NCHW, []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for level in reversed(range(self.spec.depth)):
            x = self.up[level](x)
            pair = (x, skips[level])
            if self.spec.concat == "skip_decoder":
                pair = (skips[level], x)
            x = self.decoder[level](torch.cat(pair, dim=1))
        logits: Tensor = self.head(x)
        return logits


def fold_batchnorm(network: UNet) -> UNet:
    """Merge every BatchNorm that directly follows a convolution into it, in place.

    For inference: w' = w·γ/√(σ²+ε), b' = (b−μ)·γ/√(σ²+ε) + β. The network must be in eval mode.
    """
    for module in network.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for index in range(len(module) - 1):
            conv, norm = module[index], module[index + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[index] = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
                module[index + 1] = nn.Identity()
    return network
