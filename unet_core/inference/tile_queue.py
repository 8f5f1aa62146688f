"""Groups tiles into batches, and cuts them out of their images.

Which tiles share a batch depends on the shard and the run's ``compute`` section alone.
"""

import math
from collections.abc import Iterator

import numpy as np

from unet_core.arrays import Array
from unet_core.errors import ImageError
from unet_core.images.raster import Raster, Window
from unet_core.inference.engine import Batch
from unet_core.inference.mask_assembler import MaskAssembler
from unet_core.runs.compute import Compute
from unet_core.tiling.geometry import Box, Span, Tile

PENDING_BATCHES = 8  # limit of pixels that wait for their batch to fill, in batches
PENDING_IMAGES = 64  # and of images behind the oldest of them, whose finished masks wait too

TileRef = tuple[MaskAssembler, Tile]


class TileQueue:
    """Groups tiles by shape and type into batches, in the order of the shard.

    A shape that does not fill its batch waits until the shard ends, or until too many pixels wait;
    then the one that waits longest goes first.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._groups: dict[tuple[tuple[int, int], str], list[TileRef]] = {}

    def add(self, assembler: MaskAssembler) -> Iterator[list[TileRef]]:
        """Queue the tiles of an image; yield the batches that are due."""
        for tile in assembler.tiles:
            key = (tile.shape, assembler.decoded.pixels.dtype.str)
            group = self._groups.setdefault(key, [])
            group.append((assembler, tile))
            if len(group) >= self._compute.batch_of(*tile.shape):
                yield self._groups.pop(key)
            elif self._is_late(assembler):
                yield self._longest_waiting()

    def _is_late(self, assembler: MaskAssembler) -> bool:
        """True if the group that waits longest must go although it is not full."""
        oldest, _ = next(iter(self._groups.values()))[0]
        pixels = sum(len(group) * math.prod(shape) for (shape, _), group in self._groups.items())
        too_many = pixels > PENDING_BATCHES * self._compute.batch_pixels
        return too_many or assembler.index - oldest.index > PENDING_IMAGES

    def rest(self) -> Iterator[list[TileRef]]:
        """Batches that are not full when the shard ends."""
        while self._groups:
            yield self._longest_waiting()

    def _longest_waiting(self) -> list[TileRef]:
        return self._groups.pop(next(iter(self._groups)))


def stack_tiles(pieces: list[TileRef]) -> Batch:
    """Cut and stack tiles of one shape and type.

    A tile whose pixels turn out to be damaged fails its image, and is zeros here.
    """
    decoded_images = [assembler.decoded for assembler, _ in pieces]
    windows = [_cut(assembler, tile) for assembler, tile in pieces]
    return Batch(
        tiles_NCHW=np.stack([window.pixels_CHW for window in windows]),
        offset_NC=np.stack([decoded.offset for decoded in decoded_images]),
        scale_NC=np.stack([decoded.scale for decoded in decoded_images]),
        keep=[tile for _, tile in pieces],
        valid=[
            _kept(window.valid_HW, tile) for (_, tile), window in zip(pieces, windows, strict=True)
        ],
    )


def _kept(valid_HW: Array | None, tile: Tile) -> Array | None:
    """Cut the part of a tile's validity that it keeps; None if all of that is valid."""
    kept_HW = None if valid_HW is None else valid_HW[tile.kept(0)]
    return None if kept_HW is None or kept_HW.all() else kept_HW


def _cut(assembler: MaskAssembler, tile: Tile) -> Window:
    pixels = assembler.decoded.pixels
    try:
        return cut_tile(pixels, tile)
    except ImageError as failure:
        assembler.fail(tile, failure)
        return Window(np.zeros((pixels.channels, *tile.shape), dtype=pixels.dtype))


def cut_tile(pixels: Raster, tile: Tile) -> Window:
    """Cut a tile; what lies beyond the image is its reflection."""
    rows, columns = (
        _mirrored(span, length) for span, length in zip((tile.y, tile.x), pixels.shape, strict=True)
    )
    top, left = int(rows.min()), int(columns.min())
    height, width = int(rows.max()) + 1 - top, int(columns.max()) + 1 - left
    window = pixels.read(Box(top, left, height, width))
    if (height, width) == tile.shape:
        return window
    return window.cut(lambda array: array[..., rows - top, :][..., columns - left])


def _mirrored(span: Span, length: int) -> Array:
    """Indices of the pixels of a span: mirrored at both ends as often as needed, without the end
    itself; a single pixel is repeated.
    """
    period = max(1, 2 * (length - 1))
    at = np.arange(span.start, span.stop) % period
    return np.where(at >= length, period - at, at)
