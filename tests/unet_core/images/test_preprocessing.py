import numpy as np
import pytest

from unet_core.images.preprocessing import Preprocessing, offset_and_scale, to_color

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (40, 30, 3), dtype=np.uint8)


def normalised(pixels_CHW, method, **options):
    wanted = Preprocessing(color="gray", normalisation=method, **options)
    offset, scale = offset_and_scale(pixels_CHW, wanted)
    return (pixels_CHW.astype(np.float32) - offset[:, None, None]) * scale[:, None, None]


def test_gray_of_gray_colours_is_that_gray_at_any_depth():
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535)):
        gray = RANDOM.integers(0, top + 1, (40, 30, 1)).astype(dtype)
        np.testing.assert_array_equal(to_color(gray.repeat(3, 2), "gray")[0], gray[..., 0])
        np.testing.assert_array_equal(to_color(gray, "rgb"), gray[..., 0][None].repeat(3, 0))


def test_luma_is_that_of_the_standard():
    exact = RGB @ np.array([0.299, 0.587, 0.114])
    assert np.abs(to_color(RGB, "gray")[0] - exact).max() <= 0.51


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_percentiles_become_zero_and_one(dtype):
    plane = RANDOM.integers(10, 200, (1, 50, 50)).astype(dtype)
    low, high = np.percentile(plane, (1, 99.8), method="inverted_cdf")
    expected = (plane - np.float32(low)) / np.float32(high - low)
    np.testing.assert_allclose(normalised(plane, "percentile"), expected, rtol=1e-5, atol=1e-6)


def test_range_is_the_full_scale_of_the_type():
    np.testing.assert_allclose(normalised(np.uint8([[[0, 255]]]), "range"), [[[0, 1]]])
    np.testing.assert_allclose(normalised(np.uint16([[[0, 65535]]]), "range"), [[[0, 1]]])
    np.testing.assert_allclose(normalised(np.float32([[[0.25, 1]]]), "range"), [[[0.25, 1]]])


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_zscore_has_mean_zero_and_deviation_one(dtype):
    scored = normalised(RANDOM.integers(0, 60000, (3, 64, 64)).astype(dtype), "zscore")
    np.testing.assert_allclose(scored.mean(axis=(1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(scored.std(axis=(1, 2)), 1, atol=1e-4)


@pytest.mark.parametrize("method", ["percentile", "zscore"])
def test_a_constant_image_becomes_zeros(method):
    assert not normalised(np.full((1, 5, 5), 7, np.uint8), method).any()
