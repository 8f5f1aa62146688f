"""The network on its device: tiles in, class ids out. Knows nothing of images, shards or files.

Shapes: N tiles, C channels, H×W pixels, K logits.
"""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unet_core.arrays import Array
from unet_core.checkpoint import Header
from unet_core.compute import Compute
from unet_core.errors import ConfigError
from unet_core.geometry import Tile
from unet_core.unet import UNet, fold_batchnorm

CONFIDENCE_UNIT = 65535
CPU_BATCH_BYTES = 32 * 2**20  # what stays in cache: larger batches are slower on a CPU
GPU_BATCH_BYTES = 4 * 2**30
VERSIONED = ("torch", "numpy", "pyarrow", "pillow", "tifffile", "imagecodecs")


@dataclass(frozen=True)
class Batch:
    """Tiles of one shape and dtype, with what normalises each."""

    tiles_NCHW: Array
    offset_NC: Array
    scale_NC: Array
    keep: Sequence[Tile]
    """Which part of each tile the mask takes."""


@dataclass(frozen=True)
class Segmented:
    """The kept part of one tile."""

    mask_HW: Array
    confidence_sum: int
    """Σ round(p · 65535) of the chosen class over the kept part."""
    is_finite: bool
    """Whether the network gave numbers everywhere in the tile."""


def choose_device(wanted: str) -> torch.device:
    """The torch device for ``model.device``; raises ConfigError if it is not there."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        wanted = next(name for name, there in available.items() if there)
    if not available[wanted]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ConfigError(f"model.device: got {wanted!r}, available here: {there}")
    return torch.device(wanted)


class Engine:
    """One replica of a network, ready for batches; BatchNorm folded, channels last."""

    def __init__(
        self, network: UNet, header: Header, device: torch.device, threshold: float
    ) -> None:
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.allow_tf32 = False
        self.header = header
        self.device = device
        self.threshold = threshold
        folded = fold_batchnorm(network.eval())
        self.network = folded.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks the pair
        self.lanes = 1
        """Batches that run side by side, each on a thread of its own."""
        self.mask_dtype = torch.uint8 if header.classes <= 256 else torch.int32

    def share_cores(self, cores: int, tile_size: int) -> None:
        """On a CPU, let lanes of one thread each share the cores, as many as fit in memory.

        One thread an operation, always: with more, some convolutions split their sums by threads
        and logits differ by 1e-6 from machine to machine.
        """
        if self.device.type == "cpu":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            affordable = memory // 4 // (tile_size**2 * self._bytes_per_pixel)
            self.lanes = max(1, min(cores, affordable))
            torch.set_num_threads(1)

    def probe(self, tile_size: int, batch: int | str) -> Compute:
        """This device's ``compute`` section; ``batch`` is a number of full tiles, or ``auto``."""
        pixels = self._affordable_pixels() if batch == "auto" else int(batch) * tile_size**2
        return Compute(
            device=_device_model(self.device),
            precision="float32",
            backend="eager",
            batch_pixels=pixels,
            versions={name: importlib.metadata.version(name) for name in VERSIONED},
        )

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Segmented]:
        """Segment one batch. The same batch gives the same bits, whatever ran before."""
        x_NCHW = torch.from_numpy(batch.tiles_NCHW).to(self.device)
        offset = torch.from_numpy(batch.offset_NC).to(self.device)[..., None, None]
        scale = torch.from_numpy(batch.scale_NC).to(self.device)[..., None, None]
        x_NCHW = (x_NCHW.float() - offset) * scale
        logits_NKHW = self.network(x_NCHW.contiguous(memory_format=torch.channels_last))
        finite_N = torch.isfinite(logits_NKHW).flatten(1).all(dim=1).tolist()
        ids_NHW, confidence_NHW = self._classify(logits_NKHW)
        sums = []
        for index, tile in enumerate(batch.keep):
            rows, columns = _kept(tile)
            sums.append(confidence_NHW[index, rows, columns].sum())
        ids = ids_NHW.to(self.mask_dtype).cpu().numpy()
        if ids.dtype != np.uint8:
            ids = ids.astype(np.uint16)
        totals = torch.stack(sums).tolist()
        return [
            Segmented(ids[index][_kept(tile)], int(totals[index]), finite_N[index])
            for index, tile in enumerate(batch.keep)
        ]

    def _classify(self, logits_NKHW: Tensor) -> tuple[Tensor, Tensor]:
        """Class ids NHW, and the chosen class's probability in 1/65535 as integers."""
        if logits_NKHW.shape[1] == 1:
            p_NHW = torch.sigmoid(logits_NKHW[:, 0])
            ids_NHW = p_NHW > self.threshold
            chosen_NHW = torch.where(ids_NHW, p_NHW, 1 - p_NHW)
        else:
            chosen_NHW, ids_NHW = torch.softmax(logits_NKHW, dim=1).max(dim=1)
        return ids_NHW, (chosen_NHW * CONFIDENCE_UNIT).round_().to(torch.int32)

    @property
    def _bytes_per_pixel(self) -> int:
        """At the widest place about 4·width float32 values live for each pixel."""
        return 4 * 4 * self.header.spec.width

    def _affordable_pixels(self) -> int:
        """How many pixels fit the byte budget of a batch."""
        budget = CPU_BATCH_BYTES
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            budget = min(free // 2, GPU_BATCH_BYTES)
        return int(budget // self._bytes_per_pixel)


def _kept(tile: Tile) -> tuple[slice, slice]:
    """The kept part in the tile's own coordinates."""
    y, x = tile.y, tile.x
    return (
        slice(y.keep_start - y.start, y.keep_stop - y.start),
        slice(x.keep_start - x.start, x.keep_stop - x.start),
    )


def _device_model(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {platform.machine()} {capability}"
