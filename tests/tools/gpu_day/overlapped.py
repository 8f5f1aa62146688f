"""Batches of gray tiles through pinned memory on three streams: upload, network, download."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unet_core.arrays import Array
from unet_core.inference.engine import Batch, Engine
from unet_core.runs.schema import CONFIDENCE_UNIT

SLOTS = 3


@dataclass
class Slot:
    """Pinned memory of one batch under way."""

    tiles_NCHW: Tensor
    ids_NHW: Tensor
    sums_N: Tensor

    @classmethod
    def of(cls, batch: Batch) -> "Slot":
        """Memory for batches of a shape."""
        count, channels, height, width = batch.tiles_NCHW.shape
        shape = (count, channels, height, width)
        return cls(
            torch.empty(shape, dtype=torch.uint8, pin_memory=True),
            torch.empty((count, height, width), dtype=torch.uint8, pin_memory=True),
            torch.empty(count, dtype=torch.int64, pin_memory=True),
        )


class Pipeline:
    """An engine of one logit, with the copies of other batches beside its network."""

    def __init__(self, engine: Engine, like: Batch) -> None:
        self._engine = engine
        self._slots = [Slot.of(like) for _ in range(SLOTS)]
        self._up, self._down = torch.cuda.Stream(), torch.cuda.Stream()

    def submit(self, number: int, batch: Batch) -> tuple[Slot, torch.cuda.Event]:
        """Begin a batch in the slot of its number, which must be free; the event is its end."""
        slot = self._slots[number % SLOTS]
        slot.tiles_NCHW.copy_(torch.from_numpy(batch.tiles_NCHW))
        ids, sums = self._classified(self._uploaded(slot), batch)
        self._down.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._down):
            slot.ids_NHW.copy_(ids, non_blocking=True)
            slot.sums_N.copy_(sums, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        ids.record_stream(self._down)
        sums.record_stream(self._down)
        return slot, done

    def _uploaded(self, slot: Slot) -> Tensor:
        with torch.cuda.stream(self._up):
            tiles_NCHW = slot.tiles_NCHW.to(self._engine.device, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._up)
        tiles_NCHW.record_stream(torch.cuda.current_stream())
        return tiles_NCHW

    def _classified(self, tiles_NCHW: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        scale = float(batch.scale_NC[0, 0])  # one for all: no further upload
        x_NCHW = (tiles_NCHW.float() * scale).to(self._engine.dtype)
        x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        p_NHW = torch.sigmoid(self._engine.network(x_NCHW).float())[:, 0]
        ids_NHW = p_NHW > self._engine.postprocessing.threshold
        chosen_NHW = torch.where(ids_NHW, p_NHW, 1 - p_NHW)
        sums_N = (chosen_NHW * CONFIDENCE_UNIT).round_().to(torch.int32).sum((1, 2))
        return ids_NHW.to(torch.uint8), sums_N


@torch.inference_mode()
def overlapped(engine: Engine, batches: Sequence[Batch]) -> list[Array]:
    """Masks NHW of batches of one shape."""
    pipeline, waiting, masks = Pipeline(engine, batches[0]), deque(), list[Array]()

    def take() -> None:
        slot, done = waiting.popleft()
        done.synchronize()
        masks.append(np.array(slot.ids_NHW.numpy()))

    for number, batch in enumerate(batches):
        if len(waiting) == SLOTS:
            take()
        waiting.append(pipeline.submit(number, batch))
    while waiting:
        take()
    return masks
