"""Cutting pictures into tiles, grouping tiles into batches, and stitching masks together again.

Which tiles share a batch depends on the shard and the run's ``compute`` section alone.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from unet_core.arrays import Array
from unet_core.checkpoint import Header
from unet_core.compute import Compute
from unet_core.engine import Batch, Segmented
from unet_core.geometry import Tile, tiles
from unet_core.picture import Picture

PENDING_BATCHES = 8
"""Tiles of shapes that do not fill a batch wait for at most this many batches of pixels,"""
PENDING_IMAGES = 64
"""and for at most this many images: finished masks wait behind them."""


class Canvas:
    """A picture and the mask that its tiles fill."""

    def __init__(self, index: int, picture: Picture, header: Header, tile_size: int) -> None:
        self.index = index
        self.picture = picture
        self.tiles = tiles(*picture.shape, tile_size, header.halo, header.spec.stride)
        self.mask_HW = np.empty(
            picture.shape, dtype=np.uint8 if header.classes <= 256 else np.uint16
        )
        self.confidence_sum = 0
        self.is_finite = True
        self._missing = len(self.tiles)

    @property
    def is_complete(self) -> bool:
        """Whether every tile was pasted."""
        return self._missing == 0

    def paste(self, tile: Tile, result: Segmented) -> None:
        """Take the kept part of one tile."""
        rows, columns = (slice(span.keep_start, span.keep_stop) for span in (tile.y, tile.x))
        self.mask_HW[rows, columns] = result.mask_HW
        self.confidence_sum += result.confidence_sum
        self.is_finite &= result.is_finite
        self._missing -= 1


Piece = tuple[Canvas, Tile]


class TileQueue:
    """Groups tiles by shape and type into batches, in the order of the shard.

    A shape that does not fill its batch waits until the shard ends, or until too many pixels wait;
    then the one that waits longest goes first.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._groups: dict[Any, list[Piece]] = {}
        self._pixels = 0

    def add(self, canvas: Canvas) -> Iterator[list[Piece]]:
        """Queue the tiles of a picture; yield the batches that are due."""
        for tile in canvas.tiles:
            key = (tile.shape, canvas.picture.pixels_CHW.dtype.str)
            group = self._groups.setdefault(key, [])
            group.append((canvas, tile))
            self._pixels += tile.shape[0] * tile.shape[1]
            if len(group) >= self._compute.batch_of(*tile.shape):
                yield self._take(key)
            elif self._is_late(canvas):
                yield self._take(next(iter(self._groups)))

    def _is_late(self, canvas: Canvas) -> bool:
        """Whether the group that waits longest has waited enough."""
        oldest, _ = next(iter(self._groups.values()))[0]
        waiting = canvas.index - oldest.index
        too_many = self._pixels > PENDING_BATCHES * self._compute.batch_pixels
        return too_many or waiting > PENDING_IMAGES

    def rest(self) -> Iterator[list[Piece]]:
        """What is left when the shard ends."""
        while self._groups:
            yield self._take(next(iter(self._groups)))

    def _take(self, key: Any) -> list[Piece]:
        group = self._groups.pop(key)
        self._pixels -= sum(tile.shape[0] * tile.shape[1] for _, tile in group)
        return group


def stack(pieces: list[Piece]) -> Batch:
    """The batch of some tiles of one shape and type."""
    pictures = [canvas.picture for canvas, _ in pieces]
    return Batch(
        tiles_NCHW=np.stack([window(c.picture.pixels_CHW, tile) for c, tile in pieces]),
        offset_NC=np.stack([picture.offset for picture in pictures]),
        scale_NC=np.stack([picture.scale for picture in pictures]),
        keep=[tile for _, tile in pieces],
    )


def window(pixels_CHW: Array, tile: Tile) -> Array:
    """Cut a tile; what lies below or to the right of the image is its reflection."""
    height, width = pixels_CHW.shape[1:]
    cut_CHW = pixels_CHW[
        :, tile.y.start : min(tile.y.stop, height), tile.x.start : min(tile.x.stop, width)
    ]
    below = tile.shape[0] - cut_CHW.shape[1]
    right = tile.shape[1] - cut_CHW.shape[2]
    if below or right:
        return np.pad(cut_CHW, ((0, 0), (0, below), (0, right)), mode="reflect")
    return cut_CHW
