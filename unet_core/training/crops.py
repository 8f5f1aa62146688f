"""What is drawn for one crop, and the window that it needs; on threads, before the device.

All randomness of a crop comes from the seed, the epoch, the image's id and the round.
"""

import math
from dataclasses import dataclass

import numpy as np

from unet_core.arrays import Array
from unet_core.config.train import AugmentConfig
from unet_core.training.dataset import Labelled, digest_of

Random = np.random.Generator

ELASTIC_LIMIT = 3.0
"""Displacements are cut off here, in σ."""
OVERSHOOT = 1.25
"""How far bicubic interpolation goes beyond the values that it joins, at most."""


@dataclass(frozen=True)
class CropShape:
    """Sides in pixels, and what they need of the image."""

    side: int
    """Of the labels."""
    margin: int
    """Around it, of the network's input."""
    window: int
    """Side of the piece of an image in which every crop finds its pixels."""

    @property
    def input_side(self) -> int:
        """Of the network's input."""
        return self.side + 2 * self.margin

    @classmethod
    def of(cls, side: int, margin: int, augment: AugmentConfig) -> "CropShape":
        """Settle the window by the largest turn, scale and deformation."""
        turn = math.radians(min(augment.rotation, 45))
        spread = math.cos(turn) + math.sin(turn)
        half = (side + 2 * margin - 1) / 2 + _elastic_reach(augment)
        return cls(side, margin, math.ceil(2 * half * spread * augment.scale) + 3)


@dataclass(frozen=True)
class Crop:
    """A window of an image, and what to do with it on the device."""

    image_id: str
    pixels_CHW: Array
    """Window × window, of the image's own dtype; what lies beyond the image is not read."""
    labels_HW: Array
    boundary_HW: Array | None
    size: tuple[int, int]
    """The part of the window that is image."""
    offset: Array
    scale: Array
    """The network receives (pixels − offset) · scale, before its gray values vary."""
    matrix: Array
    """2×2, from pixels (y, x) of the crop to pixels of the window, both from their centres."""
    centre: tuple[float, float]
    """Where the crop's centre lies in the window."""
    elastic: Array
    """2×3×3, displacements (y, x) in pixels of the crop on a coarse grid."""
    gain: Array
    """Of each channel."""
    brightness: float
    gamma: float
    noise: float
    noise_seed: int

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        boundary = 0 if self.boundary_HW is None else self.boundary_HW.nbytes
        return self.pixels_CHW.nbytes + self.labels_HW.nbytes + boundary


def draw(image: Labelled, shape: CropShape, augment: AugmentConfig, seed: tuple[int, ...]) -> Crop:
    """Draw a crop of an image; ``seed``: of the run, the epoch and the round.

    A new draw comes last: one in between would move all that follow.
    """
    own = int.from_bytes(digest_of(image.image_id)[:8], "big")
    random = np.random.default_rng([*seed, own])
    matrix = _matrix(augment, random)
    elastic = random.normal(0, 1, (2, 3, 3)).clip(-ELASTIC_LIMIT, ELASTIC_LIMIT) * augment.elastic
    pixels_CHW = image.decoded.pixels.whole()
    spread = np.abs(matrix).sum(axis=1)
    rows, columns = (
        _place(length, float(spread[axis]), shape, augment, random)
        for axis, length in enumerate(pixels_CHW.shape[1:])
    )
    cut = slice(*rows[:2]), slice(*columns[:2])
    common = random.uniform(1 - augment.contrast, 1 + augment.contrast)
    noisy = random.integers(2) * random.uniform(0, 1)
    gain = common * random.uniform(1 - augment.color, 1 + augment.color, len(pixels_CHW))
    whole_HW, side = image.boundary_HW, shape.window
    return Crop(
        image_id=image.image_id,
        pixels_CHW=_padded(pixels_CHW[:, *cut], side),
        labels_HW=_padded(image.labels_HW[cut], side),
        boundary_HW=None if whole_HW is None else _padded(whole_HW[cut], side),
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


def _ratio(limit: float, random: Random) -> float:
    """A factor from 1/limit to limit, as often above 1 as below."""
    return math.exp(random.uniform(-1, 1) * math.log(limit))


def _matrix(augment: AugmentConfig, random: Random) -> Array:
    """Flip, quarter turns, rotation and scale in one."""
    angle = math.radians(random.uniform(-1, 1) * augment.rotation)
    turns = int(random.integers(4)) if augment.quarter_turns else 0
    flip = int(random.integers(2)) if augment.flips else 0
    upside = int(random.integers(2)) if augment.flips else 0
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]])
    quarter = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), turns)
    mirror = np.diag([1 - 2 * upside, 1 - 2 * flip])
    return rotation @ quarter @ mirror * _ratio(augment.scale, random)


def _place(
    length: int, spread: float, shape: CropShape, augment: AugmentConfig, random: Random
) -> tuple[int, int, float]:
    """Along one axis: start and stop of the window in the image, and the crop's centre in it.

    The labels lie inside the image where it is large enough; the rest is its mirror.
    """
    inner = spread * (shape.side - 1) / 2
    low, high = sorted((inner, length - 1 - inner))
    half = (shape.input_side - 1) / 2
    centre = round(random.uniform(low, high) - half) + half  # without a turn, pixel meets pixel
    reach = spread * (half + _elastic_reach(augment))
    start = min(max(math.floor(centre - reach), 0), max(length - shape.window, 0))
    return start, min(start + shape.window, length), centre - start


def _padded(cut: Array, side: int) -> Array:
    """A copy of the full size, so that windows stack; what is added is never looked at."""
    whole = np.zeros((*cut.shape[:-2], side, side), dtype=cut.dtype)
    whole[..., : cut.shape[-2], : cut.shape[-1]] = cut
    return whole
