"""Tiles against one pass over the whole image: in double precision, the same logits."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference.whole_image import whole_pass
from unet_core.config.presets import PRESETS, preset
from unet_core.images.raster import ArrayRaster
from unet_core.inference.tile_queue import cut_tile
from unet_core.networks.reach import tiling_of
from unet_core.networks.unet import UNet
from unet_core.tiling.tile_grid import TileGrid, tile_grid_for

pytestmark = pytest.mark.slow
EXACT = [name for name, spec in PRESETS.items() if spec.moves_with_input]


@functools.cache
def network_of(name: str) -> UNet:
    """A narrow network in double precision, with statistics as if it had been trained."""
    torch.manual_seed(len(name))
    network = UNet(preset(name, in_channels=1, classes=2, width=1))
    for key, buffer in network.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return network.double().eval()


@torch.inference_mode()
def tiled_logits(network, tiling, x_CHW, size, batch):
    """Logits KHW from batches of tiles of one shape."""
    height, width = x_CHW.shape[1:]
    cut = TileGrid(size, tiling).over(height, width)
    result = np.full((2, height, width), np.nan)
    for shape in {tile.shape for tile in cut}:
        alike = [tile for tile in cut if tile.shape == shape]
        for at in range(0, len(alike), batch):
            some = alike[at : at + batch]
            x_NCHW = np.stack([cut_tile(ArrayRaster(x_CHW), tile).pixels_CHW for tile in some])
            for tile, logits in zip(some, network(torch.from_numpy(x_NCHW)).numpy(), strict=True):
                result[:, *tile.target] = logits[:, *tile.kept(tiling.margin)]
    return result


@settings(max_examples=240, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(EXACT),
    height=st.integers(1, 330),
    width=st.integers(1, 330),
    more=st.integers(32, 140),
    batch=st.integers(1, 4),
)
def test_tiles_give_the_logits_of_the_whole(name, height, width, more, batch):
    network, tiling = network_of(name), tiling_of(network_of(name).spec)
    x_CHW = np.random.default_rng(height * 1000 + width).random((1, height, width))
    size = tiling.tile_sides.at_least(tiling.smallest_tile + more)
    tiled = tiled_logits(network, tiling, x_CHW, size, batch)
    assert np.abs(tiled - whole_pass(network, tiling, x_CHW)).max() <= 1e-10


@pytest.mark.parametrize("name", EXACT)
def test_flips_of_tiles_are_tiles_of_the_flipped_image(name):
    """What test-time augmentation relies on."""
    network = network_of(name)
    tiling = tiling_of(network.spec).aligned()
    x_CHW = np.random.default_rng(3).random((1, 303, 290))
    size = tiling.tile_sides.at_least(tiling.smallest_tile + 64)
    flipped = tile_grid_for(tiling, size=size, tta="flips")
    whole, tiled = 0.0, 0.0
    for axes in ((), (1,), (2,), (1, 2)):

        def turned(x_NCHW, axes=axes):
            dims = [axis + 1 for axis in axes]
            return network(x_NCHW.flip(dims)).flip(dims)

        whole = whole + whole_pass(turned, tiling, x_CHW)
        tiled = tiled + tiled_logits(turned, tiling, x_CHW, flipped.size, 2)
    assert np.abs(tiled - whole).max() <= 1e-10
