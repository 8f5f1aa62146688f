"""Images with truth for training: decoded as prediction decodes them, cropped and augmented."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unet_core.config import InputConfig, StorageConfig
from unet_core.errors import ConfigError
from unet_core.inputs import list_shards, open_source, read_shard
from unet_core.picture import Decoder, Picture, Pixels, Rejected
from unet_core.preprocessing import Preprocessing

Random = np.random.Generator


def read_labelled(
    config: InputConfig, wanted: Preprocessing, classes: int, storage: StorageConfig
) -> Iterator[Picture]:
    """All images of an input that have truth, in shard order.

    Raises ConfigError that names the first image which cannot be used: training on what is left
    would hide it.
    """
    source, decoder = open_source(config, storage), Decoder(wanted, classes, config)
    for shard in list_shards(source):
        for sample in read_shard(source, shard):
            for image in decoder.decode(sample):
                failure = image.failure if isinstance(image, Rejected) else image.truth_failure
                if failure is not None:
                    raise ConfigError(f"{config.uri}: {sample.image_id}: {failure}")
                if isinstance(image, Picture) and image.truth is not None:
                    yield _in_memory(image, config)


def _in_memory(image: Picture, config: InputConfig) -> Picture:
    """The image without windows; raises ConfigError for one that is too large to be held."""
    assert image.truth is not None
    if image.pixels.height * image.pixels.width > config.max_pixels:
        raise ConfigError(
            f"{config.uri}: {image.sample.image_id} has {image.pixels.height} × "
            f"{image.pixels.width} pixels, too large to train on; cut it, or raise max_pixels"
        )
    whole, truth = Pixels.of(image.pixels.whole()), Pixels.of(image.truth.whole())
    return replace(image, pixels=whole, truth=truth)


def random_crop(image: Picture, crop: int, margin: int, random: Random) -> tuple[Tensor, Tensor]:
    """A square crop CHW with its labels HW: random place, scale (¾ to 4⁄3), flip and quarter turn.

    The labels have ``crop`` pixels a side, the pixels a ``margin`` of context around them. Where
    the image is too small it is mirrored. Labels are only ever taken by nearest.
    """
    assert image.truth is not None
    side = crop + 2 * margin
    taken = round(side * float(np.exp(random.uniform(np.log(0.75), np.log(4 / 3)))))
    pixels_CHW, labels_HW = image.pixels.whole(), image.truth.whole()[0]
    if context := -(-margin * taken // side):
        around = (context, context)
        pixels_CHW = np.pad(pixels_CHW, ((0, 0), around, around), mode="reflect")
        labels_HW = np.pad(labels_HW, (around, around), mode="reflect")
    below, right = (max(0, taken - length) for length in labels_HW.shape)
    if below or right:
        pixels_CHW = np.pad(pixels_CHW, ((0, 0), (0, below), (0, right)), mode="reflect")
        labels_HW = np.pad(labels_HW, ((0, below), (0, right)), mode="reflect")
    y, x = (int(random.integers(length - taken + 1)) for length in labels_HW.shape)
    cut_CHW = pixels_CHW[:, y : y + taken, x : x + taken].astype(np.float32)
    cut_CHW = (cut_CHW - image.offset[:, None, None]) * image.scale[:, None, None]
    crop_CHW = torch.from_numpy(cut_CHW)
    cut_HW = torch.from_numpy(labels_HW[y : y + taken, x : x + taken].astype(np.int64))
    size = (side, side)
    crop_CHW = F.interpolate(crop_CHW[None], size, mode="bilinear", align_corners=False)[0]
    cut_HW = F.interpolate(cut_HW[None, None].double(), size, mode="nearest-exact")[0, 0].long()
    turns = int(random.integers(4))
    crop_CHW, cut_HW = torch.rot90(crop_CHW, turns, (1, 2)), torch.rot90(cut_HW, turns, (0, 1))
    if random.integers(2):
        crop_CHW, cut_HW = crop_CHW.flip(2), cut_HW.flip(1)
    return vary_gray(crop_CHW, random), cut_HW[margin : side - margin, margin : side - margin]


def vary_gray(crop_CHW: Tensor, random: Random) -> Tensor:
    """Random gain, offset and gamma, and in half of the crops Gaussian noise."""
    gain, offset = random.uniform(0.7, 1.3), random.uniform(-0.1, 0.1)
    gamma = float(np.exp(random.uniform(np.log(0.7), np.log(1.4))))
    varied = crop_CHW.sign() * crop_CHW.abs() ** gamma * gain + offset
    if random.integers(2):
        noise = random.standard_normal(varied.shape, dtype=np.float32)
        varied = varied + random.uniform(0, 0.08) * torch.from_numpy(noise)
    return varied.float()
