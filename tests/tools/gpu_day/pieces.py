"""The product's pieces in the sizes of a measurement: networks, engines, batches and files."""

import copy
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.tools.gpu_day.day import Setup
from unet_core.config.presets import preset
from unet_core.images.preprocessing import Preprocessing
from unet_core.inference.engine import Batch, Engine, TileResult
from unet_core.inference.postprocessing import Postprocessing
from unet_core.networks.checkpoint import serialize
from unet_core.networks.header import Header, palette_of
from unet_core.networks.reach import tiling_of
from unet_core.networks.unet import UNet
from unet_core.synthetic import nuclei
from unet_core.tiling.tile_grid import TileGrid

HIGHEST = {"uint8": 255, "uint16": 4095, "float32": 1}


@functools.cache
def trained_like(
    width: int, classes: int = 1, channels: int = 1, name: str = "padded"
) -> tuple[UNet, Header]:
    """Random weights with the statistics of BatchNorm that random images give."""
    spec = preset(name, in_channels=channels, classes=classes, width=width)
    names = tuple(f"class {i}" for i in range(max(2, classes)))
    color = "gray" if channels == 1 else "rgb"
    prepared = Preprocessing(color=color, normalization="range")
    header = Header(spec, tiling_of(spec), names, prepared, palette_of(len(names)))
    torch.manual_seed(0)
    network, side = UNet(spec).train(), spec.sides.at_least(64 + 2 * spec.margin)
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(2, channels, side, side))
    return network.eval(), header


def engine_of(
    setup: Setup, width: int, precision: str, classes: int = 1, name: str = "padded",
    device: torch.device | None = None, **how: Any,
) -> Engine:  # fmt: skip
    """An engine on the device that is measured, or on another."""
    network, header = trained_like(width, classes, name=name)
    wanted = Postprocessing(classes, **how)
    return Engine(
        copy.deepcopy(network), header, device or setup.device, wanted, precision=precision
    )


def batch_of(header: Header, count: int, side: int, dtype: str = "uint8", seed: int = 0) -> Batch:
    """Tiles of noise; ``side`` is what the network receives."""
    channels, highest = header.network.in_channels, HIGHEST[dtype]
    pixels = np.random.default_rng(seed).random((count, channels, side, side)) * highest
    kept = side - 2 * header.tiling.margin
    return Batch(
        pixels.astype(dtype),
        np.zeros((count, channels), np.float32),
        np.full((count, channels), 1 / highest, np.float32),
        TileGrid(4096, header.tiling).over(kept, kept) * count,
        [None] * count,
    )


def input_of(setup: Setup, engine: Engine, count: int, side: int) -> Tensor:
    """Normalized tiles on the device, as the network receives them."""
    shape = (count, engine.header.network.in_channels, side, side)
    tiles_NCHW = torch.rand(shape, device=setup.device, dtype=engine.dtype)
    return tiles_NCHW.contiguous(memory_format=torch.channels_last)


def digest(results: list[TileResult]) -> str:
    """Of masks and confidences."""
    parts = (r.mask_HW.tobytes() + str(r.confidence_sum).encode() for r in results)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def gflop_of(width: int, side: int) -> float:
    """Of one tile, two for each multiply-add."""
    with torch.device("meta"):
        network = UNet(preset("padded", in_channels=1, classes=1, width=width)).eval()
        one = torch.zeros(1, 1, side, side)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(one)
    return counter.get_total_flops() / 1e9


@functools.cache
def matrix_tflops(setup: Setup, dtype: torch.dtype, allow_tf32: bool = False) -> float:
    """What the device multiplies in a second: large random matrices, in one dtype."""
    side = 256 if setup.is_tiny else 8192
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        one, other = (torch.randn(side, side, device=setup.device).to(dtype) for _ in range(2))
        return 2 * side**3 / 1e9 / setup.device_ms(lambda: one @ other)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@functools.cache
def images_of(setup: Setup, count: int, side: int, kind: str, channels: int) -> Path:
    """A folder with ``images`` of a kind and their ``masks``."""
    from PIL import Image

    root = Path(setup.scratch) / f"{kind}{channels}-{count}-{side}"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    drawn = [nuclei(side, side, np.random.default_rng(n)) for n in range(min(count, 8))]
    for number in range(count):
        image, mask = drawn[number % len(drawn)]
        image = np.roll(image, number, axis=0)
        image = np.repeat(image[..., None], 3, axis=2) if channels == 3 else image
        Image.fromarray(image).save(root / "images" / f"{number:04d}.{kind}")
        Image.fromarray(np.roll(mask, number, axis=0)).save(root / "masks" / f"{number:04d}.png")
    return root


@functools.cache
def checkpoint_of(setup: Setup, width: int, channels: int) -> str:
    """A checkpoint of a network with random weights."""
    network, header = trained_like(width, channels=channels)
    path = Path(setup.scratch) / f"width{width}-{channels}.safetensors"
    path.write_bytes(serialize(network, header))
    return str(path)
