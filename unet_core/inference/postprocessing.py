"""How logits become masks in a run, and what is kept beside them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Postprocessing:
    """Settled once for a run; the device and what is made of blended tiles go by the same."""

    logits: int
    """1 means one sigmoid for two classes."""
    threshold: float = 0.5
    """Of one logit: foreground where sigmoid(logit) is above this."""
    tta: str = "none"
    probabilities: str = "none"
    """As what they are kept beside the masks."""
