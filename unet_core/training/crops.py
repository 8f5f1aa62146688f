"""Random crops: the augmentation parameters, and the part of the image that they need.

Crops are drawn on threads; ``augment.py`` applies the parameters on the device. The random numbers
of a crop depend on the seed, the epoch, the repeat and the image id alone.
"""

import math
from dataclasses import dataclass

import numpy as np

from unet_core.arrays import Array
from unet_core.config.train import AugmentConfig
from unet_core.training.dataset import LabelledImage, digest_of

ELASTIC_LIMIT = 3.0
"""Largest displacement in units of σ, so that the window of a crop has a bounded size."""
OVERSHOOT = 1.25
"""Largest ratio of a bicubically interpolated displacement to the largest on the coarse grid."""


@dataclass(frozen=True)
class CropShape:
    """Sizes of a crop in pixels."""

    side: int
    """Side of the labels."""
    margin: int
    """Pixels by which the network's input is larger than the labels, on each side."""
    window: int
    """Side of the part of an image that is cut out; it holds all pixels of any drawn crop."""

    @property
    def input_side(self) -> int:
        """Side of the network's input."""
        return self.side + 2 * self.margin

    @classmethod
    def of(cls, side: int, margin: int, augment: AugmentConfig) -> "CropShape":
        """Compute the window from the largest rotation, scale and deformation."""
        turn = math.radians(min(augment.rotation, 45))
        spread = math.cos(turn) + math.sin(turn)
        half = (side + 2 * margin - 1) / 2 + _elastic_reach(augment)
        return cls(side, margin, math.ceil(2 * half * spread * augment.scale) + 3)


@dataclass(frozen=True)
class Crop:
    """A window cut from an image, and the augmentation to apply to it on the device."""

    image_id: str
    pixels_CHW: Array
    """Window × window, dtype of the image; beyond ``size`` it is padding, never sampled."""
    labels_HW: Array
    boundary_HW: Array | None
    size: tuple[int, int]
    """Height and width of the image part of the window."""
    offset: Array
    """Normalization of each channel: (pixels − offset) · scale."""
    scale: Array
    matrix: Array
    """2×2 linear map from coordinates (y, x) in the crop to those in the window, both relative to
    the crop's centre."""
    centre: tuple[float, float]
    """Position (y, x) of the crop's centre in the window."""
    elastic: Array
    """Displacements (y, x) in pixels of the crop on a coarse grid, 2×3×3."""
    gain: Array
    """Contrast factor of each channel."""
    brightness: float
    gamma: float
    noise: float
    """σ of Gaussian noise; 0: none."""
    noise_seed: int

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that depend on the window."""
        arrays = (self.pixels_CHW, self.labels_HW, self.boundary_HW)
        return sum(array.nbytes for array in arrays if array is not None)


def draw(
    image: LabelledImage, shape: CropShape, augment: AugmentConfig, seed: tuple[int, ...]
) -> Crop:
    """Draw a random crop of an image; ``seed`` holds the seed of the run, the epoch and the repeat.

    The order of the draws is fixed: add new ones at the end, or all later ones change.
    """
    seeds = [*seed, int.from_bytes(digest_of(image.image_id)[:8], "big")]
    random = np.random.default_rng(seeds)
    matrix = _matrix(augment, random)
    elastic = random.normal(0, 1, (2, 3, 3)).clip(-ELASTIC_LIMIT, ELASTIC_LIMIT) * augment.elastic
    pixels_CHW, valid_HW, _ = image.decoded.pixels.whole()
    spread = np.abs(matrix).sum(axis=1)
    target = None
    if valid_HW is not None:
        target = _valid_pixel(valid_HW, np.random.default_rng([*seeds, 1]))
    rows, columns = (
        _place(length, float(spread[axis]), shape, augment, random, target and target[axis])
        for axis, length in enumerate(pixels_CHW.shape[1:])
    )
    cut = slice(*rows[:2]), slice(*columns[:2])
    common = random.uniform(1 - augment.contrast, 1 + augment.contrast)
    noisy = random.integers(2) * random.uniform(0, 1)
    gain = common * random.uniform(1 - augment.color, 1 + augment.color, len(pixels_CHW))
    boundary_HW, side = image.boundary_HW, shape.window
    return Crop(
        image_id=image.image_id,
        pixels_CHW=_padded(pixels_CHW[:, *cut], side),
        labels_HW=_padded(image.labels_HW[cut], side),
        boundary_HW=None if boundary_HW is None else _padded(boundary_HW[cut], side),
        size=(rows[1] - rows[0], columns[1] - columns[0]),
        offset=image.decoded.offset,
        scale=image.decoded.scale,
        matrix=matrix.astype(np.float32),
        centre=(rows[2], columns[2]),
        elastic=elastic.astype(np.float32),
        gain=gain.astype(np.float32),
        brightness=random.uniform(-1, 1) * augment.brightness,
        gamma=_ratio(augment.gamma, random),
        noise=noisy * augment.noise,
        noise_seed=int(random.integers(2**62)),
    )


def _elastic_reach(augment: AugmentConfig) -> float:
    return augment.elastic * ELASTIC_LIMIT * OVERSHOOT


def _ratio(limit: float, random: np.random.Generator) -> float:
    """Draw a factor from 1/limit to limit, log-uniform."""
    return math.exp(random.uniform(-1, 1) * math.log(limit))


def _matrix(augment: AugmentConfig, random: np.random.Generator) -> Array:
    """Draw flips, quarter turns, rotation and scale as one 2×2 matrix."""
    angle = math.radians(random.uniform(-1, 1) * augment.rotation)
    turns = int(random.integers(4)) if augment.quarter_turns else 0
    flip_x, flip_y = (int(random.integers(2)) if augment.flips else 0 for _ in range(2))
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]])
    quarter = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), turns)
    mirror = np.diag([1 - 2 * flip_y, 1 - 2 * flip_x])
    return rotation @ quarter @ mirror * _ratio(augment.scale, random)


def _place(
    length: int,
    spread: float,
    shape: CropShape,
    augment: AugmentConfig,
    random: np.random.Generator,
    target: int | None,
) -> tuple[int, int, float]:
    """Draw the position of a crop along one axis: start and stop of the window in the image, and
    the crop's centre relative to the start. The crop lies as near to a ``target`` as it can.

    But for elastic displacement, the labels lie inside an image that is large enough; ``augment``
    mirrors the rest.
    """
    inner = spread * (shape.side - 1) / 2
    low, high = sorted((inner, length - 1 - inner))
    half = (shape.input_side - 1) / 2
    drawn = random.uniform(low, high)
    if target is not None:
        drawn = min(max(target, low), high)
    centre = round(drawn - half) + half  # on the pixel grid: copied if not rotated
    reach = spread * (half + _elastic_reach(augment))
    start = min(max(math.floor(centre - reach), 0), max(length - shape.window, 0))
    return start, min(start + shape.window, length), centre - start


def _valid_pixel(valid_HW: Array, random: np.random.Generator) -> tuple[int, int] | None:
    """Draw a valid pixel, uniformly; None if there is none."""
    at = np.flatnonzero(valid_HW)
    if not at.size:
        return None
    y, x = divmod(int(at[random.integers(at.size)]), valid_HW.shape[1])
    return y, x


def _padded(cut: Array, side: int) -> Array:
    """Copy an array …HW to the corner of a square of zeros, so that windows can be stacked."""
    padded = np.zeros((*cut.shape[:-2], side, side), dtype=cut.dtype)
    padded[..., : cut.shape[-2], : cut.shape[-1]] = cut
    return padded
