"""Labelled images and configs for tests of training."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from unet_core.config.loading import build
from unet_core.config.train import TrainConfig
from unet_core.images.decoder import DecodedImage
from unet_core.images.raster import ArrayRaster
from unet_core.images.sample import Sample
from unet_core.training import scan
from unet_core.training.dataset import ImageCache, LabelledImage, open_splits
from unet_core.training.learner import new_network
from unet_core.training.ranks import Ranks


def config_of(folder, output, *overrides):
    """A small network on 12 images of several sizes."""
    table = {
        "data": {"train": {"uri": str(folder / "images"), "masks": str(folder / "masks")},
                 "val_fraction": 0.3},
        "model": {"width": 4, "depth": 2, "classes": ["background", "nucleus"]},
        "train": {"epochs": 6, "crop": 64, "batch": 3, "crops_per_image": 3, "learning_rate": 1e-2},
        "output": {"uri": str(output), "report": False},
        "workers": {"count": "inline"},
    }  # fmt: skip
    return build(TrainConfig, table, list(overrides))


def opened(config, memory=2**30):
    """The splits of a config, scanned."""
    _, header = new_network(config)
    splits = open_splits(config, header, ImageCache(memory))
    with ThreadPoolExecutor(2) as pool:
        found = scan.scan_dataset(splits, Ranks(), pool, lambda: False)
    return splits, found


def labelled(pixels_HW, labels_HW, boundary_HW=None, image_id="a"):
    """One image HW or CHW in memory that the network receives as it is."""
    sample = Sample(image_id, image_id, image_id, bytes)
    pixels_CHW = pixels_HW if pixels_HW.ndim == 3 else pixels_HW[None]
    one, none = (np.full(len(pixels_CHW), value, np.float32) for value in (1, 0))
    decoded = DecodedImage(sample, ArrayRaster(pixels_CHW), none, one)
    return LabelledImage(decoded, labels_HW, boundary_HW)
