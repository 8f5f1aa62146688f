"""Beside a bare loop: ``python -m tests.benchmarks.bare_training IMAGES MASKS [KEY=VALUE]``.

The loop has the same network, optimiser and loss, and all its crops in memory as tensors; it reads,
decodes, augments, checks and saves nothing. Both take turns; evaluation is left out of both.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from torch import nn

from unet_core.config import build
from unet_core.engine import choose_device
from unet_core.fit import Step, fit
from unet_core.train_config import TrainConfig
from unet_core.training.augment import Examples
from unet_core.training.learner import precision
from unet_core.training.losses import Loss
from unet_core.training.start import new_network

TURNS = 5


def ours(config: TrainConfig) -> float:
    """Images a second of the second epoch, when all images are decoded."""
    with tempfile.TemporaryDirectory() as folder:
        output = config.output.model_copy(update={"uri": f"{folder}/model"})
        steps = [
            event
            for event in fit(config.model_copy(update={"output": output}))
            if isinstance(event, Step) and event.epoch == 1
        ]
    return sum(step.images for step in steps) / sum(step.seconds for step in steps)


def bare(config: TrainConfig) -> float:
    """Images a second of the plain loop."""
    device = choose_device(config.model.device)
    network, header = new_network(config)
    network = network.to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(network.parameters(), config.train.learning_rate)
    loss = Loss(config.loss, 255, None)
    dtype, batch, crop = precision(config.train, device), config.train.batch, config.train.crop
    side, channels = crop + 2 * header.tiling.margin, header.preprocessing.channels
    images = torch.rand(batch, channels, side, side, device=device)
    labels = torch.randint(0, 2, (batch, crop, crop), device=device)
    examples = Examples(
        [""] * batch, images.contiguous(memory_format=torch.channels_last), labels, None
    )
    counts = loss.counts(examples)

    def step() -> float:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = network(examples.images_NCHW)
        part = loss.part(logits, examples, *counts)
        optimiser.zero_grad(set_to_none=True)
        part.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        return part.item()

    step()
    started, steps = time.perf_counter(), 12
    for _ in range(steps):
        step()
    return steps * batch / (time.perf_counter() - started)


def turns(config: TrainConfig) -> Iterator[tuple[float, float]]:
    """Both sides, one after the other."""
    for _ in range(TURNS):
        yield bare(config), ours(config)


def main() -> None:
    """Print images a second of both, and the ratio."""
    images, masks, *overrides = sys.argv[1:]
    table = {
        "data": {"train": {"uri": images, "masks": masks, "label_map": {255: 1}}},
        "model": {"width": 8},
        "train": {"epochs": 2, "crop": 224, "batch": 8},
        "augment": {"rotation": 45, "scale": 1.33, "elastic": 5},
        "output": {"uri": "/nowhere"},
    }
    config = build(TrainConfig, table, overrides)
    rates = list(turns(config))
    ratios = [with_data / alone for alone, with_data in rates]
    print(f"bare loop: {statistics.median(r for r, _ in rates):.1f} images/s")
    print(f"train:     {statistics.median(r for _, r in rates):.1f} images/s")
    low, high = min(ratios), max(ratios)
    print(f"ratio:     {statistics.median(ratios):.3f} ({low:.3f}–{high:.3f})")


if __name__ == "__main__":
    main()
