"""The obvious twin of tiling, batching and stitching: one image, one pass, no tiles."""

import numpy as np
import torch

from unet_core.checkpoint import Header
from unet_core.codec import decode_image
from unet_core.preprocessing import offset_and_scale, to_color
from unet_core.unet import UNet


def logits_of(network: UNet, header: Header, data: bytes) -> np.ndarray:
    """Logits KHW of an encoded image."""
    pixels_CHW = to_color(decode_image(data, 2**30), header.preprocessing.color)
    offset, scale = offset_and_scale(pixels_CHW, header.preprocessing)
    x_CHW = (pixels_CHW.astype(np.float32) - offset[:, None, None]) * scale[:, None, None]
    height, width = x_CHW.shape[1:]
    stride = header.spec.stride
    pads = ((0, 0), (0, -height % stride), (0, -width % stride))
    padded_CHW = np.pad(x_CHW, pads, mode="reflect")
    with torch.inference_mode():
        return network(torch.from_numpy(padded_CHW)[None])[0, :, :height, :width].numpy()
