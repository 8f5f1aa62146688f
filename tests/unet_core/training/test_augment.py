import numpy as np
import pytest
import torch

from tests.support.scenes import labelled
from unet_core.config.train import AugmentConfig
from unet_core.training.augment import augment
from unet_core.training.crops import CropShape, draw

CPU = torch.device("cpu")
NOTHING = {
    "flips": False, "quarter_turns": False, "rotation": 0.0, "scale": 1.0, "elastic": 0.0,
    "contrast": 0.0, "brightness": 0.0, "gamma": 1.0, "color": 0.0, "noise": 0.0,
}  # fmt: skip
GEOMETRY = {**NOTHING, "flips": True, "quarter_turns": True, "rotation": 40.0, "scale": 1.3,
            "elastic": 4.0}  # fmt: skip
EVERYTHING = {**GEOMETRY, "contrast": 0.3, "brightness": 0.2, "gamma": 1.4, "color": 0.1,
              "noise": 0.1}  # fmt: skip


def crop_of(image, side, margin=0, seed=0, **options):
    config = AugmentConfig(**{**NOTHING, **options})
    shape = CropShape.of(side, margin, config)
    return draw(image, shape, config, (seed, 0, 0)), shape


def decoded(height, width, seed=0):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 200, (height, width)).astype(np.uint8)
    return labelled(pixels, (pixels % 4).astype(np.uint8), (pixels / 200).astype(np.float16))


def positions(image_HW, crop_HW):
    """List the positions (y, x) at which an image holds exactly this crop."""
    height, width = crop_HW.shape
    windows = np.lib.stride_tricks.sliding_window_view(image_HW, (height, width))
    return np.argwhere((windows == crop_HW).all(axis=(2, 3)))


def test_without_variation_a_crop_is_a_piece_of_its_image():
    image = decoded(50, 41)
    for seed in range(5):
        crop, shape = crop_of(image, 24, seed=seed)
        made = augment([crop], shape, CPU)
        pixels = made.images_NCHW[0, 0].round().numpy()
        np.testing.assert_allclose(made.images_NCHW[0, 0], pixels, atol=2e-2)
        ((y, x),) = positions(image.decoded.pixels.whole().pixels_CHW[0], pixels)
        expected = image.labels_HW[y : y + 24, x : x + 24]
        assert (made.labels_NHW[0].numpy() == expected).all()
        assert made.boundary_NHW is not None
        np.testing.assert_allclose(made.boundary_NHW[0], pixels / 200, atol=1e-2)


def test_flips_and_quarter_turns_move_pixels_without_mixing_them():
    image = decoded(40, 40)
    seen = set()
    for seed in range(40):
        crop, shape = crop_of(image, 24, seed=seed, flips=True, quarter_turns=True)
        made = augment([crop], shape, CPU)
        pixels = made.images_NCHW[0, 0].round().numpy()
        np.testing.assert_allclose(made.images_NCHW[0, 0], pixels, atol=2e-2)
        assert (made.labels_NHW[0].numpy() == pixels % 4).all()
        back = [np.rot90(p, turns) for p in (pixels, pixels[::-1]) for turns in range(4)]
        found = [
            n
            for n, p in enumerate(back)
            if len(positions(image.decoded.pixels.whole().pixels_CHW[0], p))
        ]
        assert len(found) == 1
        seen.update(found)
    assert seen == set(range(8))


@pytest.mark.parametrize("size", [(13, 19), (1, 30), (200, 9)])
def test_beyond_an_image_lies_its_mirror(size):
    image = decoded(*size)
    crop, shape = crop_of(image, 32, margin=6)
    made = augment([crop], shape, CPU)
    pixels = made.images_NCHW[0, 0].round().numpy()
    around = [(100, 100) if length > 1 else (0, 0) for length in size]
    mirrored = np.pad(image.decoded.pixels.whole().pixels_CHW[0], around, mode="reflect")
    if size[0] == 1:
        mirrored = np.repeat(mirrored, 44, axis=0)
    assert len(positions(mirrored, pixels)) > 0
    assert made.labels_NHW.shape == (1, 32, 32)
    assert (made.labels_NHW[0].numpy() == pixels[6:38, 6:38] % 4).all()


def test_labels_and_boundaries_move_with_the_image():
    y, x = np.mgrid[:150, :170]
    blob = ((np.hypot(y - 70, (x - 80) / 1.5) < 40) * 200).astype(np.uint8)
    image = labelled(blob, (blob > 0).astype(np.uint8), (blob / 200).astype(np.float16))
    for seed in range(8):
        crop, shape = crop_of(image, 96, margin=8, seed=seed, **GEOMETRY)
        made = augment([crop], shape, CPU)
        assert made.boundary_NHW is not None
        inner = made.images_NCHW[0, 0, 8:-8, 8:-8] / 200
        np.testing.assert_allclose(inner, made.boundary_NHW[0], atol=1e-3)
        sure = (inner - 0.5).abs() > 0.499
        assert sure.float().mean() > 0.9
        assert ((inner > 0.5) == (made.labels_NHW[0] == 1))[sure].all()


def test_labels_are_never_mixed():
    random = np.random.default_rng(0)
    labels = random.choice([0, 3, 7, 255], (90, 90)).astype(np.uint8)
    crop, shape = crop_of(labelled(labels, labels), 48, **GEOMETRY)
    assert set(augment([crop], shape, CPU).labels_NHW.unique().tolist()) <= {0, 3, 7, 255}


def test_a_crop_depends_on_its_seed_and_image_alone():
    images = [decoded(60, 70), decoded(90, 40, seed=1), decoded(30, 30, seed=2)]
    made = [crop_of(image, 32, seed=3, **EVERYTHING) for image in images]
    together = augment([crop for crop, _ in made], made[0][1], CPU)
    for at, (crop, shape) in enumerate(made):
        alone = augment([crop], shape, CPU)
        np.testing.assert_allclose(alone.images_NCHW[0], together.images_NCHW[at], atol=1e-2)
        assert (alone.labels_NHW[0] == together.labels_NHW[at]).all()
    other, shape = crop_of(images[0], 32, seed=4, **EVERYTHING)
    assert not torch.equal(augment([other], shape, CPU).images_NCHW[0], together.images_NCHW[0])


@pytest.mark.parametrize("rotation", [0.0, 45.0, 180.0])
def test_the_window_holds_all_that_a_crop_needs(rotation):
    """A window that is too small would be mirrored at its own edge, inside the image."""
    x = np.tile(np.arange(400, dtype=np.float32), (400, 1))
    image = labelled(x, np.zeros((400, 400), np.uint8))
    options = {**NOTHING, "rotation": rotation, "scale": 1.5, "elastic": 6.0, "flips": True}
    for seed in range(20):
        crop, shape = crop_of(image, 48, margin=10, seed=seed, **options)
        ramp = augment([crop], shape, CPU).images_NCHW[0, 0]
        smooth = torch.diff(ramp, n=2, dim=0).abs().max(), torch.diff(ramp, n=2, dim=1).abs().max()
        assert max(smooth) < 0.2  # a fold shows as a kink of the ramp


def test_gray_values_vary_within_their_limits():
    flat = labelled(np.full((40, 40), 0.5, np.float32), np.zeros((40, 40), np.uint8))
    means = []
    for seed in range(60):
        crop, shape = crop_of(flat, 16, seed=seed, contrast=0.2, brightness=0.1)
        made = augment([crop], shape, CPU).images_NCHW
        assert made.std() < 1e-6
        means.append(made.mean().item())
    assert 0.5 * 0.8 - 0.1 <= min(means) < 0.42
    assert 0.58 < max(means) <= 0.5 * 1.2 + 0.1
