"""Beside a bare loop: ``python -m tests.benchmarks.bare_training IMAGES MASKS [KEY=VALUE]``.

The loop has the same network, loss, clipping and kind of optimizer, and its crops in memory as
tensors; it reads, decodes, augments, checks and saves nothing. It runs twice: in a process of its
own, as people write it, and in the process of the training, which keeps freed memory for both. All
take turns, an epoch each; evaluation is left out. The first epoch, when images are decoded, warms
everything up.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import nn

from unet_core.config.loading import build
from unet_core.config.train import TrainConfig
from unet_core.inference.engine import choose_device
from unet_core.training.augment import MicroBatch
from unet_core.training.fit import Epoch, Step, fit
from unet_core.training.learner import autocast_dtype, new_network
from unet_core.training.losses import Loss

TURNS = 8


def ours(config: TrainConfig) -> Iterator[tuple[int, float]]:
    """Steps with a full batch, and seconds of one of them, epoch by epoch."""
    seconds: list[float] = []
    for event in fit(config):
        if isinstance(event, Step) and event.crops == config.train.batch:
            seconds.append(event.seconds)
        elif isinstance(event, Epoch):
            yield len(seconds), statistics.mean(seconds)
            seconds = []


def bare(config: TrainConfig) -> Callable[[int], float]:
    """The plain loop: takes so many steps and gives seconds of one."""
    device = choose_device(config.model.device)
    network, header = new_network(config)
    network = network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), config.train.learning_rate)
    loss = Loss(config.loss, 255, None)
    dtype, batch, crop = autocast_dtype(config.train, device), config.train.batch, config.train.crop
    side, channels = crop + 2 * header.tiling.margin, header.preprocessing.channels
    images = torch.rand(batch, channels, side, side, device=device)
    labels = torch.randint(0, 2, (batch, crop, crop), device=device)
    micro_batch = MicroBatch(
        [""] * batch, images.contiguous(memory_format=torch.channels_last), labels, None
    )
    counts = loss.counts(micro_batch)

    def step() -> float:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = network(micro_batch.images_NCHW)
        share = loss.share(logits, micro_batch, counts)
        optimizer.zero_grad(set_to_none=True)
        share.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return share.item()

    def timed(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - started) / steps

    return timed


def begin(config: TrainConfig) -> None:
    """Set up the loop of this process."""
    global alone  # noqa: PLW0603  # what a pool's process has from its beginning
    alone = bare(config)


def apart(steps: int) -> float:
    """A turn of this process's loop."""
    return alone(steps)


def turns(config: TrainConfig) -> Iterator[tuple[float, float, float]]:
    """Seconds of a step: of the loop in its own process, in this one, and of the training."""
    beside, spawn = bare(config), get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=begin, initargs=(config,)) as pool:
        for turn, (steps, with_data) in enumerate(ours(config)):
            found = pool.submit(apart, steps).result(), beside(steps), with_data
            if turn:
                yield found


def main() -> None:
    """Print crops a second of both, and the ratio."""
    images, masks, *overrides = sys.argv[1:]
    table = {
        "data": {"train": {"uri": images, "masks": masks, "label_map": {255: 1}}},
        "model": {"width": 8},
        "train": {"epochs": 1 + TURNS, "crop": 224, "batch": 8},
        "augment": {"rotation": 45, "scale": 1.33, "elastic": 5},
        "output": {"uri": "/nowhere"},
    }
    config = build(TrainConfig, table, overrides)
    with tempfile.TemporaryDirectory() as folder:
        output = config.output.model_copy(update={"uri": f"{folder}/model"})
        seconds = list(turns(config.model_copy(update={"output": output})))
    *loops, with_data = zip(*seconds, strict=True)
    print(f"train: {config.train.batch / statistics.median(with_data):.1f} crops/s")
    for name, loop in zip(("bare loop", "with memory kept"), loops, strict=True):
        ratios = sorted(one / other for one, other in zip(loop, with_data, strict=True))
        rate, ratio = config.train.batch / statistics.median(loop), statistics.median(ratios)
        print(f"{name}: {rate:.1f} crops/s, ratio {ratio:.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
