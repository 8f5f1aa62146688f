"""The obvious twin of tiling, batching and stitching: one image, one pass, no tiles."""

import numpy as np
import torch
from torch import nn

from tests.support.data import reading
from tests.support.rasters import measured, pixels_of
from unet_core.images.preprocessing import to_color
from unet_core.images.raster import ArrayRaster
from unet_core.networks.header import Header
from unet_core.tiling.geometry import Tiling


def logits_of(network: nn.Module, header: Header, data: bytes) -> np.ndarray:
    """Logits KHW of an encoded image."""
    pixels_HWC = pixels_of(data, reading(2**30))[0]
    pixels_CHW = to_color(pixels_HWC.transpose(2, 0, 1), header.preprocessing.color)
    offset, scale = measured(ArrayRaster(pixels_CHW), header.preprocessing)
    x_CHW = (pixels_CHW.astype(np.float32) - offset[:, None, None]) * scale[:, None, None]
    return whole_pass(network, header.tiling, x_CHW)


def whole_pass(network: nn.Module, tiling: Tiling, x_CHW: np.ndarray) -> np.ndarray:
    """Logits KHW of the image with mirrored context, filled up to a side that the network takes."""
    margin, (height, width) = tiling.margin, x_CHW.shape[1:]
    pads = [(0, 0)]
    for length in (height, width):
        total = tiling.sides.at_least(length + 2 * margin)
        pads.append((margin, total - margin - length))
    padded_CHW = np.pad(x_CHW, pads, mode="reflect")
    with torch.inference_mode():
        return network(torch.from_numpy(padded_CHW)[None])[0, :, :height, :width].numpy()
