"""The obvious twin of the impulse response: the reach of one logit's gradient, phase by phase."""

import torch

from unet_core.config.presets import UNetSpec
from unet_core.networks.unet import UNet


def reaches(spec: UNetSpec) -> list[tuple[int, int]]:
    """For each phase of the stride: the first and last input line that logit 0 depends on."""
    network = UNet(spec).double().eval()
    network.pool = torch.nn.AvgPool2d(2, ceil_mode=spec.ceil_pool)  # a maximum hides three of four
    for weight in network.parameters():
        torch.nn.init.constant_(weight, 1.0)
    side = spec.sides.at_least(600)
    x = torch.ones(1, 1, spec.sides.smallest, side, dtype=torch.double, requires_grad=True)
    logits = network(x)[0, 0].sum(0)
    middle = len(logits) // 2 // spec.stride * spec.stride
    found = []
    for phase in range(spec.stride):
        (gradient,) = torch.autograd.grad(logits[middle + phase], x, retain_graph=True)
        touched = gradient[0, 0].abs().sum(0).nonzero().ravel()
        found.append((int(touched.min()) - middle - phase, int(touched.max()) - middle - phase))
    return found
