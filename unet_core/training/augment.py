"""Augmentation of crops in batches on the device: one resampling grid for images, labels and
boundary terms.

Shapes: N crops, C channels, H×W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unet_core.inference.engine import memory_format, to_tensor
from unet_core.training.crops import Crop, CropShape


@dataclass(frozen=True)
class MicroBatch:
    """The crops of one forward pass: those of a rank in a step, or with gradient accumulation a
    part of them.
    """

    image_ids: list[str]
    images_NCHW: Tensor
    """Normalized and augmented, float32; larger than the labels by the network's margin."""
    labels_NHW: Tensor
    """Class ids and ``ignore_index``, int64."""
    boundary_NHW: Tensor | None
    """Boundary terms (see ``boundary.py``), float32; None if the loss does not use them."""


def augment(crops: Sequence[Crop], shape: CropShape, device: torch.device) -> MicroBatch:
    """Apply the random choices of some crops: images and boundary terms are resampled bilinearly,
    labels by nearest neighbour.

    Images are mirrored at their edges. Without rotation, scale and deformation pixels are copied.
    """
    grid_NHW2 = _grid(crops, shape, device)
    pixels = _stacked([crop.pixels_CHW for crop in crops], device).float()
    offset = _stacked([crop.offset for crop in crops], device)[..., None, None]
    scale = _stacked([crop.scale for crop in crops], device)[..., None, None]
    images_NCHW = _sample(pixels.sub_(offset).mul_(scale), grid_NHW2, "bilinear")
    inner = slice(shape.margin, shape.margin + shape.side)
    inner_NHW2 = grid_NHW2[:, inner, inner]
    labels_N1HW = _stacked([crop.labels_HW for crop in crops], device).float()[:, None]
    boundary_NHW = None
    if terms := [crop.boundary_HW for crop in crops if crop.boundary_HW is not None]:
        boundary_N1HW = _stacked(terms, device).float()[:, None]
        boundary_NHW = _sample(boundary_N1HW, inner_NHW2, "bilinear")[:, 0]
    return MicroBatch(
        image_ids=[crop.image_id for crop in crops],
        images_NCHW=_with_gray_variation(images_NCHW, crops),
        labels_NHW=_sample(labels_N1HW, inner_NHW2, "nearest")[:, 0].long(),
        boundary_NHW=boundary_NHW,
    )


def empty_micro_batch(shape: CropShape, channels: int, device: torch.device) -> MicroBatch:
    """Return a micro-batch of size 0, for a rank that has no image left in a step."""
    return MicroBatch(
        image_ids=[],
        images_NCHW=torch.zeros(0, channels, shape.input_side, shape.input_side, device=device),
        labels_NHW=torch.zeros(0, shape.side, shape.side, dtype=torch.int64, device=device),
        boundary_NHW=None,
    )


def _stacked(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    # asynchronous copies to other devices may read memory that was freed in the meantime
    return to_tensor(np.stack(arrays), device).to(device, non_blocking=device.type == "cuda")


def _grid(crops: Sequence[Crop], shape: CropShape, device: torch.device) -> Tensor:
    """Compute sampling coordinates for ``F.grid_sample``: (x, y) in the window, −1 to 1, NHW2."""
    side = shape.input_side
    from_centre_H = torch.arange(side, device=device, dtype=torch.float32) - (side - 1) / 2
    matrix_N22 = _stacked([crop.matrix for crop in crops], device)
    centre_N2 = torch.tensor([crop.centre for crop in crops], device=device)
    size_N2 = torch.tensor([crop.size for crop in crops], device=device)
    row_N2H = matrix_N22[..., :1] * from_centre_H + centre_N2[..., None]
    column_N2W = matrix_N22[..., 1:] * from_centre_H
    points_N2HW = row_N2H[..., None] + column_N2W[..., None, :]
    if any(crop.elastic.any() for crop in crops):
        coarse_N233 = np.stack([np.tensordot(crop.matrix, crop.elastic, 1) for crop in crops])
        weights_H3 = _bicubic_weights(side).to(device)
        points_N2HW += weights_H3 @ torch.from_numpy(coarse_N233).to(device) @ weights_H3.T
    axes = []
    for axis in (1, 0):
        folds_once = min(crop.size[axis] for crop in crops) - 1 >= shape.window / 2
        inside_NHW = _mirrored(
            points_N2HW[:, axis], last=size_N2[:, axis, None, None] - 1, folds_once=folds_once
        )
        axes.append(inside_NHW * (2 / (shape.window - 1)) - 1)
    return torch.stack(axes, dim=-1)


def _bicubic_weights(side: int) -> Tensor:
    """Return the bicubic weights that map 3 values to ``side`` pixels, shape (side, 3); applied
    along both axes this equals interpolating a 3×3 grid, and is many times faster.
    """
    one_of_three = torch.eye(3)[None, None]
    return F.interpolate(one_of_three, (side, 3), mode="bicubic", align_corners=True)[0, 0]


def _mirrored(at: Tensor, last: Tensor, folds_once: bool) -> Tensor:
    """Reflect coordinates into [0, last] without repeating the ends.

    ``folds_once`` promises that none lies beyond [-last, 2·last], which is much faster.
    """
    if folds_once:
        return last - (last - at.abs()).abs()
    period = (2 * last).clamp(min=1)
    folded = at.remainder(period)
    return torch.where(last > 0, torch.minimum(folded, period - folded), 0)


def _sample(values_NCHW: Tensor, grid_NHW2: Tensor, mode: str) -> Tensor:
    # no point lies outside; "border" is for what rounding makes of the edge, and not in every mps
    padding = "zeros" if values_NCHW.device.type == "mps" else "border"
    return F.grid_sample(
        values_NCHW, grid_NHW2, mode=mode, padding_mode=padding, align_corners=True
    )


def _with_gray_variation(images_NCHW: Tensor, crops: Sequence[Crop]) -> Tensor:
    """Apply each crop's gamma, contrast, brightness and noise."""
    device = images_NCHW.device
    gamma = torch.tensor([crop.gamma for crop in crops], device=device)[:, None, None, None]
    brightness = torch.tensor([crop.brightness for crop in crops], device=device)
    gain = _stacked([crop.gain for crop in crops], device)
    images_NCHW = (
        images_NCHW.sign() * images_NCHW.abs() ** gamma * gain[..., None, None]
        + brightness[:, None, None, None]
    )
    for index, crop in enumerate(crops):
        if crop.noise:
            random = torch.Generator(device).manual_seed(crop.noise_seed)
            images_NCHW[index] += crop.noise * torch.randn(
                images_NCHW.shape[1:], generator=random, device=device
            )
    return images_NCHW.contiguous(memory_format=memory_format(device))
