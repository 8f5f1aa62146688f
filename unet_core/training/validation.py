"""Validation: images are segmented as ``predict`` does, and compared with their labels."""

import copy
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import nn

from unet_core.arrays import Array
from unet_core.concurrency import Prefetch
from unet_core.errors import StoppedError
from unet_core.inference.engine import Engine
from unet_core.inference.mask_assembler import MaskAssembler
from unet_core.inference.postprocessing import Postprocessing
from unet_core.inference.tile_queue import stack_tiles
from unet_core.metrics import Scores, confusion, mean, ratio, scores_of
from unet_core.networks.header import Header
from unet_core.tiling.tile_grid import tile_grid_for
from unet_core.training.dataset import Item, Split
from unet_core.training.ranks import Ranks

AHEAD = 8
"""Images that are decoded ahead: enough to keep the device busy."""
AHEAD_BYTES = 2**28
"""Memory for them: 256 MiB, which large images reach before ``AHEAD``."""


@dataclass(frozen=True)
class Validation:
    """Result of a validation: pixel counts of all images, and scores derived from them."""

    confusion_KK: Array
    """Pixel counts, int64: truth × prediction."""
    first_foreground: int = 1
    """Lowest id of a foreground class."""

    @property
    def scores(self) -> list[Scores]:
        """Scores of each class from the summed counts (micro average)."""
        return scores_of(self.confusion_KK)

    @property
    def accuracy(self) -> float | None:
        """Share of correctly classified pixels; None without valid pixels."""
        return ratio(int(self.confusion_KK.trace()), int(self.confusion_KK.sum()))

    @property
    def only_class(self) -> int | None:
        """The one class that was predicted for all pixels, if the truth has several; else None."""
        predicted, true = (np.flatnonzero(self.confusion_KK.sum(axis=axis)) for axis in (0, 1))
        return int(predicted[0]) if len(predicted) == 1 < len(true) else None

    def of(self, metric: str) -> float | None:
        """Return the value that ``train.best`` compares; None where it is undefined: no foreground
        class is in the truth or predicted, or for ``accuracy`` no pixel counts.
        """
        if metric == "accuracy":
            return self.accuracy
        return mean(getattr(score, metric) for score in self.scores[self.first_foreground :])


def validate(
    network: nn.Module, header: Header, device: torch.device, split: Split, ranks: Ranks,
    pool: ThreadPoolExecutor, wants_stop: Callable[[], bool],
) -> Validation:  # fmt: skip
    """Segment a split, each rank its share of images; all return the counts of all.

    Raises StoppedError on all ranks if ``wants_stop`` was true on any.
    """
    tile_grid = tile_grid_for(header.tiling)
    postprocessing = Postprocessing(header.network.classes)
    classes, ignore_index = header.classes, split.input.config.ignore_index

    def count() -> Array:
        engine = Engine(copy.deepcopy(network), header, device, postprocessing, tile_grid.blends)
        confusion_KK = np.zeros((classes, classes), dtype=np.int64)
        with Prefetch(
            pool, split.load, _items_of_rank(split, ranks), AHEAD, attrgetter("nbytes"), AHEAD_BYTES
        ) as images:
            for index, image in enumerate(images):
                if wants_stop():
                    raise StoppedError("stopped while validating")
                assembler = MaskAssembler(index, image.decoded, tile_grid, postprocessing)
                for tile in assembler.tiles:
                    for window in assembler.paste(
                        tile, engine.run(stack_tiles([(assembler, tile)]))[0]
                    ):
                        y, x, height, width = window.box
                        truth_HW = image.labels_HW[y : y + height, x : x + width]
                        confusion_KK += confusion(truth_HW, window.mask_HW, classes, ignore_index)
        return confusion_KK

    # the engine sets cudnn flags for repeatable results; this restores those of training
    with torch.backends.cudnn.flags(enabled=True):
        counted = sum(ranks.all_gather(ranks.on_all(count)))
        return Validation(counted, header.first_foreground)


def _items_of_rank(split: Split, ranks: Ranks) -> Iterator[Item]:
    """Yield every n-th image of the split on each of n ranks."""
    numbers = itertools.count()
    for shard, count in enumerate(split.counts):
        yield from split.items(
            shard, [i for i in range(count) if next(numbers) % ranks.world_size == ranks.rank]
        )
