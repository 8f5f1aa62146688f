"""What is minimised: a weighted sum of losses on logits NKHW and class ids NHW.

Losses over pixels are divided by the pixels that count, losses over crops by the crops, both of
the whole global batch; so a batch may be computed in any number of pieces on any number of ranks,
and the pieces add up.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unet_core.config.train import LossConfig
from unet_core.training.augment import Examples

SMOOTH = 0.5
"""Pixels added to overlap and union of a crop, so that an absent class gives a number."""


def cross_entropy(logits_NKHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """−log p of the true class of each pixel, NHW; binary if there is one logit."""
    if logits_NKHW.shape[1] == 1:
        return bce(logits_NKHW, labels_NHW)
    return F.cross_entropy(logits_NKHW, labels_NHW, reduction="none")


def bce(logits_NKHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Mean over the logits of the binary cross-entropy of each class against all others, NHW."""
    target_NKHW = one_hot(logits_NKHW, labels_NHW)
    each = F.binary_cross_entropy_with_logits(logits_NKHW, target_NKHW, reduction="none")
    return each.mean(dim=1)


def focal(logits_NKHW: Tensor, labels_NHW: Tensor, gamma: float) -> Tensor:
    """(1 − p)^γ · (−log p) of the true class, NHW (Lin et al. 2017, arXiv 1708.02002, eq. 4)."""
    entropy_NHW = cross_entropy(logits_NKHW, labels_NHW)
    wrong_NHW = -torch.expm1(-entropy_NHW)  # 1 − p
    positive_NHW = wrong_NHW.clamp(min=torch.finfo(wrong_NHW.dtype).tiny)  # 0^(γ − 1) is infinite
    return positive_NHW**gamma * entropy_NHW


def tversky(
    logits_NKHW: Tensor, labels_NHW: Tensor, counted_NHW: Tensor, alpha: float, beta: float
) -> Tensor:
    """1 − mean over the foreground classes of TP / (TP + α FP + β FN) with soft counts, for each
    crop, N (Salehi et al. 2017, arXiv 1706.05721, eq. 3). α = β = ½ is Dice, α = β = 1 is IoU.
    """
    is_one = logits_NKHW.shape[1] == 1
    p_NKHW = torch.sigmoid(logits_NKHW) if is_one else torch.softmax(logits_NKHW, dim=1)[:, 1:]
    target_NKHW = one_hot(logits_NKHW, labels_NHW)[:, 0 if is_one else 1 :]
    p_NKHW, target_NKHW = p_NKHW * counted_NHW[:, None], target_NKHW * counted_NHW[:, None]
    overlap_NK = (p_NKHW * target_NKHW).sum(dim=(2, 3))
    fp_NK = p_NKHW.sum(dim=(2, 3)) - overlap_NK
    fn_NK = target_NKHW.sum(dim=(2, 3)) - overlap_NK
    index_NK = (overlap_NK + SMOOTH) / (overlap_NK + alpha * fp_NK + beta * fn_NK + SMOOTH)
    return 1 - index_NK.mean(dim=1)


def one_hot(logits_NKHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """1 where a logit's class is the true one, of the logits' shape; one logit is class 1."""
    logits = logits_NKHW.shape[1]
    classes = torch.arange(logits, device=labels_NHW.device) + (logits == 1)
    return (labels_NHW[:, None] == classes[None, :, None, None]).to(logits_NKHW.dtype)


class BatchCounts(NamedTuple):
    """What a batch holds, or a piece of it."""

    pixels: float
    """Those that count."""
    crops: float
    """Those with pixels that count."""
    images: float


@dataclass(frozen=True)
class Loss:
    """The configured sum."""

    config: LossConfig
    ignore_index: int
    class_weights: list[float] | None
    """Of the pixels of each class, if they differ."""

    def counts(self, examples: Examples) -> BatchCounts:
        """Of this piece."""
        counted_NHW = examples.labels_NHW != self.ignore_index
        crops = float(counted_NHW.flatten(1).any(dim=1).sum())
        return BatchCounts(float(counted_NHW.sum()), crops, float(len(counted_NHW)))

    def part(self, logits_NKHW: Tensor, examples: Examples, batch: BatchCounts) -> Tensor:
        """This piece's part of the loss of a batch over all ranks."""
        counted_NHW = examples.labels_NHW != self.ignore_index
        labels_NHW = examples.labels_NHW.masked_fill(~counted_NHW, 0)
        weights_NHW = self._weights(labels_NHW, counted_NHW, examples.boundary_NHW)
        logits_NKHW = logits_NKHW.float()
        total, config = logits_NKHW.new_zeros(()), self.config
        for weight, pixel_loss in (
            (config.cross_entropy, cross_entropy),
            (config.bce, bce),
            (config.focal, partial(focal, gamma=config.focal_gamma)),
        ):
            if weight:
                each_NHW = pixel_loss(logits_NKHW, labels_NHW)
                total = total + weight * (each_NHW * weights_NHW).sum() / max(batch.pixels, 1)
        has_pixels_N = counted_NHW.flatten(1).any(dim=1)
        for weight, alpha, beta in (
            (config.dice, 0.5, 0.5),
            (config.jaccard, 1.0, 1.0),
            (config.tversky, config.tversky_alpha, config.tversky_beta),
        ):
            if weight:
                each_N = tversky(logits_NKHW, labels_NHW, counted_NHW, alpha, beta)
                total = total + weight * (each_N * has_pixels_N).sum() / max(batch.crops, 1)
        return total

    def _weights(
        self, labels_NHW: Tensor, counted_NHW: Tensor, boundary_NHW: Tensor | None
    ) -> Tensor:
        """w(x) = w_c(x) + w0 · boundary term (Ronneberger et al. 2015, eq. 2); 0 where ignored."""
        weights_NHW = counted_NHW.float()
        if self.class_weights is not None:
            of_class = torch.tensor(self.class_weights, device=labels_NHW.device)
            weights_NHW = weights_NHW * of_class[labels_NHW]
        if boundary_NHW is not None:
            weights_NHW = weights_NHW + self.config.boundary * boundary_NHW * counted_NHW
        return weights_NHW


def class_weights(config: LossConfig, classes: int, pixels: list[int]) -> list[float] | None:
    """Of the pixels of each class, if they differ; ``pixels``: how many of each the images have.

    Balanced ones are inverse to that, 1 in the mean over pixels; 0 for a class that never occurs.
    """
    if config.class_weights != "balanced":
        return None if config.class_weights == "none" else config.class_weights
    counts = [*pixels, *[0] * (classes - len(pixels))]
    there = sum(n > 0 for n in counts)
    return [sum(counts) / (there * n) if n else 0.0 for n in counts]
