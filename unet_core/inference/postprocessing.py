"""Postprocessing: how probabilities become class ids, confidences and what is kept beside them.

The same rules for tensors on a device and for the arrays of blended windows, each in the precision
that it comes in.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from unet_core.arrays import Array
from unet_core.runs.schema import CONFIDENCE_UNIT

ValuesT = TypeVar("ValuesT", Tensor, Array)


@dataclass(frozen=True)
class Postprocessing:
    """Options of postprocessing, resolved once for a run."""

    logits: int
    """1 means one sigmoid for two classes."""
    threshold: float = 0.5
    """With one logit, pixels are foreground where sigmoid(logit) is above this."""
    tta: str = "none"
    probabilities: str = "none"
    """Type of the probabilities that are kept beside the masks: ``uint8``, ``float16`` or none."""

    def classify(self, p_K: ValuesT) -> tuple[ValuesT, ValuesT]:
        """Class ids, and the probability of each chosen class; the first axis of ``p_K`` is K."""
        if self.logits == 1:
            is_foreground = p_K[0] > self.threshold
            where = torch.where if isinstance(p_K, Tensor) else np.where
            return is_foreground, where(is_foreground, p_K[0], 1 - p_K[0])
        if isinstance(p_K, Tensor):
            chosen, ids = p_K.max(dim=0)
            return ids, chosen
        return p_K.argmax(axis=0), p_K.max(axis=0)

    def quantize(self, p_K: ValuesT) -> ValuesT:
        """Probabilities in the units of the type that is kept, still to be cast to it."""
        return (p_K * 255).round() if self.probabilities == "uint8" else p_K


def confidence_units(chosen: ValuesT) -> ValuesT:
    """Probabilities in integer multiples of 1/65535, whose sums are exact."""
    return (chosen * CONFIDENCE_UNIT).round()
