"""The grid of tiles over an image: one tile size for a run, and the kept part of each tile."""

import logging
from dataclasses import dataclass
from typing import Literal

from unet_core.errors import ConfigError
from unet_core.tiling.geometry import Tile, Tiling, exact_spans, overlapping_spans

log = logging.getLogger(__name__)

USUAL_SIZE = 1024
"""Tile side in pixels where the network's halo allows it: large enough to fill a device."""
HALOS = 4
"""A tile of this many halos keeps a quarter of what it computes."""


@dataclass(frozen=True)
class TileGrid:
    """Tile size and tiling of a run; an image that fits into one tile is not cut."""

    size: int
    tiling: Tiling
    blends: bool = False
    """Tiles overlap by half and are averaged, instead of keeping their exact parts."""

    def over(self, height: int, width: int) -> list[Tile]:
        """Tiles of an image of ``height`` × ``width`` pixels, row by row."""
        cut = overlapping_spans if self.blends else exact_spans
        columns = cut(width, self.size, self.tiling)
        return [Tile(y, x) for y in cut(height, self.size, self.tiling) for x in columns]


def tile_grid_for(
    tiling: Tiling, size: int | Literal["auto"] = "auto", mode: str = "exact", tta: str = "none"
) -> TileGrid:
    """Resolve ``tile.size``, ``tile.mode`` and ``tile.tta`` for a network with this ``tiling``.

    Raises ConfigError for a size that the network cannot take; it names the nearest ones.
    """
    blends = mode == "blend" or not tiling.is_exact
    if blends and mode == "exact":
        log.warning(
            "tile.mode is exact, but this network's output depends on the tile around it; images "
            "larger than a tile are blended (tile.mode = 'blend' says so)"
        )
    if tta != "none":
        tiling = tiling.aligned()
    inner = tiling.margin if blends else tiling.margin + tiling.halo
    sides = tiling.tile_sides
    smallest = sides.at_least(2 * inner + tiling.stride)
    if size == "auto":
        size = sides.at_most(max(USUAL_SIZE, HALOS * inner, smallest))
    else:
        _check(size, smallest, inner, tiling)
    return TileGrid(size, tiling, blends)


def _check(size: int, smallest: int, inner: int, tiling: Tiling) -> None:
    if size < smallest:
        raise ConfigError(
            f"tile.size is {size}, but this network needs {smallest} or more: {inner} pixels of "
            f"context on both sides, and {tiling.stride} to keep"
        )
    if size not in tiling.tile_sides:
        raise ConfigError(
            f"tile.size = {size} is not possible with this network, whose tiles have sides of "
            f"{tiling.tile_sides}; {tiling.tile_sides.near(size)}"
        )
    kept = size - 2 * inner
    if HALOS * kept < size:
        log.warning(
            "tile.size = %d keeps only the inner %d pixels of each tile: images larger than that "
            "are computed %.0f times over; take %d if memory allows",
            size, kept, (size / kept) ** 2, tiling.tile_sides.at_least(HALOS * inner),
        )  # fmt: skip
