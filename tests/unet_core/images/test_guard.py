"""Fields in which there is nothing are not stretched to objects; nuclei stay as they are."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from unet_core.images.guard import NO_STRETCH, Stretch, measure_content
from unet_core.images.preprocessing import Preprocessing, offset_and_scale
from unet_core.images.raster import ArrayRaster, WindowRaster
from unet_core.images.statistics import Statistics, measure_limits
from unet_core.networks import checkpoint
from unet_core.networks.header import BUILTIN_STRETCHES
from unet_core.synthetic import nuclei

SIDE = 256
TRAINED = BUILTIN_STRETCHES["builtin:nuclei"]
WANTED = Preprocessing(color="gray", normalization="percentile")
Y, X = np.mgrid[0 : 1 : SIDE * 1j, 0 : 1 : SIDE * 1j]


def random():
    return np.random.default_rng(3)


def noise(sigma):
    return random().normal(0, sigma, (SIDE, SIDE))


def specks(rate, value):
    found = 25 + noise(2)
    found[random().random(found.shape) < rate] = value
    return found


EMPTY = {
    "one value": np.full((SIDE, SIDE), 37.0),
    "zeros": np.zeros((SIDE, SIDE)),
    "sensor noise": 60 + noise(3),
    "strong noise": 100 + noise(20),
    "noise of rounding": 60 + noise(0.4),
    "low light": random().poisson(5, (SIDE, SIDE)) * 1.0,
    "gradient": 10 + 60 * X,
    "gradient with noise": 20 + 20 * X + noise(3),
    "vignette with noise": 20 + 60 * (1 - (X - 0.5) ** 2 - (Y - 0.5) ** 2) + noise(3),
    "hot pixels": specks(5e-4, 255),
    "column noise": 40 + noise(1) + random().normal(0, 3, (1, SIDE)),
    "defocus": 40 + 60 * ndimage.gaussian_filter(noise(1), 2),
}


@pytest.fixture(scope="module")
def network():
    loaded, _ = checkpoint.load("builtin:nuclei")
    return loaded.eval()


def objects(network, pixels, is_guarded):
    measured = Statistics(trained=TRAINED, is_guarded=is_guarded).measure(
        "a", ArrayRaster(pixels[None]), WANTED
    )
    offset, scale = offset_and_scale(measured.limits)
    x = torch.from_numpy((pixels.astype(np.float32) - offset) * scale)[None, None]
    with torch.inference_mode():
        return ndimage.label(network(x)[0, 0].numpy() > 0)[1], measured.is_extrapolated


@pytest.mark.slow
@pytest.mark.parametrize("full", [255, 4095, 1.0])
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_is_found_where_there_is_nothing(name, full, network):
    scaled = EMPTY[name].clip(0, 255) * full / 255
    dtype = {255: np.uint8, 4095: np.uint16, 1.0: np.float32}[full]
    pixels = (scaled if full == 1.0 else scaled.round()).astype(dtype)
    found, is_extrapolated = objects(network, pixels, is_guarded=True)
    assert found == 0
    assert is_extrapolated or name in ("one value", "zeros")


@pytest.mark.slow
def test_by_image_noise_becomes_hundreds_of_objects(network):
    found, is_extrapolated = objects(network, EMPTY["sensor noise"].astype(np.uint8), False)
    assert found > 100
    assert is_extrapolated


@pytest.mark.parametrize("seed", range(12))
def test_images_with_nuclei_keep_their_limits(seed):
    pixels, _ = nuclei(SIDE, SIDE, np.random.default_rng([11, seed]))
    raster = ArrayRaster(pixels[None])
    measured = Statistics(trained=TRAINED, is_guarded=True).measure("a", raster, WANTED)
    assert measured.limits == measure_limits(raster, WANTED)
    assert measured.is_extrapolated is False
    assert measured.stretch.noise <= TRAINED.noise


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_content_is_the_same_in_memory_and_by_window(dtype, monkeypatch):
    monkeypatch.setattr("unet_core.images.guard.WINDOW", 100)
    pixels_CHW = np.stack([nuclei(SIDE, SIDE, random())[0], EMPTY["hot pixels"]]).astype(dtype)
    valid_HW = random().random((SIDE, SIDE)) < 0.99
    valid_HW[:120] = False
    image = ArrayRaster(pixels_CHW, valid_HW)
    by_window = WindowRaster(image.shape, 2, image.dtype, (16, 16), 0, image.read)
    found = measure_content(image, lambda: None)
    assert found == measure_content(by_window, lambda: None)
    pixels_CHW[:, ~valid_HW] = 1
    assert found == measure_content(ArrayRaster(pixels_CHW, valid_HW), lambda: None)


def test_what_cannot_be_measured_changes_nothing():
    for shape, valid in (((1, 1), True), ((3, 700), True), ((40, 40), False)):
        raster = ArrayRaster(np.full((1, *shape), 9, np.uint8), np.full(shape, valid))
        (content,) = measure_content(raster, lambda: None)
        (limits,) = measure_limits(raster, WANTED)
        assert content.stretch(limits) == NO_STRETCH
        assert content.guarded(limits, TRAINED).offset == limits.offset


def test_the_larger_stretch_counts():
    assert Stretch(0.1, 0.5) | Stretch(0.2, 0.3) == Stretch(0.2, 0.5)
