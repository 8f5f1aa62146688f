"""The training loop: one process, no Ray. Whole images in memory, random crops, best kept."""

import copy
import hashlib
import io
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from unet_core import checkpoint
from unet_core.canvas import Canvas, Look
from unet_core.checkpoint import Header, palette_of
from unet_core.config import TileConfig, TrainConfig
from unet_core.engine import Engine, choose_device
from unet_core.errors import ConfigError
from unet_core.losses import cross_entropy, dice
from unet_core.metrics import confusion, mean, scores_of
from unet_core.networks import build, measured
from unet_core.picture import Picture
from unet_core.preprocessing import Preprocessing
from unet_core.samples import random_crop, read_labelled
from unet_core.store import Store
from unet_core.tiling import stack
from unet_core.windows import windows_for

log = logging.getLogger(__name__)

BEST = "best.safetensors"
HISTORY = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int32()),
        ("split", pa.string()),
        ("name", pa.string()),
        ("class", pa.string()),
        ("value", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave."""

    number: int
    loss: float
    iou: tuple[float | None, ...]
    """Micro IoU per class on the validation images; None where a class never occurs."""
    seconds: float

    @property
    def foreground_iou(self) -> float:
        """Mean IoU of the classes but the first; what "best" means."""
        return mean(self.iou[1:]) or 0.0


@dataclass
class Training:
    """A network on its way, and what was seen so far."""

    network: nn.Module
    header: Header
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float = -1.0
    step: int = 0


def fit(config: TrainConfig) -> Iterator[Epoch]:
    """Train; yields after each epoch. ``best.safetensors`` and the history lie in the output.

    Raises ConfigError for unusable data and for a loss that is no longer a number.
    """
    output = Store(config.output.uri, config.storage)
    if output.exists(BEST):
        raise ConfigError(f"output.uri: {output.uri()} holds a trained model; choose a new folder")
    torch.manual_seed(config.train.seed)
    network = build(config.model.spec)
    header = new_header(config, network)
    train, val = load_data(config, header)
    device = choose_device(config.model.device)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks the pair
    training = Training(network, header)
    optimiser = torch.optim.AdamW(
        network.parameters(), config.train.learning_rate, weight_decay=config.train.weight_decay
    )
    steps = config.train.epochs * _steps_per_epoch(config, len(train))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _warm_cosine(step, steps))
    for number in range(config.train.epochs):
        start = time.perf_counter()
        loss = _train_epoch(config, training, optimiser, schedule, train, number)
        iou = evaluate(training, val, config)
        epoch = Epoch(number, loss, iou, time.perf_counter() - start)
        _record(training, epoch, output, config)
        yield epoch
    output.publish("_SUCCESS", b"{}\n")


def new_header(config: TrainConfig, network: nn.Module) -> Header:
    """The header of the checkpoint that a config will make of a network."""
    model = config.model
    wanted = Preprocessing(
        color=model.color, normalisation=model.normalisation, low=model.low, high=model.high
    )
    names = tuple(model.classes)
    spec, tiling = measured(model.spec, network)
    if spec.classes not in {len(names), 1 if len(names) == 2 else len(names)}:
        raise ConfigError(
            f"model.classes names {len(names)}, but {model.factory} gives {spec.classes} logits"
        )
    crop, sides = config.train.crop, tiling.sides
    if crop + 2 * tiling.margin not in sides:
        raise ConfigError(f"train.crop: {crop} is not possible here; {sides.near(crop)}")
    return Header(spec, tiling, names, wanted, palette_of(len(names)))


def load_data(config: TrainConfig, header: Header) -> tuple[list[Picture], list[Picture]]:
    """Training and validation images; without ``data.val`` a share by a hash of the image id."""
    data, wanted = config.data, header.preprocessing
    train = list(read_labelled(data.train, wanted, header.classes, config.storage))
    if data.val is not None:
        val = list(read_labelled(data.val, wanted, header.classes, config.storage))
    else:
        val = [image for image in train if _share(image.sample.image_id) < data.val_fraction]
        train = [image for image in train if _share(image.sample.image_id) >= data.val_fraction]
    if not train or not val:
        raise ConfigError(
            f"data: {len(train)} images for training and {len(val)} for validation; both need one"
        )
    return train, val


def _share(image_id: str) -> float:
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:6], "big") / 2**48


def _steps_per_epoch(config: TrainConfig, images: int) -> int:
    return math.ceil(images * config.train.crops_per_image / config.train.batch)


def _warm_cosine(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then half a cosine down to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _train_epoch(
    config: TrainConfig,
    training: Training,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    images: list[Picture],
    number: int,
) -> float:
    """One pass; returns the mean loss."""
    options, ignore = config.train, config.data.train.ignore_index
    random = np.random.default_rng([options.seed, number])
    order = random.permutation(np.repeat(np.arange(len(images)), options.crops_per_image))
    training.network.train()
    losses = []
    for at in range(0, len(order), options.batch):
        chosen = [images[i] for i in order[at : at + options.batch]]
        margin = training.header.tiling.margin
        crops = [random_crop(image, options.crop, margin, random) for image in chosen]
        x_NCHW, labels_NHW = (torch.stack(column) for column in zip(*crops, strict=True))
        device = next(training.network.parameters()).device
        logits = training.network(x_NCHW.to(device, memory_format=torch.channels_last))
        labels = labels_NHW.to(device)
        loss = cross_entropy(logits, labels, ignore) + dice(logits, labels, ignore)
        if not math.isfinite(loss.item()):
            names = ", ".join(image.sample.image_id for image in chosen)
            raise ConfigError(f"the loss is {loss.item()} at step {training.step}; images: {names}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        nn.utils.clip_grad_norm_(training.network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        training.step += 1
        losses.append(loss.item())
    return math.fsum(losses) / len(losses)


def evaluate(
    training: Training, images: list[Picture], config: TrainConfig
) -> tuple[float | None, ...]:
    """Micro IoU per class, segmented as ``predict`` does it."""
    header = training.header
    device = next(training.network.parameters()).device
    windows = windows_for(TileConfig(), header.tiling)
    engine = Engine(copy.deepcopy(training.network), header, device, blends=windows.blends)
    look = Look(header.network.classes)
    ignore = (config.data.val or config.data.train).ignore_index
    matrix = np.zeros((header.classes, header.classes), dtype=np.int64)
    for index, picture in enumerate(images):
        canvas = Canvas(index, picture, windows, look)
        assert picture.truth is not None
        for tile in canvas.tiles:
            for area in canvas.paste(tile, engine.run(stack([(canvas, tile)]))[0]):
                truth_HW = picture.truth.read(*area.box)[0]
                matrix += confusion(truth_HW, area.mask_HW, header.classes, ignore)
    return tuple(score.iou for score in scores_of(matrix))


def _record(training: Training, epoch: Epoch, output: Store, config: TrainConfig) -> None:
    """Publish the history so far, and the network if it is the best yet."""
    names = training.header.class_names
    row = {"step": training.step, "epoch": epoch.number}
    training.history.append(
        {**row, "split": "train", "name": "loss", "class": None, "value": epoch.loss}
    )
    for name, value in zip(names, epoch.iou, strict=True):
        training.history.append(
            {**row, "split": "val", "name": "iou", "class": name, "value": value}
        )
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(training.history, schema=HISTORY), sink)
    output.publish("history/00000.parquet", sink.getvalue())
    if epoch.foreground_iou > training.best:
        training.best = epoch.foreground_iou
        about = {
            "epoch": epoch.number,
            "val_iou": dict(zip(names, epoch.iou, strict=True)),
            "config": config.model_dump(mode="json"),
        }
        header = replace(training.header, training=about)
        output.publish(BEST, checkpoint.serialise(training.network, header))
