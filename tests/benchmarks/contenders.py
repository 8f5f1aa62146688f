"""Who can segment a folder of images and write Parquet: ``predict``, and what others use."""

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn

from jobs.predict import predict
from unet_core.arrays import Array
from unet_core.config.loading import build
from unet_core.config.predict import PredictConfig
from unet_core.config.presets import Factory, NetworkSpec
from unet_core.networks import checkpoint
from unet_core.networks.header import read_header
from unet_core.networks.unet import fold_batchnorm

CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Case:
    """Images of one size, and the network that segments them."""

    name: str
    about: str
    images: int
    side: int
    network: NetworkSpec | None = None
    """None: ``builtin:nuclei``, which is ``padded`` of width 8."""
    window: int = 512
    """Of MONAI; 0 leaves it out."""
    on_ray: bool = False


@dataclass(frozen=True)
class Work:
    """What everybody is given."""

    case: Case
    images: Path
    checkpoint: str
    has_back_end: bool = False
    """Ours: BatchNorm folded, channels last."""

    @property
    def paths(self) -> list[Path]:
        return sorted(self.images.rglob("*.png"))

    @property
    def factory(self) -> str:
        network = self.case.network
        return network.factory if isinstance(network, Factory) else ""

    @property
    def step(self) -> int:
        """Sides must be a multiple of it."""
        return read_header(self.checkpoint).tiling.sides.step

    def load(self) -> nn.Module:
        network = checkpoint.load_model(self.checkpoint, self.factory)
        if self.has_back_end:
            network = fold_batchnorm(network).to(memory_format=torch.channels_last)
        return network


def plain_loop(work: Work, out: Path) -> None:
    """One image after the other, then one file."""
    network, step = work.load(), work.step
    rows = []
    with torch.inference_mode():
        for path in work.paths:
            gray_HW = np.asarray(Image.open(path).convert("L"))
            rows.append(row(path, segmented(network, step, gray_HW)))
    pq.write_table(pa.Table.from_pylist(rows), out)


class Images(torch.utils.data.Dataset[tuple[Array, str, tuple[int, int]]]):
    """As tutorials of torch begin."""

    def __init__(self, paths: list[Path], step: int) -> None:
        self.paths, self.step = paths, step

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Array, str, tuple[int, int]]:
        gray_HW = np.asarray(Image.open(self.paths[index]).convert("L"))
        x_CHW = padded(normalized(gray_HW), self.step)[None]
        return x_CHW, str(self.paths[index]), gray_HW.shape


def data_loader(work: Work, out: Path) -> None:
    """The same with two processes that decode."""
    network, images = work.load(), Images(work.paths, work.step)
    rows = []
    with torch.inference_mode():
        for x_NCHW, paths, (heights, widths) in torch.utils.data.DataLoader(images, num_workers=2):
            masks_NHW = (torch.sigmoid(network(x_NCHW))[:, 0] > 0.5).numpy().astype(np.uint8)
            for mask_HW, path, height, width in zip(masks_NHW, paths, heights, widths, strict=True):
                rows.append(row(Path(path), mask_HW[:height, :width]))
    pq.write_table(pa.Table.from_pylist(rows), out)


def monai(work: Work, out: Path) -> None:
    """As its tutorials evaluate: transforms, its loader, windows that overlap by a quarter."""
    from monai.data import DataLoader, Dataset, PILReader, decollate_batch
    from monai.inferers import sliding_window_inference
    from monai.transforms import Activations, AsDiscrete, Compose, LoadImage
    from monai.transforms import ScaleIntensityRangePercentiles as Scale

    reader = PILReader(reverse_indexing=False)
    load = Compose([LoadImage(reader=reader, ensure_channel_first=True), Scale(1, 99.8, 0, 1)])
    finish = Compose([Activations(sigmoid=True), AsDiscrete(threshold=0.5)])
    loader = DataLoader(Dataset(work.paths, load), batch_size=1, num_workers=1)
    network = work.load()
    rows = []
    with torch.inference_mode():
        for x_NCHW in loader:
            logits = sliding_window_inference(x_NCHW, work.case.window, 4, network)
            for mask_CHW in map(finish, decollate_batch(logits)):
                path = Path(mask_CHW.meta["filename_or_obj"])
                rows.append(row(path, mask_CHW[0].numpy().astype(np.uint8)))
    pq.write_table(pa.Table.from_pylist(rows), out)


class RaySegmenter:
    """What an actor of Ray Data does with a batch."""

    def __init__(self, work: Work) -> None:
        self.network, self.step = work.load(), work.step

    def __call__(self, batch: dict[str, Array]) -> pa.Table:
        rows = []
        with torch.inference_mode():
            for gray_HW, path in zip(batch["image"], batch["path"], strict=True):
                rows.append(row(Path(path), segmented(self.network, self.step, gray_HW)))
        return pa.Table.from_pylist(rows)


def ray_data(work: Work, out: Path) -> None:
    """Read, map over a pool of actors, write, as Ray's guide to batch inference does."""
    import ray

    data = ray.data.read_images(str(work.images), include_paths=True, mode="L")
    data = data.map_batches(
        RaySegmenter,
        fn_constructor_args=(work,),
        # faster than one actor of a whole core and a core to read with
        compute=ray.data.ActorPoolStrategy(size=CORES),
        num_cpus=0.5,
        batch_size=8,
    )
    data.write_parquet(str(out))


def ours(work: Work, out: Path, count: str | int = "inline", report: bool = False) -> None:
    """The whole job."""
    table = {
        "input": {"uri": str(work.images)},
        "model": {"checkpoint": work.checkpoint, "factory": work.factory},
        "output": {"uri": str(out), "report": report},
        "workers": {"count": count},
    }
    with contextlib.redirect_stderr(io.StringIO()):  # its progress
        assert predict(build(PredictConfig, table, [])).is_complete


def segmented(network: nn.Module, step: int, gray_HW: Array) -> Array:
    """One image, as anybody would."""
    x_NCHW = torch.from_numpy(padded(normalized(gray_HW), step))[None, None]
    mask_HW = torch.sigmoid(network(x_NCHW))[0, 0] > 0.5
    height, width = gray_HW.shape
    return mask_HW[:height, :width].numpy().astype(np.uint8)


def normalized(gray_HW: Array) -> Array:
    """Percentiles 1 and 99.8 become 0 and 1; float32."""
    low, high = np.percentile(gray_HW, (1, 99.8))
    return (gray_HW.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-6))


def padded(x_HW: Array, step: int) -> Array:
    """Reflected at the far edges to sides that the network takes."""
    height, width = x_HW.shape
    return np.pad(x_HW, ((0, -height % step), (0, -width % step)), mode="reflect")


def row(path: Path, mask_HW: Array) -> dict[str, Any]:
    height, width = mask_HW.shape
    return {"image": path.name, "height": height, "width": width, "mask": mask_HW.tobytes()}


@dataclass(frozen=True)
class Contender:
    """Somebody who can do the work."""

    name: str
    run: Callable[[Work, Path], None]
    has_back_end: bool = False
    needs: str = "torch"
    """A library."""

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


INLINE = Contender("`predict` inline", ours)
HERE = (
    INLINE,
    Contender("`predict` inline, with its report", partial(ours, report=True)),
    Contender("plain loop", plain_loop),
    Contender("plain loop, our back end", plain_loop, True),
    Contender("loop over DataLoader", data_loader),
    Contender("MONAI", monai, False, "monai"),
    Contender("MONAI, our back end", monai, True, "monai"),
)
ACTORS = Contender("`predict`, one actor of all cores", partial(ours, count=1))
ON_RAY = (
    ACTORS,
    Contender("`predict`, two actors", partial(ours, count=2)),
    Contender("`predict` inline, beside Ray", ours),
    Contender("Ray Data", ray_data, False, "ray.data"),
    Contender("Ray Data, our back end", ray_data, True, "ray.data"),
)
