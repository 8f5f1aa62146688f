"""Keys of normalization, which configs and checkpoints share."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from unet_core.config.presets import channels_of
from unet_core.config.sections import Section

PerChannel = float | Annotated[list[float], Field(min_length=1)]
"""A number, or one for each channel of the network."""
SPANS = {"percentile": (0, 1, 99.8, 100), "range": (-3.4e38, 0, 3.4e38, 3.4e38)}
"""Bounds by ``normalization``: the least ``low``; ``low`` and ``high`` where they are not given (of
``range``, ``high`` is at most that, the largest pixel value); the largest ``high``.
"""
BELONGS = {"zscore": [], "standard": ["mean", "std"]}
"""Values that go with a ``normalization``; with those of ``SPANS``, ``low`` and ``high``."""


class NormalizationSection(Section):
    """A section that says how pixels are normalized: ``(pixels - offset) / span`` per channel."""

    color: Any
    normalization: Literal["percentile", "range", "zscore", "standard"]
    """Limits of each image and channel: percentiles (``percentile``), or mean and standard
    deviation (``zscore``). Fixed: pixel values (``range``), or mean and deviation (``standard``)."""
    low: PerChannel | None = None
    """Value that becomes 0: a percentile (1), or for ``range`` a pixel value (0)."""
    high: PerChannel | None = None
    """Value that becomes 1: a percentile (99.8), or a pixel value (the type's largest; 1 for
    floats)."""
    mean: PerChannel | None = None
    """``standard``: the value that becomes 0, in shares of the type's largest, like ImageNet's."""
    std: PerChannel | None = None
    """``standard``: the value that becomes 1 if added to the mean, in the same shares."""

    @model_validator(mode="after")
    def _values_fit(self) -> "NormalizationSection":
        kind, names = self.normalization, ("low", "high", "mean", "std")
        given = {n: value for n in names if (value := getattr(self, n)) is not None}
        belongs = BELONGS.get(kind, ["low", "high"])
        wrong = [name for name in given if name not in belongs]
        if wrong or (kind == "standard" and len(given) < 2):
            raise ValueError(
                f"low and high belong to {' and '.join(SPANS)}, mean and std to standard, which "
                f"needs both; got {', '.join(wrong or given) or 'neither'} with {kind}"
            )
        counts = {len(value) for value in given.values() if isinstance(value, list)}
        if self.color != "auto":
            counts.add(channels_of(self.color))
        if len(counts) > 1:
            raise ValueError(f"{' and '.join(given)}: give one number, or one for each channel")
        channels = max(counts, default=1)
        if kind == "standard":
            mean, std = (spread(given[name], channels) for name in belongs)
            if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
                raise ValueError(f"mean is {mean} and std {std}, but both are finite, and std > 0")
        if kind in SPANS:
            least, *usual, most = SPANS[kind]
            ends = (spread(given.get(n, u), channels) for n, u in zip(belongs, usual, strict=True))
            for low, high in zip(*ends, strict=True):
                if not least <= low < high <= most:
                    numbers = "numbers from 0 to 100" if kind == "percentile" else "finite numbers"
                    raise ValueError(
                        f"low is {low:g} and high {high:g}, but {kind} needs {numbers}, low < high"
                    )
        return self


def spread(value: PerChannel, channels: int) -> list[float]:
    """Give each channel its value."""
    return value if isinstance(value, list) else [value] * channels
