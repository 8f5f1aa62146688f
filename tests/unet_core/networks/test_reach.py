"""Measured reaches of networks, compared with gradients and with the table of the originals."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.reference.gradient_reach import reaches
from tests.support.foreign import small
from unet_core.config.presets import PRESETS, UNetSpec, preset
from unet_core.errors import CheckpointError
from unet_core.networks import reach
from unet_core.networks.unet import UNet
from unet_core.tiling.geometry import Sides

THIN = {"in_channels": 1, "classes": 1, "width": 1}


@pytest.mark.parametrize(
    "spec",
    [*(preset("padded", depth=depth, **THIN) for depth in (1, 2, 3, 4, 5)),
     *(preset(name, **THIN) for name in ("paper", "valid3", "concat-pad", "transpose"))],
    ids=str,
)  # fmt: skip
def test_the_impulse_reaches_as_far_as_the_gradient(spec: UNetSpec):
    found = reach._reaches(UNet(spec), 1, spec.sides, spec.stride, spec.margin)
    assert found == reaches(spec)


@pytest.mark.parametrize(
    ("name", "smallest", "step", "margin", "halo", "field", "is_exact"),
    [
        ("padded", 16, 16, 0, 96, 204, True),
        ("bilinear", 16, 1, 0, 112, 236, False),
        ("transpose", 16, 1, 0, 96, 204, True),
        ("paper", 188, 16, 92, 0, 204, True),
        ("valid3", 92, 8, 44, 8, 108, True),
        ("dilated", 233, 1, 0, 0, 0, False),
        ("concat-crop", 188, 16, 92, 0, 204, True),
        ("concat-pad", 140, 1, 4, 96, 204, True),
        ("concat-same", 16, 16, 0, 96, 204, True),
        ("plain", 16, 16, 0, 96, 204, True),
    ],
)
def test_presets_have_their_tiling(name, smallest, step, margin, halo, field, is_exact):
    tiling = reach.tiling_of(PRESETS[name])
    assert (tiling.sides, tiling.margin) == (Sides(smallest, step), margin)
    assert (tiling.halo, tiling.receptive_field, tiling.is_exact) == (halo, field, is_exact)


@pytest.mark.parametrize("name", [n for n, spec in PRESETS.items() if spec.moves_with_input])
def test_windows_are_exact_and_with_a_smaller_halo_they_are_not(name):
    torch.manual_seed(0)
    spec = replace(PRESETS[name], width=2)
    network, tiling = UNet(spec), reach.tiling_of(spec)
    for at_edges in (True, False):
        assert reach.is_exact(network, spec.in_channels, tiling, at_edges)
        if tiling.halo:
            less = replace(tiling, halo=tiling.halo - tiling.stride)
            assert not reach.is_exact(network, spec.in_channels, less, at_edges)


def test_a_network_of_somebody_else_is_found_out():
    tiling = reach.tiling_of_module(small(), 1)
    assert (tiling.sides, tiling.stride, tiling.halo) == (Sides(2, 2), 2, 2)
    assert tiling.is_exact
    padded = reach.tiling_of_module(UNet(preset("padded", in_channels=1, width=2)), 1)
    ours = reach.tiling_of(preset("padded", in_channels=1, width=2))
    assert padded == ours


def test_a_network_that_sees_everything_is_not_exact():
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), nn.Conv2d(2, 1, 1))
    tiling = reach.tiling_of_module(network, 1)
    assert not tiling.is_exact
    assert tiling.receptive_field == 0


def test_a_declared_stride_is_taken_and_another_output_size_is_refused():
    assert reach.tiling_of_module(small(), 1, stride=4).stride == 4
    with pytest.raises(CheckpointError, match=r"does not give logits N×K×H×W for N×1×H×W"):
        reach.tiling_of_module(nn.Conv2d(1, 1, 3, stride=2), 1)
