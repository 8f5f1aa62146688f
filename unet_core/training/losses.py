"""The loss: a weighted sum of terms on logits NKHW and class ids NHW.

Terms over pixels are divided by the number of valid pixels (those without ``ignore_index``), terms
over crops by the number of crops with valid pixels, both of the whole global batch. So the losses
of its micro-batches add up, however a batch is split into micro-batches and ranks.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from unet_core.config.train import LossConfig
from unet_core.training.augment import MicroBatch

SMOOTH = 0.5
"""Pixels added to numerator and denominator, so that the index of an absent class is defined."""


def cross_entropy(logits_NKHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Compute −log p of the true class of each pixel, NHW; binary if there is one logit."""
    if logits_NKHW.shape[1] == 1:
        return bce(logits_NKHW, labels_NHW)
    return F.cross_entropy(logits_NKHW, labels_NHW, reduction="none")


def bce(logits_NKHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Compute the binary cross-entropy of each class against the others, mean over classes, NHW."""
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
    logits_NKHW: Tensor, labels_NHW: Tensor, is_valid_NHW: Tensor, alpha: float, beta: float,
    first_foreground: int = 1,
) -> Tensor:  # fmt: skip
    """Compute 1 − mean over foreground classes of TP / (TP + α FP + β FN) with soft counts for each
    crop, N (Salehi et al. 2017, arXiv 1706.05721, eq. 3). α = β = ½ is Dice, α = β = 1 is IoU.

    The foreground are the classes from ``first_foreground`` on.
    """
    if logits_NKHW.shape[1] == 1:  # the softmax of 0 and a logit is its sigmoid
        p_NKHW = torch.sigmoid(logits_NKHW)
        p_NKHW = torch.cat([1 - p_NKHW, p_NKHW], dim=1)
    else:
        p_NKHW = torch.softmax(logits_NKHW, dim=1)
    target_NKHW = one_hot(p_NKHW, labels_NHW)[:, first_foreground:]
    p_NKHW = p_NKHW[:, first_foreground:]
    p_NKHW, target_NKHW = p_NKHW * is_valid_NHW[:, None], target_NKHW * is_valid_NHW[:, None]
    overlap_NK = (p_NKHW * target_NKHW).sum(dim=(2, 3))
    fp_NK = p_NKHW.sum(dim=(2, 3)) - overlap_NK
    fn_NK = target_NKHW.sum(dim=(2, 3)) - overlap_NK
    index_NK = (overlap_NK + SMOOTH) / (overlap_NK + alpha * fp_NK + beta * fn_NK + SMOOTH)
    return 1 - index_NK.mean(dim=1)


def one_hot(logits_NKHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Encode class ids as 0 or 1 per logit, NKHW; a single logit stands for class 1."""
    logits = logits_NKHW.shape[1]
    classes = torch.arange(logits, device=labels_NHW.device) + (logits == 1)
    return (labels_NHW[:, None] == classes[None, :, None, None]).to(logits_NKHW.dtype)


@dataclass(frozen=True)
class BatchCounts:
    """Sizes of a batch, or of a micro-batch of it; floats, to be summed over ranks."""

    valid_pixels: float
    """Pixels of all labels but ``ignore_index``."""
    valid_crops: float
    """Crops with at least one valid pixel."""
    crops: float
    """All crops."""


@dataclass(frozen=True)
class Loss:
    """The weighted sum of the terms that the config asks for."""

    config: LossConfig
    ignore_index: int
    class_weights: list[float] | None
    """Weight of the pixels of each class; None: 1 for all."""
    first_foreground: int = 1
    """Lowest id of a foreground class."""

    def counts(self, micro_batch: MicroBatch) -> BatchCounts:
        """Count the valid pixels, the crops with valid pixels, and all crops."""
        is_valid_NHW = micro_batch.labels_NHW != self.ignore_index
        return BatchCounts(
            valid_pixels=float(is_valid_NHW.sum()),
            valid_crops=float(is_valid_NHW.flatten(1).any(dim=1).sum()),
            crops=float(len(is_valid_NHW)),
        )

    def share(self, logits_NKHW: Tensor, micro_batch: MicroBatch, batch: BatchCounts) -> Tensor:
        """Compute a micro-batch's share of the loss, a scalar; ``batch``: counts over all ranks."""
        is_valid_NHW = micro_batch.labels_NHW != self.ignore_index
        labels_NHW = micro_batch.labels_NHW.masked_fill(~is_valid_NHW, 0)
        weights_NHW = self._weights(labels_NHW, is_valid_NHW, micro_batch.boundary_NHW)
        logits_NKHW = logits_NKHW.float()
        total, config = logits_NKHW.new_zeros(()), self.config
        for weight, pixel_loss in (
            (config.cross_entropy, cross_entropy),
            (config.bce, bce),
            (config.focal, partial(focal, gamma=config.focal_gamma)),
        ):
            if weight:
                each_NHW = pixel_loss(logits_NKHW, labels_NHW)
                total = total + weight * (each_NHW * weights_NHW).sum() / max(batch.valid_pixels, 1)
        has_valid_N = is_valid_NHW.flatten(1).any(dim=1)
        for weight, alpha, beta in (
            (config.dice, 0.5, 0.5),
            (config.jaccard, 1.0, 1.0),
            (config.tversky, config.tversky_alpha, config.tversky_beta),
        ):
            if weight:
                each_N = tversky(
                    logits_NKHW, labels_NHW, is_valid_NHW, alpha, beta, self.first_foreground
                )
                total = total + weight * (each_N * has_valid_N).sum() / max(batch.valid_crops, 1)
        return total

    def _weights(
        self, labels_NHW: Tensor, is_valid_NHW: Tensor, boundary_NHW: Tensor | None
    ) -> Tensor:
        """Compute w(x) = w_c(x) + w0 · boundary term (Ronneberger et al. 2015, eq. 2), NHW; 0 where
        ignored.
        """
        weights_NHW = is_valid_NHW.float()
        if self.class_weights is not None:
            of_class = torch.tensor(self.class_weights, device=labels_NHW.device)
            weights_NHW = weights_NHW * of_class[labels_NHW]
        if boundary_NHW is not None:
            weights_NHW = weights_NHW + self.config.boundary * boundary_NHW * is_valid_NHW
        return weights_NHW


def class_weights(config: LossConfig, classes: int, pixels: list[int]) -> list[float] | None:
    """Return the weight of the pixels of each class, or None if all are 1.

    ``balanced`` weights are inverse to ``pixels``, the pixels of each class in the training images;
    their mean over pixels is 1. The weight of a class that never occurs is 0.
    """
    if config.class_weights != "balanced":
        return None if config.class_weights == "none" else config.class_weights
    counts = [*pixels, *[0] * (classes - len(pixels))]
    present = sum(n > 0 for n in counts)
    return [sum(counts) / (present * n) if n else 0.0 for n in counts]
