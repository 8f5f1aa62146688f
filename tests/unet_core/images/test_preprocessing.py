import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.data import reading, tiff
from tests.support.rasters import measured
from unet_core.images.decoder import Decoder, Rejected
from unet_core.images.preprocessing import Preprocessing, to_color
from unet_core.images.raster import ArrayRaster, WindowRaster
from unet_core.images.sample import Sample
from unet_core.synthetic import png

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (40, 30, 3), dtype=np.uint8)


def normalized(pixels_CHW, method, **options):
    wanted = Preprocessing(color="gray", normalization=method, **options)
    offset, scale = measured(ArrayRaster(pixels_CHW), wanted)
    return (pixels_CHW.astype(np.float32) - offset[:, None, None]) * scale[:, None, None]


def test_gray_of_gray_colours_is_that_gray_at_any_depth():
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535)):
        gray = RANDOM.integers(0, top + 1, (1, 40, 30)).astype(dtype)
        np.testing.assert_array_equal(to_color(gray.repeat(3, 0), "gray"), gray)
        np.testing.assert_array_equal(to_color(gray, "rgb"), gray.repeat(3, 0))


def test_luma_is_that_of_the_standard():
    exact = RGB @ np.array([0.299, 0.587, 0.114])
    assert np.abs(to_color(RGB.transpose(2, 0, 1), "gray")[0] - exact).max() <= 0.51


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_percentiles_become_zero_and_one(dtype):
    plane = RANDOM.integers(10, 200, (1, 50, 50)).astype(dtype)
    low, high = np.percentile(plane, (1, 99.8), method="inverted_cdf")
    expected = (plane - np.float32(low)) / np.float32(high - low)
    np.testing.assert_allclose(normalized(plane, "percentile"), expected, rtol=1e-5, atol=1e-6)


def test_range_is_the_full_scale_of_the_type():
    np.testing.assert_allclose(normalized(np.uint8([[[0, 255]]]), "range"), [[[0, 1]]])
    np.testing.assert_allclose(normalized(np.uint16([[[0, 65535]]]), "range"), [[[0, 1]]])
    np.testing.assert_allclose(normalized(np.float32([[[0.25, 1]]]), "range"), [[[0.25, 1]]])


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.uint8, 255), (np.uint16, 65535), (np.int16, 32767), (np.int32, 2**31 - 1),
     (np.uint32, 2**32 - 1), (np.float32, 1)],
)  # fmt: skip
def test_range_and_standard_are_shares_of_the_stored_type(dtype, scale):
    stored = (np.arange(12).reshape(3, 4) * (scale / 11)).astype(dtype)
    (image,) = Decoder(Preprocessing(color="gray", normalization="range"), 2, reading(99)).decode(
        Sample("a", "a", "a.tif", lambda: tiff(stored))
    )
    shares = stored.astype(np.float64) / scale
    pixels_HW = image.pixels.whole().pixels_CHW[0]
    np.testing.assert_allclose((pixels_HW - image.offset) * image.scale, shares, rtol=1e-6)
    wanted = Preprocessing(color="gray", normalization="standard", mean=0.4, std=0.2)
    (image,) = Decoder(wanted, 2, reading(99)).decode(
        Sample("a", "a", "a.tif", lambda: tiff(stored))
    )
    np.testing.assert_allclose(
        (pixels_HW - image.offset) * image.scale, (shares - 0.4) / 0.2, rtol=1e-5, atol=1e-6
    )


def test_channels_have_limits_of_their_own():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    wanted = Preprocessing(color="rgb", normalization="standard", mean=mean, std=std)
    offset, scale = measured(ArrayRaster(RGB.transpose(2, 0, 1)), wanted)
    np.testing.assert_allclose(offset, np.array(mean) * 255, rtol=1e-6)
    np.testing.assert_allclose(scale, 1 / (np.array(std) * 255), rtol=1e-6)
    wanted = Preprocessing(color="rgb", normalization="percentile", low=[0, 5, 10], high=99)
    offset, _ = measured(ArrayRaster(RGB.transpose(2, 0, 1)), wanted)
    exact = [np.percentile(RGB[..., n], q, method="inverted_cdf") for n, q in enumerate((0, 5, 10))]
    assert offset.tolist() == exact


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_zscore_has_mean_zero_and_deviation_one(dtype):
    scored = normalized(RANDOM.integers(0, 60000, (3, 64, 64)).astype(dtype), "zscore")
    np.testing.assert_allclose(scored.mean(axis=(1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(scored.std(axis=(1, 2)), 1, atol=1e-4)


@pytest.mark.parametrize("method", ["percentile", "zscore"])
def test_a_constant_image_becomes_zeros(method):
    assert not normalized(np.full((1, 5, 5), 7, np.uint8), method).any()


def test_what_cannot_be_normalised_is_an_image_that_failed():
    wanted = Preprocessing.model_construct(
        color="gray", normalization="percentile", low=0, high=400.0
    )
    sample = Sample("a", "a", "a.png", lambda: png(RGB[..., 0]))
    (found,) = Decoder(wanted, 2, reading(10_000)).decode(sample)
    assert isinstance(found, Rejected)
    assert found.failure.code == "decode"


def by_rows(pixels_CHW, wanted, on_step=lambda: None):
    image = ArrayRaster(pixels_CHW)
    by_window = WindowRaster(
        image.shape, image.channels, image.dtype, (16, 16), 0, image.read, image.full_scale
    )
    return measured(by_window, wanted, on_step)


METHODS = [
    {"normalization": "percentile"},
    {"normalization": "percentile", "low": 0, "high": 100},
    {"normalization": "percentile", "low": 50, "high": 50.5},
    {"normalization": "zscore"},
    {"normalization": "range"},
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("band_bytes", [1, 3000, 2**25])
def test_statistics_by_rows_are_those_of_the_whole(method, dtype, band_bytes, monkeypatch):
    monkeypatch.setattr("unet_core.images.statistics.BAND_BYTES", band_bytes)
    monkeypatch.setattr("unet_core.images.statistics.PIECE", 100)
    top = 255 if dtype == np.uint8 else 65535
    pixels_CHW = np.random.default_rng(3).normal(0.5, 0.2, (2, 61, 47)).clip(0, 1) * top
    pixels_CHW = pixels_CHW.astype(dtype) - (dtype(20_000) if dtype == np.float32 else dtype(0))
    wanted = Preprocessing(color=2, **method)
    for found, whole in zip(
        by_rows(pixels_CHW, wanted),
        measured(ArrayRaster(pixels_CHW), wanted),
        strict=True,
    ):
        if dtype == np.float32 and wanted.normalization == "zscore":
            np.testing.assert_allclose(found, whole, rtol=1e-6)
        else:
            np.testing.assert_array_equal(found, whole)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    st.lists(st.floats(0, 100), min_size=2, max_size=2, unique=True).map(sorted),
)  # fmt: skip
def test_percentiles_of_floats_are_exact(values, between):
    low, high = between
    pixels_CHW = np.array(values, np.float32)[None, :, None]
    wanted = Preprocessing(color=1, normalization="percentile", low=low, high=high)
    with np.errstate(over="ignore"):
        found = by_rows(pixels_CHW, wanted)
        whole = measured(ArrayRaster(pixels_CHW), wanted)
    np.testing.assert_array_equal(found, whole)
