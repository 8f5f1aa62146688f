"""How the images of a run are cut: the ``[tile]`` section, settled for one network."""

import logging
from dataclasses import dataclass

from unet_core.config.predict import TileConfig
from unet_core.errors import ConfigError
from unet_core.tiling.geometry import Tile, Tiling, tiles

log = logging.getLogger(__name__)

USUAL_SIZE = 1024
HALOS = 4
"""A window of this many halos keeps a quarter of what it computes."""


@dataclass(frozen=True)
class Windows:
    """The windows of a run: one size for all images that do not fit, and what is kept of each."""

    size: int
    tiling: Tiling
    blends: bool = False
    """Windows overlap by half and are averaged, instead of keeping what is exact."""

    def over(self, height: int, width: int) -> list[Tile]:
        """The windows of one image, row by row."""
        return tiles(height, width, self.size, self.tiling, self.blends)


def windows_for(config: TileConfig, tiling: Tiling) -> Windows:
    """Settle mode and size. Raises ConfigError for a size that the network cannot take, with those
    that are next to it.
    """
    blends = config.mode == "blend" or not tiling.is_exact
    if blends and config.mode == "exact":
        log.warning(
            "tile.mode is exact, but this network's output depends on the window around it; images "
            "larger than a tile are blended (tile.mode = 'blend' says so)"
        )
    if config.tta != "none":
        tiling = tiling.aligned()
    inner = tiling.margin if blends else tiling.margin + tiling.halo
    sides = tiling.window_sides
    smallest = sides.at_least(2 * inner + tiling.stride)
    if config.size == "auto":
        wanted = max(USUAL_SIZE, HALOS * inner, smallest)
        return Windows(sides.at_most(wanted), tiling, blends)
    _check(config.size, smallest, inner, tiling)
    return Windows(config.size, tiling, blends)


def _check(size: int, smallest: int, inner: int, tiling: Tiling) -> None:
    if size < smallest:
        raise ConfigError(
            f"tile.size is {size}, but this network needs {smallest} or more: {inner} pixels of "
            f"context on both sides, and {tiling.stride} to keep"
        )
    if size not in tiling.window_sides:
        raise ConfigError(
            f"tile.size = {size} is not possible with this network, whose windows have sides of "
            f"{tiling.window_sides}; {tiling.window_sides.near(size)}"
        )
    kept = size - 2 * inner
    if HALOS * kept < size:
        log.warning(
            "tile.size = %d keeps only the inner %d pixels of each tile: images larger than that "
            "are computed %.0f times over; take %d if memory allows",
            size, kept, (size / kept) ** 2, tiling.window_sides.at_least(HALOS * inner),
        )  # fmt: skip
