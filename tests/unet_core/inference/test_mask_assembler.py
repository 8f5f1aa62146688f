"""Mask windows: filled in any order, let go when complete, blended by weight."""

import numpy as np
import pytest

from unet_core.errors import ImageError
from unet_core.images.decoder import Picture, Pixels
from unet_core.images.sample import Sample
from unet_core.inference import mask_assembler as module
from unet_core.inference.engine import Segmented
from unet_core.inference.mask_assembler import Canvas, importance
from unet_core.inference.postprocessing import Postprocessing
from unet_core.tiling.geometry import Sides, Tiling
from unet_core.tiling.windows import Windows

TILING = Tiling(Sides(16, 16), 16, 0, 16, 33, True, 1)


@pytest.fixture
def small_mask_windows(monkeypatch):
    """Mask windows of 64 pixels, as large images have them of 4096."""
    monkeypatch.setattr("unet_core.tiling.geometry.MASK_WINDOW_PIXELS", 1000)
    monkeypatch.setattr("unet_core.tiling.geometry.MASK_WINDOW_SIDE", 64)
    monkeypatch.setattr(module, "MASK_WINDOW_SIDE", 64)


def make_canvas(shape, windows, look):
    picture = Picture(
        Sample("a.png", "a", "", bytes), Pixels.of(np.zeros((1, *shape), np.uint8)),
        np.zeros(1), np.ones(1),
    )  # fmt: skip
    return Canvas(0, picture, windows, look)


def fill(canvas, results):
    order = np.random.default_rng(0).permutation(len(canvas.tiles))
    areas = []
    for index in order:
        tile = canvas.tiles[index]
        areas += canvas.paste(tile, results(tile))
    assert canvas.is_complete
    return areas


def test_areas_hold_what_their_tiles_gave(small_mask_windows):
    wanted_HW = np.random.default_rng(1).integers(0, 5, (150, 203), dtype=np.uint8)
    canvas = make_canvas(
        wanted_HW.shape, Windows(80, TILING), Postprocessing(5, probabilities="uint8")
    )

    def results(tile):
        mask_HW = wanted_HW[tile.target]
        return Segmented(mask_HW, 7, True, np.stack([mask_HW] * 5))

    areas = fill(canvas, results)
    assert len(areas) == 3 * 4
    assert canvas.confidence_sum == 7 * len(canvas.tiles)
    assert not canvas._open
    for area in areas:
        y, x, height, width = area.box
        assert (area.mask_HW == wanted_HW[y : y + height, x : x + width]).all()
        assert (area.probabilities_KHW[3] == area.mask_HW).all()


@pytest.mark.parametrize("logits", [1, 3])
def test_blended_areas_are_weighted_means(small_mask_windows, logits):
    random = np.random.default_rng(2)
    canvas = make_canvas((150, 203), Windows(80, TILING, blends=True), Postprocessing(logits, 0.4))
    p_of = {tile: random.random((logits, *tile.shape), np.float32) for tile in canvas.tiles}
    total_KHW, weight_HW = np.zeros((logits, 160, 208)), np.zeros((160, 208))
    for tile, p_KHW in p_of.items():
        at = slice(tile.y.start, tile.y.stop), slice(tile.x.start, tile.x.stop)
        total_KHW[:, *at] += p_KHW * importance(80, 80)
        weight_HW[at] += importance(80, 80)
    mean_KHW = (total_KHW / weight_HW)[:, :150, :203]
    expected_HW = mean_KHW[0] > 0.4 if logits == 1 else mean_KHW.argmax(0)

    def results(tile):
        rows, columns = tile.kept(0)
        return Segmented(None, 0, True, p_of[tile][:, rows, columns])

    confidence = 0
    for area in fill(canvas, results):
        y, x, height, width = area.box
        assert (area.mask_HW == expected_HW[y : y + height, x : x + width]).all()
        confidence += area.confidence_sum
    chosen = mean_KHW.max(0)
    if logits == 1:
        chosen = np.where(expected_HW, mean_KHW[0], 1 - mean_KHW[0])
    assert confidence / 65535 == pytest.approx(chosen.sum(), rel=1e-5)


def test_a_single_blended_tile_is_not_weighted():
    p_KHW = np.random.default_rng(0).random((1, 32, 48), np.float32)
    canvas = make_canvas(
        (32, 48), Windows(80, TILING, blends=True), Postprocessing(1, probabilities="uint8")
    )
    (area,) = fill(canvas, lambda tile: Segmented(None, 0, True, p_KHW))
    assert (area.mask_HW == (p_KHW[0] > 0.5)).all()
    assert (area.probabilities_KHW == np.rint(p_KHW * 255)).all()


def test_a_tile_that_is_not_finite_fails_its_image():
    canvas = make_canvas((32, 48), Windows(80, TILING), Postprocessing(1))
    fill(canvas, lambda tile: Segmented(np.zeros((32, 48), np.uint8), 0, False))
    assert canvas.failure.code == "not_finite"


def test_a_blended_image_that_is_not_finite_fails_alone():
    canvas = make_canvas((32, 48), Windows(80, TILING, blends=True), Postprocessing(1))
    p_KHW = np.full((1, 32, 48), np.nan, np.float32)
    (area,) = fill(canvas, lambda tile: Segmented(None, 0, False, p_KHW))
    assert area.confidence_sum == 32 * 48 * 65535
    assert canvas.failure.code == "not_finite"


def test_the_reason_of_a_failure_does_not_depend_on_who_comes_first():
    canvas = make_canvas((150, 203), Windows(80, TILING), Postprocessing(1))
    first, *_, last = canvas.tiles
    canvas.fail(last, ImageError("decode", "at the end"))
    canvas.fail(first, ImageError("not_finite", "here"), rank=1)
    canvas.fail(first, ImageError("decode", "at the beginning"))
    assert str(canvas.failure) == "at the beginning"


def test_blended_weights_are_largest_in_the_middle_of_what_a_valid_network_gives():
    valid = Tiling(Sides(28, 16), 16, 8, 0, 17, False, 1)
    canvas = make_canvas((100, 28), Windows(60, valid, blends=True), Postprocessing(1))
    upper, lower, *_ = canvas.tiles

    def results(tile):
        shape = tuple(s.stop - s.start for s in tile.target)
        return Segmented(None, 0, True, np.full((1, *shape), float(tile == lower), np.float32))

    (area,) = fill(canvas, results)
    meeting = (upper.y.keep_stop + lower.y.keep_start) // 2
    assert not area.mask_HW[: meeting - 1].any()
    assert area.mask_HW[meeting + 1 : lower.y.keep_start + 20].all()
