"""Assembles the mask of an image from its tiles, one mask window after the other.

A mask window is handed on as soon as its last tile is pasted, so that an image may be larger than
memory: only windows whose tiles are under way exist.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unet_core.arrays import Array
from unet_core.errors import ImageError
from unet_core.images.decoder import DecodedImage
from unet_core.inference.engine import TileResult
from unet_core.inference.postprocessing import Postprocessing, confidence_units
from unet_core.storage.spool import Spool
from unet_core.tiling.geometry import MASK_WINDOW_SIDE, Box, Slices, Tile, mask_windows, round_up
from unet_core.tiling.tile_grid import TileGrid

BAND_ROWS = 256  # blended windows are finished in bands, which keeps temporary arrays small
SIGMA = 1 / 8  # of the Gaussian importance of a blended tile, as a share of its side


@dataclass(frozen=True)
class MaskWindow:
    """One mask window; each pixel comes from one tile, unless tiles are blended. Pixels that are
    not valid have the reserved class id, and probabilities of 0.
    """

    box: Box
    mask_HW: Array
    confidence_sum: int
    """Σ round(p · 65535) of the chosen class of a blended window; else 0: tiles have summed it."""
    probabilities_KHW: Array | None

    @classmethod
    def empty(cls, box: Box, postprocessing: Postprocessing) -> "MaskWindow":
        """Allocate a window: class ids are uint8, or uint16 from 256 classes on."""
        mask_HW = np.empty(box.shape, np.uint8 if postprocessing.logits < 256 else np.uint16)
        probabilities_KHW = (
            np.empty((postprocessing.logits, *box.shape), postprocessing.probabilities)
            if postprocessing.probabilities != "none"
            else None
        )
        return cls(box, mask_HW, 0, probabilities_KHW)

    def paste(self, tile: Tile, result: TileResult) -> None:
        """Copy the pixels that a tile keeps and that lie in the window."""
        here, there = self.box.intersection(*tile.target)
        assert result.mask_HW is not None
        self.mask_HW[here] = result.mask_HW[there]
        if self.probabilities_KHW is not None and result.probabilities_KHW is not None:
            self.probabilities_KHW[:, *here] = result.probabilities_KHW[:, *there]
        if result.valid_HW is not None:
            self.invalidate(here, ~result.valid_HW[there])

    def invalidate(self, here: Slices, is_invalid: Array) -> None:
        """Mark pixels of a part of the window as not valid."""
        self.mask_HW[here][is_invalid] = np.iinfo(self.mask_HW.dtype).max  # as ``nodata_id``
        if self.probabilities_KHW is not None:
            self.probabilities_KHW[:, *here][:, is_invalid] = 0

    def finished(self) -> "MaskWindow":
        """Return the window: its pixels are final as pasted; blended ones are divided first."""
        return self


class MaskAssembler:
    """A decoded image, and the mask windows that its tiles fill."""

    def __init__(
        self, index: int, decoded: DecodedImage, tile_grid: TileGrid, postprocessing: Postprocessing
    ) -> None:
        self.index = index
        self.decoded = decoded
        self.tiles = tile_grid.over(*decoded.pixels.shape)
        self.confidence_sum = 0
        self._failures: list[tuple[int, int, int, ImageError]] = []
        self.encoded: list[Future[Any]] = []
        """Rows to come, an ``EncodedWindow`` each, of the windows that are finished."""
        self._blends, self._margin = tile_grid.blends, tile_grid.tiling.margin
        self._postprocessing = postprocessing
        self._boxes = mask_windows(*decoded.pixels.shape)
        self.spool = Spool() if len(self._boxes) > 1 else None
        """Holds the bytes of finished windows until the image is known to be good."""
        self._remaining_tiles = Counter(
            box for tile in self.tiles for box in self._windows_of(tile)
        )
        self._open: dict[Box, MaskWindow | _BlendedMaskWindow] = {}

    @property
    def is_complete(self) -> bool:
        """True when every tile is pasted."""
        return not self._remaining_tiles

    def paste(self, tile: Tile, result: TileResult) -> Iterator[MaskWindow]:
        """Paste the kept part of one tile; yield the windows that it completes."""
        self.confidence_sum += result.confidence_sum
        if not result.is_finite:
            reason = "the network's output is NaN or infinite here"
            self.fail(tile, ImageError("not_finite", reason), rank=1)
        for box in self._windows_of(tile):
            if box not in self._open:
                self._open[box] = (
                    _BlendedMaskWindow(
                        box, self._postprocessing, self._margin, is_alone=len(self.tiles) == 1
                    )
                    if self._blends
                    else MaskWindow.empty(box, self._postprocessing)
                )
            self._open[box].paste(tile, result)
            self._remaining_tiles[box] -= 1
            if not self._remaining_tiles[box]:
                del self._remaining_tiles[box]
                yield self._open.pop(box).finished()

    def fail(self, tile: Tile, failure: ImageError, rank: int = 0) -> None:
        """Mark the image as failed. Of several failures the lowest ``rank`` counts (0: damaged
        pixels, 1: the network's output), then the first in the image: threads find them in any
        order.
        """
        self._failures.append((rank, tile.y.start, tile.x.start, failure))

    @property
    def failure(self) -> ImageError | None:
        """The reason that lies first in the image, whichever was found first; None if none was."""
        return min(self._failures, key=lambda failure: failure[:3], default=(None,))[-1]

    def _windows_of(self, tile: Tile) -> list[Box]:
        """The mask windows that a tile's kept part touches."""
        if len(self._boxes) == 1:
            return self._boxes
        rows, columns = (
            range(span.start // MASK_WINDOW_SIDE, (span.stop - 1) // MASK_WINDOW_SIDE + 1)
            for span in tile.target
        )
        across = round_up(self.decoded.pixels.shape[1], MASK_WINDOW_SIDE) // MASK_WINDOW_SIDE
        return [self._boxes[row * across + column] for row in rows for column in columns]


class _BlendedMaskWindow:
    """A mask window whose pixels are weighted means over tiles."""

    def __init__(
        self, box: Box, postprocessing: Postprocessing, margin: int, is_alone: bool
    ) -> None:
        self._box, self._postprocessing = box, postprocessing
        self._margin, self._is_alone = margin, is_alone
        self._sum_KHW = np.zeros((postprocessing.logits, *box.shape), dtype=np.float32)
        self._weight_HW = np.zeros(box.shape, dtype=np.float32)
        self._is_invalid_HW = np.zeros(box.shape, dtype=bool)

    def paste(self, tile: Tile, result: TileResult) -> None:
        here, there = self._box.intersection(*tile.target)
        assert result.probabilities_KHW is not None
        logits = (side - 2 * self._margin for side in tile.shape)
        weight_HW = np.float32(1) if self._is_alone else importance(*logits)[there]
        self._sum_KHW[:, *here] += result.probabilities_KHW[:, *there] * weight_HW
        self._weight_HW[here] += weight_HW
        if result.valid_HW is not None:
            self._is_invalid_HW[here] = ~result.valid_HW[there]

    def finished(self) -> MaskWindow:
        window, confidence = MaskWindow.empty(self._box, self._postprocessing), 0
        for start in range(0, self._box.height, BAND_ROWS):
            rows = slice(start, start + BAND_ROWS)
            p_KHW = np.nan_to_num(self._sum_KHW[:, rows] / self._weight_HW[rows])
            window.mask_HW[rows], chosen_HW = self._postprocessing.classify(p_KHW)
            chosen_HW[self._is_invalid_HW[rows]] = 0
            confidence += int(confidence_units(chosen_HW.astype(np.float64)).sum())
            if window.probabilities_KHW is not None:
                window.probabilities_KHW[:, rows] = self._postprocessing.quantize(p_KHW)
        window.invalidate((slice(None), slice(None)), self._is_invalid_HW)
        return replace(window, confidence_sum=confidence)


@functools.lru_cache(maxsize=16)
def importance(height: int, width: int) -> Array:
    """Gaussian weights of a tile's logits, largest at its centre, nowhere zero; float32 HW."""

    def bell(length: int) -> Array:
        at = (np.arange(length) - (length - 1) / 2) / (length * SIGMA)
        return np.exp(-0.5 * at * at)

    return np.maximum(np.outer(bell(height), bell(width)), 1e-6).astype(np.float32)
