import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unet_core.geometry import mask_windows, reach, tiles
from unet_core.presets import preset
from unet_core.unet import UNet

STRIDE, HALO = 16, 112


@given(st.integers(1, 900), st.integers(1, 900), st.integers(15, 30))
def test_kept_parts_cover_the_image_once_and_keep_their_halo(height, width, steps):
    size = steps * STRIDE
    covered = np.zeros((height, width), dtype=int)
    for tile in tiles(height, width, size, HALO, STRIDE):
        covered[tile.y.keep_start : tile.y.keep_stop, tile.x.keep_start : tile.x.keep_stop] += 1
        for span, length in ((tile.y, height), (tile.x, width)):
            padded = -(-length // STRIDE) * STRIDE
            assert span.start % STRIDE == 0
            assert span.stop - span.start == min(size, padded)
            assert span.start == 0 or span.keep_start - span.start >= HALO
            assert span.stop == padded or span.stop - span.keep_stop >= HALO
    assert (covered == 1).all()


def test_an_image_that_fits_is_one_tile():
    (tile,) = tiles(700, 1000, 1024, HALO, STRIDE)
    assert tile.shape == (704, 1008)


def test_a_window_without_room_for_its_halo_is_refused():
    with pytest.raises(ValueError, match="no exact windows"):
        tiles(1000, 1000, 224, HALO, STRIDE)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_reach_is_what_an_input_gradient_reaches(depth):
    network = UNet(preset("padded", in_channels=1, width=1, depth=depth, norm=False)).double()
    network.pool = torch.nn.AvgPool2d(2)  # a maximum would hide three pixels of four
    for weight in network.parameters():
        torch.nn.init.constant_(weight, 1.0)
    stride, side = 2**depth, 2 * (reach(depth) // 2**depth + 2) * 2**depth
    farthest = 0
    for phase in range(stride):
        middle = side // 2 + phase
        x = torch.ones(1, 1, stride, side, dtype=torch.double, requires_grad=True)
        network(x)[0, 0, :, middle].sum().backward()
        touched = x.grad[0, 0].abs().sum(0).nonzero().ravel()
        farthest = max(farthest, middle - int(touched.min()), int(touched.max()) - middle)
    assert farthest == reach(depth)


def test_mask_windows_cover_a_large_image_in_fixed_steps():
    assert mask_windows(8192, 8192) == [(0, 0, 8192, 8192)]
    windows = mask_windows(10_000, 9_000)
    assert sum(height * width for _, _, height, width in windows) == 90_000_000
    assert windows[0] == (0, 0, 4096, 4096)
    assert windows[-1] == (8192, 8192, 1808, 808)
