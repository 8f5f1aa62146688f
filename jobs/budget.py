"""How many failed images a run puts up with."""

from dataclasses import dataclass

from unet_core.config import ErrorsConfig
from unet_core.metrics import Totals

ENOUGH_IMAGES = 1000
"""Before so many, a share says nothing, except at the end."""


@dataclass(frozen=True)
class Budget:
    """``errors.max_failed_images``, a number or a share."""

    most: int | float

    @classmethod
    def of(cls, errors: ErrorsConfig) -> "Budget":
        """The budget of a config."""
        return cls(errors.max_failed_images)

    def is_exceeded(self, totals: Totals, at_end: bool = False) -> bool:
        """Whether more images failed than are put up with."""
        if isinstance(self.most, int):
            return totals.failed > self.most
        is_judged = at_end or totals.images_seen >= ENOUGH_IMAGES
        return is_judged and totals.failed > self.most * totals.images_seen

    def __str__(self) -> str:
        return f"{self.most:,}" if isinstance(self.most, int) else f"{100 * self.most:g} %"
