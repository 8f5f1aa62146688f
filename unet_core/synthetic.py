"""Sample data of our own: fluorescence-like nuclei under uneven light with noise, and masks."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from unet_core.arrays import Array

SIZES = ((256, 256), (240, 320), (360, 360), (300, 200), (512, 640), (177, 233), (384, 288))


def nuclei(height: int, width: int, random: np.random.Generator) -> tuple[Array, Array]:
    """One gray image HW and its mask HW (1 = nucleus)."""
    light_HW = np.zeros((height, width), dtype=np.float32)
    mask_HW = np.zeros((height, width), dtype=bool)
    radius = random.uniform(6, 16)
    wanted = max(1, int(random.uniform(0.08, 0.25) * height * width / (np.pi * radius**2)))
    for _ in range(wanted):
        y, x = random.uniform(0, height), random.uniform(0, width)
        _add_nucleus(light_HW, mask_HW, y, x, radius * random.uniform(0.7, 1.3), random)
    signal_HW = _uneven_light(height, width, random) * (random.uniform(0.05, 0.2) + light_HW)
    exposure = random.uniform(60, 230)
    noisy_HW = random.poisson(np.maximum(signal_HW, 0) * exposure) / exposure
    noisy_HW += random.normal(0, random.uniform(0.005, 0.03), (height, width))
    gray_HW = np.clip(noisy_HW * random.uniform(90, 230), 0, 255).astype(np.uint8)
    return gray_HW, mask_HW.astype(np.uint8)


def _add_nucleus(
    light_HW: Array, mask_HW: Array, y: float, x: float, radius: float, random: np.random.Generator
) -> None:
    """Draw one ellipse with a wavy, slightly soft border and a textured inside."""
    reach = int(2 * radius) + 3
    rows = slice(max(0, int(y) - reach), min(light_HW.shape[0], int(y) + reach + 1))
    columns = slice(max(0, int(x) - reach), min(light_HW.shape[1], int(x) + reach + 1))
    dy, dx = np.mgrid[rows, columns] - np.array([[[y]], [[x]]])
    turn, stretch = random.uniform(0, np.pi), random.uniform(1.0, 1.6)
    along = (dx * np.cos(turn) + dy * np.sin(turn)) / stretch**0.5
    across = (dy * np.cos(turn) - dx * np.sin(turn)) * stretch**0.5
    angle = np.arctan2(across, along)
    waves = sum(
        random.normal(0, 0.05) * np.cos(n * angle + random.uniform(0, 6.3)) for n in (2, 3, 5)
    )
    inside = (1 + waves) * radius - np.hypot(along, across)
    texture = 1 + 0.15 * np.sin(dx / 2.5 + random.uniform(0, 6)) * np.sin(dy / 2.5)
    glow = np.clip(inside / 2 + 0.5, 0, 1) * texture * random.uniform(0.45, 1.0)
    light_HW[rows, columns] = np.maximum(light_HW[rows, columns], glow)
    mask_HW[rows, columns] |= inside > 0


def _uneven_light(height: int, width: int, random: np.random.Generator) -> Array:
    """A slope and a bright spot, 0.35 to 1.6."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    slope = random.uniform(-0.6, 0.6) * (y - 0.5) + random.uniform(-0.6, 0.6) * (x - 0.5)
    spot = np.exp(-((y - random.uniform()) ** 2 + (x - random.uniform()) ** 2) / 0.3)
    return np.clip(0.8 + slope + 0.6 * spot, 0.35, 1.6).astype(np.float32)


def write_webdataset(folder: Path, images: int, shards: int) -> None:
    """Tars with ``KEY.png`` and ``KEY.mask.png`` of several sizes, always the same ones; tars that
    exist already are left alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        path = folder / f"nuclei-{shard:03d}.tar"
        if path.exists():
            continue
        partial = path.with_suffix(".partial")
        with tarfile.open(partial, "w") as tar:
            for number in range(shard, images, shards):
                made = nuclei(*SIZES[number % len(SIZES)], np.random.default_rng([0, number]))
                for suffix, pixels_HW in zip((".png", ".mask.png"), made, strict=True):
                    data, info = png(pixels_HW), tarfile.TarInfo(f"nuclei{number:05d}{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        partial.rename(path)


def png(pixels_HW: Array) -> bytes:
    """An 8-bit gray PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, format="PNG")
    return buffer.getvalue()
