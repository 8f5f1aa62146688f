import numpy as np
import pytest

from tests.support.data import reading, tiff
from tests.support.rasters import assert_windows_are_cuts
from unet_core.errors import ImageError
from unet_core.images import large_tiff
from unet_core.images.decoder import Decoder
from unet_core.images.large_tiff import open_large
from unet_core.images.preprocessing import Preprocessing, in_color, to_color
from unet_core.images.raster import IN_MEMORY, ArrayRaster, Raster, converted
from unet_core.images.sample import Sample
from unet_core.storage.ranges import Ranged
from unet_core.tiling.geometry import Box

RANDOM = np.random.default_rng(0)
RGB_CHW = RANDOM.integers(0, 256, (3, 150, 117), dtype=np.uint8)
GRAY_CHW = to_color(RGB_CHW, "gray")
IDS_HW = RANDOM.integers(0, 2, (150, 117), dtype=np.uint8)
TILED = {"tile": (32, 48), "compression": "deflate"}
RGB_TIFF = tiff(RGB_CHW.transpose(1, 2, 0), photometric="rgb", **TILED)


@pytest.fixture
def small_is_large(monkeypatch):
    monkeypatch.setattr(large_tiff, "SMALL_PIXELS", 10_000)


def opened(data, **options):
    return open_large(Ranged(len(data), lambda a, b: data[a:b]), reading(10**6), **options)


def decoded(mask, **keys):
    """A gray image of the RGB file, with its truth."""
    sample = Sample("a", "a", "a.tif", lambda: RGB_TIFF, lambda: mask)
    decoder = Decoder(Preprocessing(color="gray", normalization="range"), 2, reading(10**6, **keys))
    (image,) = decoder.decode(sample)
    return image


def test_an_array_is_a_raster():
    raster = ArrayRaster(RGB_CHW)
    assert isinstance(raster, Raster)
    assert (raster.segment_side, raster.held_bytes) == (IN_MEMORY, RGB_CHW.nbytes)
    assert_windows_are_cuts(raster, RGB_CHW)
    assert raster.whole().valid_HW is None


def test_validity_is_cut_like_pixels_and_kept_by_conversion():
    valid_HW = IDS_HW == 1
    raster = converted(ArrayRaster(RGB_CHW, valid_HW), lambda window: in_color(window, "gray"), 1)
    assert raster.held_bytes == GRAY_CHW.nbytes + valid_HW.nbytes
    assert_windows_are_cuts(raster, GRAY_CHW)
    window = raster.read(Box(5, 7, 30, 40))
    np.testing.assert_array_equal(window.valid_HW, valid_HW[5:35, 7:47])


def test_a_large_tiff_is_a_raster_of_pixels_or_stored_labels(small_is_large):
    raster = opened(RGB_TIFF, cache_bytes=10**6)
    assert (raster.segment_side, raster.held_bytes) == ((32, 48), 10**6)
    assert_windows_are_cuts(raster, RGB_CHW)
    assert_windows_are_cuts(opened(tiff(IDS_HW, **TILED), as_labels=True), IDS_HW[None])


def test_colors_of_a_raster_are_those_of_its_pixels(small_is_large):
    tiff_raster = opened(RGB_TIFF)
    for raster in (tiff_raster, ArrayRaster(RGB_CHW)):
        gray = converted(raster, lambda window: in_color(window, "gray"), 1)
        assert gray.segment_side == raster.segment_side
        assert_windows_are_cuts(gray, GRAY_CHW)
    assert converted(tiff_raster, lambda window: window, 3).held_bytes == tiff_raster.held_bytes


@pytest.mark.parametrize("small_pixels", [10**6, 10_000], ids=["whole", "by window"])
def test_decoded_images_and_truth_are_rasters(small_pixels, monkeypatch):
    monkeypatch.setattr(large_tiff, "SMALL_PIXELS", small_pixels)
    image = decoded(tiff(np.where(IDS_HW, 9, 0).astype(np.uint8), **TILED), label_map={9: 1})
    is_whole = small_pixels == 10**6
    assert (image.pixels.segment_side == IN_MEMORY) == is_whole
    assert (image.truth.segment_side == IN_MEMORY) == is_whole
    assert_windows_are_cuts(image.pixels, GRAY_CHW)
    assert_windows_are_cuts(image.truth, IDS_HW[None].astype(np.uint16))
    assert image.held_bytes == image.pixels.held_bytes + image.truth.held_bytes


def test_unknown_labels_spoil_only_the_windows_that_hold_them(small_is_large):
    stored_HW = IDS_HW.copy()
    stored_HW[70, 60] = 7
    truth = decoded(tiff(stored_HW, **TILED)).truth
    np.testing.assert_array_equal(truth.read(Box(71, 0, 40, 117)).pixels_CHW[0], IDS_HW[71:111])
    with pytest.raises(ImageError, match="the mask cannot be used: the mask holds 7") as caught:
        truth.read(Box(60, 50, 20, 20))
    assert caught.value.code == "truth"


def test_segments_of_a_pixel_are_no_image_in_memory(monkeypatch):
    monkeypatch.setattr(large_tiff, "SMALL_PIXELS", 0)
    column = tiff(IDS_HW[:, :1] * 9, rowsperstrip=1, compression="deflate")
    sample = Sample("a", "a", "a.tif", lambda: column, lambda: column)
    rules = reading(10**6, label_map={9: 1})
    decoder = Decoder(Preprocessing(color="gray", normalization="percentile"), 2, rules)
    (image,) = decoder.decode(sample)
    assert image.truth.segment_side == (1, 1)
    assert_windows_are_cuts(image.pixels, IDS_HW[None, :, :1] * 9)
    assert_windows_are_cuts(image.truth, IDS_HW[None, :, :1].astype(np.uint16))


@pytest.mark.parametrize("value", [1, np.nan])
def test_labels_that_are_no_integers_are_told_by_their_type(value, small_is_large):
    truth = decoded(tiff(np.full((150, 117), value, np.float32), **TILED)).truth
    with pytest.raises(ImageError, match="holds float32 values, not class ids"):
        truth.read(Box(0, 0, 5, 5))


@pytest.mark.parametrize(("method", "bands"), [("range", 0), ("percentile", 10), ("zscore", 10)])
def test_steps_are_the_bands_of_an_image_that_is_read_by_window(method, bands, monkeypatch):
    monkeypatch.setattr("unet_core.images.statistics.BAND_BYTES", 10_000)  # 16 rows of 117 × 3
    decoder = Decoder(Preprocessing(color="gray", normalization=method), 2, reading(10**6))
    sample, steps = Sample("a", "a", "a.tif", lambda: RGB_TIFF), []
    decoder.decode(sample, lambda: steps.append(1))
    assert not steps
    monkeypatch.setattr(large_tiff, "SMALL_PIXELS", 10_000)
    decoder.decode(sample, lambda: steps.append(1))
    assert len(steps) == bands
