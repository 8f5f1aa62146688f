"""What tests read: small synthetic images in files of every kind, and checkpoints."""

import hashlib
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
import torch
from torch import nn

from unet_core.config.presets import NetworkSpec
from unet_core.config.sections import InputConfig
from unet_core.images.preprocessing import Preprocessing
from unet_core.images.sample import Sample
from unet_core.inputs.formats import list_shards, open_source, read_shard
from unet_core.inputs.shards import Shard
from unet_core.networks import checkpoint
from unet_core.networks.construction import build, measure_tiling
from unet_core.networks.header import Header, palette_of
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
    spec, tiling = measure_tiling(spec, network)
    with torch.no_grad():
        x_NCHW = torch.rand(1, spec.in_channels, *[tiling.sides.at_least(320)] * 2)
        *_, last = (p for name, p in network.named_parameters() if name.endswith("bias"))
        last -= network(x_NCHW).median(dim=3).values.median(dim=2).values[0]  # all classes occur
    names = ("background", "nucleus", *(f"class {n}" for n in range(2, spec.classes)))
    header = Header(
        spec,
        tiling,
        names,
        Preprocessing(color="gray", normalization="percentile"),
        palette_of(len(names)),
    )
    path.write_bytes(checkpoint.serialize(network, header))
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


def read_all(uri: str | Path, **keys: object) -> tuple[list[Shard], list[list[Sample]]]:
    """The shards of an input, and the samples of each."""
    source = open_source(InputConfig.model_validate({"uri": str(uri), **keys}))
    shards = list(list_shards(source))
    return shards, [list(read_shard(source, shard)) for shard in shards]


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


def write_many_tars(root):
    """Enough work that a kill comes in the middle: 24 tars, 48 images."""
    tars = write_tars(root / "tars")
    for number in range(6, 24):
        copy = tars / f"shard-{number:02d}.tar"
        copy.write_bytes((tars / f"shard-{number % 6}.tar").read_bytes())
    return tars


def write_slides(root, **options):
    """Two large images among a small one, with truth."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number, shape in enumerate(((700, 530), (60, 70), (400, 650))):
        image, mask = nuclei(*shape, np.random.default_rng(number))
        rgb = np.stack([image, image // 2, 255 - image], -1)
        tifffile.imwrite(root / "images" / f"{number}.tif", rgb, photometric="rgb", **options)
        tifffile.imwrite(root / "masks" / f"{number}.tif", mask, **options)
    return {"uri": str(root / "images"), "masks": str(root / "masks")}


def write_parquet(path, rows=None, row_group_size=2, **columns):
    """The pictures as datasets libraries write them."""
    table = {
        "image": [{"bytes": png(i), "path": f"{n}.png"} for n, i, _ in pictures()],
        "truth": [png(t) for _, _, t in pictures()],
        "name": [n for n, _, _ in pictures()],
        **columns,
    }
    pq.write_table(pa.table(table).slice(0, rows), path, row_group_size=row_group_size)


def tiff(pixels, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def rewritten(path, tmp_path, change):
    """The checkpoint with its JSON header changed."""
    data = Path(path).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return str(bad)
