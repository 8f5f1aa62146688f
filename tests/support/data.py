"""What tests read: small synthetic images, as loose files and as tars."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from unet_core.config import InputConfig
from unet_core.images.preprocessing import Preprocessing
from unet_core.networks import checkpoint
from unet_core.networks.checkpoint import Header, palette_of
from unet_core.networks.construction import build, measured
from unet_core.networks.presets import NetworkSpec
from unet_core.synthetic import nuclei, png

SIZES = ((64, 64), (50, 70), (96, 64), (33, 40), (300, 270), (64, 64))
IMAGES = 12


def reading(max_pixels: int, **options: object) -> InputConfig:
    """How files are read."""
    return InputConfig.model_validate({"uri": "x", "max_pixels": max_pixels, **options})


def write_checkpoint(path: Path, spec: NetworkSpec, network: nn.Module | None = None) -> str:
    """A checkpoint with random weights, and statistics as if it had been trained."""
    torch.manual_seed(1)
    network = build(spec) if network is None else network
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    network.eval()
    spec, tiling = measured(spec, network)
    with torch.no_grad():
        x_NCHW = torch.rand(1, spec.in_channels, *[tiling.sides.at_least(320)] * 2)
        *_, last = (p for name, p in network.named_parameters() if name.endswith("bias"))
        last -= network(x_NCHW).median(dim=3).values.median(dim=2).values[0]  # all classes occur
    names = ("background", "nucleus", *(f"class {n}" for n in range(2, spec.classes)))
    header = Header(
        spec,
        tiling,
        names,
        Preprocessing(color="gray", normalisation="percentile"),
        palette_of(len(names)),
    )
    path.write_bytes(checkpoint.serialise(network, header))
    return str(path)


def pictures() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Named images with masks; one is larger than the tile that tests use."""
    made = []
    for number in range(IMAGES):
        random = np.random.default_rng(number)
        made.append((f"cell{number:02d}", *nuclei(*SIZES[number % len(SIZES)], random)))
    return made


def write_folder(root: Path) -> Path:
    for name, image, mask in pictures():
        for kind, pixels in (("images", image), ("masks", mask)):
            (root / kind).mkdir(exist_ok=True)
            (root / kind / f"{name}.png").write_bytes(png(pixels))
    return root


def write_tars(root: Path) -> Path:
    made = pictures()
    for number in range(6):
        members = {}
        for name, image, mask in made[number::6]:
            members |= {f"{name}.png": png(image), f"{name}.mask.png": png(mask)}
        write_tar(root / f"shard-{number}.tar", members)
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def digests(run: str | Path) -> dict[str, str]:
    """SHA-256 of every part of a run, by name."""
    return {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in ("masks", "metrics")
        for path in sorted((Path(run) / kind).glob("*"))
    }
