"""Networks of other people, as a user's own module would offer them to ``model.factory``."""

from typing import Any

import torch
from torch import nn


def declare_torchvision() -> None:
    """Where torch has no CUDA, the registry's torchvision finds its operators undeclared."""
    if not _declared and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


def smp_unet(**arguments: Any) -> nn.Module:
    """segmentation_models_pytorch's Unet, without a download of weights."""
    declare_torchvision()
    import segmentation_models_pytorch as smp

    return smp.Unet(encoder_weights=None, **arguments)


_declared: list[torch.library.Library] = []


def small(in_channels: int = 1, classes: int = 1) -> nn.Module:
    """Three layers of the plainest kind, with a stride of 2."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, classes, 2, stride=2),
    )


def not_a_network() -> int:
    return 3
