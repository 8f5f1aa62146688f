"""Mask windows: filled in any order, let go when complete, blended by weight."""

import numpy as np
import pytest

from unet_core.errors import ImageError
from unet_core.images.decoder import DecodedImage
from unet_core.images.raster import ArrayRaster
from unet_core.images.sample import Sample
from unet_core.inference import mask_assembler as module
from unet_core.inference.engine import TileResult
from unet_core.inference.mask_assembler import MaskAssembler, importance
from unet_core.inference.postprocessing import Postprocessing
from unet_core.tiling.geometry import Sides, Tiling
from unet_core.tiling.tile_grid import TileGrid

TILING = Tiling(Sides(16, 16), 16, 0, 16, 33, True, 1)


@pytest.fixture
def small_mask_windows(monkeypatch):
    """Mask windows of 64 pixels, as large images have them of 4096."""
    monkeypatch.setattr("unet_core.tiling.geometry.MASK_WINDOW_PIXELS", 1000)
    monkeypatch.setattr("unet_core.tiling.geometry.MASK_WINDOW_SIDE", 64)
    monkeypatch.setattr(module, "MASK_WINDOW_SIDE", 64)


def make_assembler(shape, windows, look):
    decoded = DecodedImage(
        Sample("a.png", "a", "", bytes), ArrayRaster(np.zeros((1, *shape), np.uint8)),
        np.zeros(1), np.ones(1),
    )  # fmt: skip
    return MaskAssembler(0, decoded, windows, look)


def fill(assembler, results):
    order = np.random.default_rng(0).permutation(len(assembler.tiles))
    windows = []
    for index in order:
        tile = assembler.tiles[index]
        windows += assembler.paste(tile, results(tile))
    assert assembler.is_complete
    return windows


def test_areas_hold_what_their_tiles_gave(small_mask_windows):
    wanted_HW = np.random.default_rng(1).integers(0, 5, (150, 203), dtype=np.uint8)
    assembler = make_assembler(
        wanted_HW.shape, TileGrid(80, TILING), Postprocessing(5, probabilities="uint8")
    )

    def results(tile):
        mask_HW = wanted_HW[tile.target]
        return TileResult(mask_HW, 7, True, np.stack([mask_HW] * 5))

    windows = fill(assembler, results)
    assert len(windows) == 3 * 4
    assert assembler.confidence_sum == 7 * len(assembler.tiles)
    assert not assembler._open
    for window in windows:
        y, x, height, width = window.box
        assert (window.mask_HW == wanted_HW[y : y + height, x : x + width]).all()
        assert (window.probabilities_KHW[3] == window.mask_HW).all()


@pytest.mark.parametrize("logits", [1, 3])
def test_blended_areas_are_weighted_means(small_mask_windows, logits):
    random = np.random.default_rng(2)
    assembler = make_assembler(
        (150, 203), TileGrid(80, TILING, blends=True), Postprocessing(logits, 0.4)
    )
    p_of = {tile: random.random((logits, *tile.shape), np.float32) for tile in assembler.tiles}
    total_KHW, weight_HW = np.zeros((logits, 160, 208)), np.zeros((160, 208))
    for tile, p_KHW in p_of.items():
        at = slice(tile.y.start, tile.y.stop), slice(tile.x.start, tile.x.stop)
        total_KHW[:, *at] += p_KHW * importance(80, 80)
        weight_HW[at] += importance(80, 80)
    mean_KHW = (total_KHW / weight_HW)[:, :150, :203]
    expected_HW = mean_KHW[0] > 0.4 if logits == 1 else mean_KHW.argmax(0)

    def results(tile):
        rows, columns = tile.kept(0)
        return TileResult(None, 0, True, p_of[tile][:, rows, columns])

    confidence = 0
    for window in fill(assembler, results):
        y, x, height, width = window.box
        assert (window.mask_HW == expected_HW[y : y + height, x : x + width]).all()
        confidence += window.confidence_sum
    chosen = mean_KHW.max(0)
    if logits == 1:
        chosen = np.where(expected_HW, mean_KHW[0], 1 - mean_KHW[0])
    assert confidence / 65535 == pytest.approx(chosen.sum(), rel=1e-5)


def test_a_single_blended_tile_is_not_weighted():
    p_KHW = np.random.default_rng(0).random((1, 32, 48), np.float32)
    assembler = make_assembler(
        (32, 48), TileGrid(80, TILING, blends=True), Postprocessing(1, probabilities="uint8")
    )
    (window,) = fill(assembler, lambda tile: TileResult(None, 0, True, p_KHW))
    assert (window.mask_HW == (p_KHW[0] > 0.5)).all()
    assert (window.probabilities_KHW == np.rint(p_KHW * 255)).all()


def test_a_tile_that_is_not_finite_fails_its_image():
    assembler = make_assembler((32, 48), TileGrid(80, TILING), Postprocessing(1))
    fill(assembler, lambda tile: TileResult(np.zeros((32, 48), np.uint8), 0, False))
    assert assembler.failure.code == "not_finite"


def test_a_blended_image_that_is_not_finite_fails_alone():
    assembler = make_assembler((32, 48), TileGrid(80, TILING, blends=True), Postprocessing(1))
    p_KHW = np.full((1, 32, 48), np.nan, np.float32)
    (window,) = fill(assembler, lambda tile: TileResult(None, 0, False, p_KHW))
    assert window.confidence_sum == 32 * 48 * 65535
    assert assembler.failure.code == "not_finite"


def test_the_reason_of_a_failure_does_not_depend_on_who_comes_first():
    assembler = make_assembler((150, 203), TileGrid(80, TILING), Postprocessing(1))
    first, *_, last = assembler.tiles
    assembler.fail(last, ImageError("decode", "at the end"))
    assembler.fail(first, ImageError("not_finite", "here"), rank=1)
    assembler.fail(first, ImageError("decode", "at the beginning"))
    assert str(assembler.failure) == "at the beginning"


def test_blended_weights_are_largest_in_the_middle_of_what_a_valid_network_gives():
    valid = Tiling(Sides(28, 16), 16, 8, 0, 17, False, 1)
    assembler = make_assembler((100, 28), TileGrid(60, valid, blends=True), Postprocessing(1))
    upper, lower, *_ = assembler.tiles

    def results(tile):
        shape = tuple(s.stop - s.start for s in tile.target)
        return TileResult(None, 0, True, np.full((1, *shape), float(tile == lower), np.float32))

    (window,) = fill(assembler, results)
    meeting = (upper.y.keep_stop + lower.y.keep_start) // 2
    assert not window.mask_HW[: meeting - 1].any()
    assert window.mask_HW[meeting + 1 : lower.y.keep_start + 20].all()
