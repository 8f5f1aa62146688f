"""Training losses on logits NKHW and labels NHW; pixels of ``ignore_index`` weigh nothing."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits_NKHW: Tensor, labels_NHW: Tensor, ignore_index: int) -> Tensor:
    """Mean pixel cross-entropy; binary if there is one logit. 0 if every pixel is ignored."""
    counted_NHW = labels_NHW != ignore_index
    if logits_NKHW.shape[1] == 1:
        target_NHW = (labels_NHW == 1).to(logits_NKHW.dtype)
        each_NHW = F.binary_cross_entropy_with_logits(
            logits_NKHW[:, 0], target_NHW, reduction="none"
        )
    else:
        target_NHW = labels_NHW.masked_fill(~counted_NHW, 0)
        each_NHW = F.cross_entropy(logits_NKHW, target_NHW, reduction="none")
    return (each_NHW * counted_NHW).sum() / counted_NHW.sum().clamp(min=1)


def dice(logits_NKHW: Tensor, labels_NHW: Tensor, ignore_index: int) -> Tensor:
    """1 − mean soft Dice of the foreground classes over the whole batch (Milletari et al. 2016,
    arXiv 1606.04797, eq. 2, with the squares left out).
    """
    counted_NHW = labels_NHW != ignore_index
    if logits_NKHW.shape[1] == 1:
        p_NKHW = torch.sigmoid(logits_NKHW)
        target_NKHW = (labels_NHW == 1)[:, None]
    else:
        p_NKHW = torch.softmax(logits_NKHW, dim=1)[:, 1:]
        classes = torch.arange(1, logits_NKHW.shape[1], device=labels_NHW.device)
        target_NKHW = labels_NHW[:, None] == classes[None, :, None, None]
    p_NKHW = p_NKHW * counted_NHW[:, None]
    target_NKHW = (target_NKHW & counted_NHW[:, None]).to(p_NKHW.dtype)
    overlap_K = (p_NKHW * target_NKHW).sum(dim=(0, 2, 3))
    total_K = p_NKHW.sum(dim=(0, 2, 3)) + target_NKHW.sum(dim=(0, 2, 3))
    return 1 - ((2 * overlap_K + 1) / (total_K + 1)).mean()
