"""How good a network is on the validation images, segmented as ``predict`` does it."""

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
AHEAD_BYTES = 2**28


@dataclass(frozen=True)
class Validation:
    """What came of it, from summed counts."""

    confusion_KK: Array
    """Pixels, truth × prediction."""

    @property
    def scores(self) -> list[Scores]:
        """Micro scores per class."""
        return scores_of(self.confusion_KK)

    @property
    def accuracy(self) -> float | None:
        """Share of the pixels that are right."""
        return ratio(int(self.confusion_KK.trace()), int(self.confusion_KK.sum()))

    @property
    def only_class(self) -> int | None:
        """The class that every pixel was given, where the truth has several."""
        predicted, true = (np.flatnonzero(self.confusion_KK.sum(axis=axis)) for axis in (0, 1))
        return int(predicted[0]) if len(predicted) == 1 < len(true) else None

    def of(self, metric: str) -> float:
        """What ``train.best`` compares; 0 where it is not defined."""
        if metric == "accuracy":
            return self.accuracy or 0.0
        return mean(getattr(score, metric) for score in self.scores[1:]) or 0.0


def validate(
    network: nn.Module, header: Header, device: torch.device, split: Split, ranks: Ranks,
    pool: ThreadPoolExecutor, wants_stop: Callable[[], bool],
) -> Validation:  # fmt: skip
    """Segment a split, each rank its share; counts, and a StoppedError, are those of all."""
    tile_grid = tile_grid_for(header.tiling)
    postprocessing = Postprocessing(header.network.classes)
    classes, ignore_index = header.classes, split.input.config.ignore_index

    def count() -> Array:
        engine = Engine(copy.deepcopy(network), header, device, postprocessing, tile_grid.blends)
        matrix = np.zeros((classes, classes), dtype=np.int64)
        mine = _mine(split, ranks)
        with Prefetch(pool, split.load, mine, AHEAD, attrgetter("nbytes"), AHEAD_BYTES) as images:
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
                        matrix += confusion(truth_HW, window.mask_HW, classes, ignore_index)
        return matrix

    # the engine wants repeatable kernels; training does not
    with torch.backends.cudnn.flags(enabled=True):
        return Validation(sum(ranks.gather(ranks.on_all(count))))


def _mine(split: Split, ranks: Ranks) -> Iterator[Item]:
    """Every so many-th image of the split, each on one rank."""
    numbers = itertools.count()
    for shard, count in enumerate(split.counts):
        wanted = [at for at in range(count) if next(numbers) % ranks.count == ranks.rank]
        yield from split.items(shard, wanted)
