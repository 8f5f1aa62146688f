"""The network on its device: tiles in, class ids out. Independent of images, shards and files.

Shapes: N tiles, C channels, H×W pixels, K logits.
"""

import contextlib
import importlib.metadata
import logging
import platform
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from unet_core.arrays import Array
from unet_core.config.presets import Factory
from unet_core.errors import ConfigError, WorkersError
from unet_core.inference.postprocessing import Postprocessing, confidence_units
from unet_core.memory import retain_freed_memory, return_large_blocks, usable_bytes
from unet_core.networks.construction import origin
from unet_core.networks.header import Header
from unet_core.networks.unet import fold_batchnorm
from unet_core.runs.compute import Compute
from unet_core.tiling.geometry import Tile

log = logging.getLogger(__name__)

CPU_BATCH_BYTES = 16 * 2**20  # fits into the cache: larger batches are slower on a CPU
CPU_PIXELS = 2**20  # under way for each core
GPU_BATCH_BYTES = 4 * 2**30  # at most, and half of the memory that is free
FLIPS: list[tuple[int, ...]] = [(), (-1,), (-2,), (-2, -1)]
SYMMETRIES: dict[str, list[tuple[tuple[int, ...], bool]]] = {
    "none": [((), False)],
    "flips": [(axes, False) for axes in FLIPS],
    "dihedral": [(axes, turned) for turned in (False, True) for axes in FLIPS],
}
"""Axes to flip, and whether rows and columns are then swapped, by ``tile.tta``."""
VERSIONED = ("torch", "numpy", "pyarrow", "pillow", "tifffile", "imagecodecs")


@dataclass(frozen=True)
class Batch:
    """Tiles of one shape and dtype, with the offset and scale of each."""

    tiles_NCHW: Array
    offset_NC: Array
    scale_NC: Array
    keep: Sequence[Tile]
    """The place of each tile, and its kept part."""
    valid: Sequence[Array | None]
    """Validity of each kept part, HW; None if all of it is valid."""

    @property
    def pixels(self) -> int:
        """N·H·W."""
        return self.tiles_NCHW[:, 0].size

    def part(self, of: slice) -> "Batch":
        """The batch of some of its tiles."""
        return Batch(*(getattr(self, field.name)[of] for field in fields(self)))


@dataclass(frozen=True)
class TileResult:
    """The kept part of one tile."""

    mask_HW: Array | None
    """None where tiles are blended: only their mean decides."""
    confidence_sum: int
    """Σ round(p · 65535) of the chosen class over the valid pixels of the kept part."""
    is_finite: bool
    """False where the network gave NaN or infinity anywhere in the tile."""
    probabilities_KHW: Array | None = None
    """In the type of ``output.probabilities``, or float32 where tiles are blended."""
    valid_HW: Array | None = None
    """Validity of the kept part; None if all of it is valid."""


class PixelBudget:
    """Limits the pixels under way at once; a batch waits until it fits."""

    def __init__(self, pixels: int) -> None:
        self._all = self._free = pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Reserve pixels for a batch; one larger than the budget takes all of it."""
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def choose_device(wanted: str, gpus: float | str = "auto") -> torch.device:
    """The torch device for ``model.device`` and ``workers.gpus``: ``auto`` is the CPU where no GPUs
    are wanted. Raises ConfigError for a device that is not there.
    """
    found = ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())
    there = [*(name for name, is_there in found if is_there), "cpu"]
    if wanted not in ("auto", *there):
        raise ConfigError(f"model.device: got {wanted!r}, available here: {', '.join(there)}")
    best = "cpu" if gpus == 0 else there[0]
    return torch.device(best if wanted == "auto" else wanted)


def to_tensor(values: Array, device: torch.device) -> Tensor:
    """Convert an array to a tensor that a device takes: Apple's GPUs take no uint16."""
    tensor = torch.from_numpy(values)
    return tensor.float() if device.type == "mps" and values.dtype == np.uint16 else tensor


def memory_format(device: torch.device) -> torch.memory_format:
    """Choose the memory layout of feature maps; Apple's GPUs compute some wrongly with channels
    last (pytorch/pytorch issues 174345, 180984).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class Engine:
    """One replica of a network, ready for batches; BatchNorm folded into convolutions."""

    def __init__(
        self,
        network: nn.Module,
        header: Header,
        device: torch.device,
        postprocessing: Postprocessing,
        blends: bool = False,
        precision: str = "float32",
    ) -> None:
        """``blends``: tiles overlap and are averaged, and results hold probabilities only."""
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.allow_tf32 = False
        self.header = header
        self.device = device
        self.postprocessing = postprocessing
        self._blends = blends
        self.max_batch_pixels: int | None = None
        """Limit of pixels in a batch, once one did not fit the device's memory."""
        folded = fold_batchnorm(network.eval())
        self._format = memory_format(device)
        self.dtype: torch.dtype = getattr(torch, precision)
        self.network = folded.to(device, self.dtype, memory_format=self._format)  # type: ignore[call-overload]  # stub lacks the three
        self.lanes = 1
        """Batches that run side by side, each on a thread of its own."""
        self._budget = PixelBudget(2**62)

    def share_cores(self, cores: int, tile_size: int) -> None:
        """Share the cores of a CPU among lanes of one thread each; their batches together hold a
        megapixel for each core, or one tile.

        One thread an operation, always: with more, some convolutions split their sums by threads
        and logits differ by 1e-6 from machine to machine.
        """
        if self.device.type == "cpu":
            affordable = usable_bytes() // 4 // self._bytes_per_pixel
            self.lanes = max(1, cores)
            self._budget = PixelBudget(max(tile_size**2, min(cores * CPU_PIXELS, affordable)))
            torch.set_num_threads(1)
            if tile_size**2 > CPU_PIXELS:
                return_large_blocks()
            else:
                retain_freed_memory()

    def probe(self, tile_size: int, batch: int | str) -> Compute:
        """This device's ``compute`` section; ``batch`` is a number of full tiles, or ``auto``."""
        versions = {name: importlib.metadata.version(name) for name in VERSIONED}
        if isinstance(self.header.network, Factory):
            versions["model.factory"] = origin(self.header.network)
        return Compute(
            device=device_model(self.device),
            precision=str(self.dtype).removeprefix("torch."),
            backend="eager",
            batch_pixels=(
                self._affordable_pixels() if batch == "auto" else int(batch) * tile_size**2
            ),
            versions=versions,
        )

    def run(self, batch: Batch) -> list[TileResult]:
        """Segment one batch. The same batch gives the same bits, unless it had to be split for
        memory.

        Raises WorkersError if a single tile does not fit.
        """
        count = len(batch.keep)
        if count == 1 or self.max_batch_pixels is None or batch.pixels <= self.max_batch_pixels:
            try:
                with self._budget.taken(batch.pixels):
                    return self._segment(batch)
            except torch.OutOfMemoryError as error:
                if count == 1:
                    height, width = batch.tiles_NCHW.shape[2:]
                    raise WorkersError(
                        f"{self.device} runs out of memory with a single tile of {height} × "
                        f"{width} pixels; lower tile.size"
                    ) from error
            self.max_batch_pixels = batch.pixels // 2
            log.warning("batch split for memory: max_batch_pixels=%d", self.max_batch_pixels)
            self.free_memory()
        half = (count + 1) // 2
        return [*self.run(batch.part(slice(half))), *self.run(batch.part(slice(half, None)))]

    def free_memory(self) -> None:
        """Release device memory that torch only caches."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _segment(self, batch: Batch) -> list[TileResult]:
        p_NKHW, finite_N = self._probabilities(self._normalize(batch))
        kept = [(index, *tile.kept(self.header.tiling.margin)) for index, tile in
                enumerate(batch.keep)]  # fmt: skip
        wanted = self._wanted(p_NKHW)
        shown = [wanted[i, :, y, x] if wanted is not None else None for i, y, x in kept]
        if self._blends:
            return [TileResult(None, 0, finite_N[i], shown[i], batch.valid[i]) for i, _, _ in kept]
        ids_NHW, chosen_NHW = self.postprocessing.classify(p_NKHW.movedim(1, 0))
        confidence_NHW = confidence_units(chosen_NHW).to(torch.int32)
        for at, valid_HW in zip(kept, batch.valid, strict=True):
            if valid_HW is not None:
                confidence_NHW[at] *= torch.from_numpy(valid_HW).to(self.device)
        totals = torch.stack([confidence_NHW[at].sum() for at in kept]).tolist()
        kind = torch.uint8 if self.header.classes < 256 else torch.int32  # no uint16 for Apple
        ids = ids_NHW.to(kind).cpu().numpy()
        return [
            TileResult(ids[at], int(totals[i]), finite_N[i], shown[i], batch.valid[i])
            for i, at in enumerate(kept)
        ]

    def _normalize(self, batch: Batch) -> Tensor:
        x_NCHW = to_tensor(batch.tiles_NCHW, self.device).to(self.device)
        offset = torch.from_numpy(batch.offset_NC).to(self.device)[..., None, None]
        scale = torch.from_numpy(batch.scale_NC).to(self.device)[..., None, None]
        return (x_NCHW.float() - offset) * scale

    def _probabilities(self, x_NCHW: Tensor) -> tuple[Tensor, list[bool]]:
        """Mean over the symmetries, and whether each tile's logits are finite."""
        means, is_finite_N = None, torch.ones(len(x_NCHW), dtype=torch.bool, device=self.device)
        for axes, turned in SYMMETRIES[self.postprocessing.tta]:
            seen = x_NCHW.flip(axes)
            seen = (seen.mT if turned else seen).contiguous(memory_format=self._format)
            logits_NKHW = self.network(seen.to(self.dtype)).float()
            is_finite_N &= torch.isfinite(logits_NKHW).flatten(1).all(dim=1)
            is_one = logits_NKHW.shape[1] == 1
            p_NKHW = torch.sigmoid(logits_NKHW) if is_one else torch.softmax(logits_NKHW, dim=1)
            p_NKHW = (p_NKHW.mT if turned else p_NKHW).flip(axes)
            means = p_NKHW if means is None else means + p_NKHW
        assert means is not None
        return means / len(SYMMETRIES[self.postprocessing.tta]), is_finite_N.tolist()

    def _wanted(self, p_NKHW: Tensor) -> Array | None:
        """The probabilities of results: all of blended tiles, else those that are kept."""
        if self._blends:
            return p_NKHW.cpu().numpy()
        kind = self.postprocessing.probabilities
        if kind == "none":
            return None
        return self.postprocessing.quantize(p_NKHW).to(getattr(torch, kind)).cpu().numpy()

    @property
    def _bytes_per_pixel(self) -> int:
        """Memory of activations, of which about four of the widest maps live at once."""
        return 4 * self.dtype.itemsize * self.header.tiling.channels

    def _affordable_pixels(self) -> int:
        """Number of pixels that fit the memory budget of a batch."""
        budget = CPU_BATCH_BYTES
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            budget = min(free // 2, GPU_BATCH_BYTES)
        return int(budget // self._bytes_per_pixel)


def device_model(device: torch.device) -> str:
    """The model name of a GPU, or the instruction set that torch uses on a CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
