import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet_core.tiling.geometry import Box, Sides, Tiling, mask_windows, overlapping_spans
from unet_core.tiling.tile_grid import TileGrid

TILINGS = {
    "padded": Tiling(Sides(16, 16), 16, 0, 96, 204, True, 1),
    "any size": Tiling(Sides(16, 1), 16, 0, 112, 204, True, 1),
    "valid": Tiling(Sides(188, 16), 16, 92, 0, 204, True, 1),
    "valid with halo": Tiling(Sides(92, 8), 8, 44, 8, 108, True, 1),
    "valid, padded": Tiling(Sides(140, 1), 16, 4, 112, 204, True, 1),
}


@given(
    st.sampled_from(sorted(TILINGS)), st.integers(1, 900), st.integers(1, 900), st.integers(0, 300)
)
def test_kept_parts_cover_the_image_once_and_keep_their_halo(name, height, width, more):
    tiling = TILINGS[name]
    margin, halo = tiling.margin, tiling.halo
    size = tiling.tile_sides.at_least(tiling.smallest_tile + more)
    covered = np.zeros((height, width), dtype=int)
    for tile in TileGrid(size, tiling).over(height, width):
        covered[tile.target] += 1
        for span, length in ((tile.y, height), (tile.x, width)):
            start, stop = span.start + margin, span.stop - margin
            end = tiling.sides.at_least(length + 2 * margin) - 2 * margin
            assert span.stop - span.start in tiling.sides
            assert span.stop - span.start <= max(size, tiling.sides.smallest)
            assert start % tiling.stride == 0
            assert start == 0 or span.keep_start - start >= halo
            assert stop == end or stop - span.keep_stop >= halo
    assert (covered == 1).all()


@given(st.sampled_from(sorted(TILINGS)), st.integers(1, 900), st.integers(0, 300))
def test_blended_tiles_cover_the_image_and_stay_inside(name, length, more):
    tiling = TILINGS[name]
    size = tiling.tile_sides.at_least(tiling.sides.smallest + 2 * tiling.stride + more)
    covered = np.zeros(length, dtype=int)
    for span in overlapping_spans(length, size, tiling):
        covered[span.keep_start : span.keep_stop] += 1
        assert span.stop - span.start in tiling.sides
        assert span.keep_start == span.start + tiling.margin
    assert covered.min() >= 1


def test_an_image_that_fits_is_one_tile():
    (tile,) = TileGrid(1024, TILINGS["padded"]).over(700, 1000)
    assert tile.shape == (704, 1008)
    (tile,) = TileGrid(1020, TILINGS["valid"]).over(700, 832)
    assert tile.shape == (892, 1020)
    assert (tile.y.start, tile.y.keep_start, tile.y.keep_stop) == (-92, 0, 700)


def test_a_tile_without_room_for_its_halo_is_refused():
    with pytest.raises(ValueError, match="no exact tiles"):
        TileGrid(192, TILINGS["padded"]).over(1000, 1000)


def test_sides_name_their_neighbours():
    paper = Sides(188, 16)
    assert 572 in paper
    assert 310 not in paper
    assert paper.near(310) == "300 and 316 are possible"
    assert paper.near(100) == "188 is the smallest"


def test_mask_windows_cover_a_large_image_in_fixed_steps():
    assert mask_windows(8192, 8192) == [(0, 0, 8192, 8192)]
    windows = mask_windows(10_000, 9_000)
    assert sum(height * width for _, _, height, width in windows) == 90_000_000
    assert windows[0] == (0, 0, 4096, 4096)
    assert windows[-1] == (8192, 8192, 1808, 808)


def test_what_a_box_shares_is_told_in_both_coordinates():
    here, there = Box(10, 20, 30, 40).intersection(slice(0, 15), slice(50, 100))
    assert here == (slice(0, 5), slice(30, 40))
    assert there == (slice(10, 15), slice(0, 10))
