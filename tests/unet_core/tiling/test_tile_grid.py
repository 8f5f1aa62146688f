import pytest

from unet_core.config.presets import PRESETS
from unet_core.errors import ConfigError
from unet_core.networks.reach import tiling_of
from unet_core.tiling.geometry import Sides, Tiling
from unet_core.tiling.tile_grid import tile_grid_for


@pytest.mark.parametrize(
    ("preset", "size"),
    [("padded", 1024), ("paper", 1020), ("valid3", 1020), ("transpose", 1024), ("dilated", 1024)],
)
def test_the_size_is_chosen_for_the_network(preset, size):
    assert tile_grid_for(tiling_of(PRESETS[preset])).size == size


def test_a_network_that_sees_far_gets_larger_tiles():
    far = Tiling(Sides(32, 32), 32, 0, 544, 1027, True, 64)
    assert tile_grid_for(far).size == 2176


@pytest.mark.parametrize(
    ("preset", "size", "words"),
    [
        ("padded", 192, "tile.size is 192, but this network needs 208 or more"),
        ("paper", 310, "tile.size = 310 is not possible .*300 and 316 are possible"),
        ("transpose", 1001, "multiples of 16; 992 and 1008 are possible"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_its_neighbours(preset, size, words):
    with pytest.raises(ConfigError, match=words):
        tile_grid_for(tiling_of(PRESETS[preset]), size=size)


def test_a_network_that_cannot_be_exact_says_so_and_blends(caplog):
    windows = tile_grid_for(tiling_of(PRESETS["bilinear"]))
    assert windows.blends
    assert "depends on the tile around it" in caplog.text
    caplog.clear()
    assert tile_grid_for(tiling_of(PRESETS["bilinear"]), mode="blend").blends
    assert tile_grid_for(tiling_of(PRESETS["padded"]), mode="blend").blends
    assert not caplog.text


def test_tiny_kept_parts_are_warned_of(caplog):
    tile_grid_for(tiling_of(PRESETS["padded"]), size=240)
    assert "keeps only the inner 48 pixels" in caplog.text
