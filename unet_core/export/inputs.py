"""The images that a shard's masks are of, read once more beside them."""

import dataclasses
from collections.abc import Iterator, Sequence

from unet_core.errors import ShardError
from unet_core.images.picture import Decoder, Picture, Pixels
from unet_core.images.preprocessing import Preprocessing
from unet_core.inputs.formats import read_shard
from unet_core.inputs.shards import Shard
from unet_core.manifest import with_members
from unet_core.results import Results


class InputImages:
    """Images in the network's colours, in the order of the masks."""

    def __init__(self, results: Results, shard: Shard, ids: Sequence[str]) -> None:
        self._places = {image_id: place for place, image_id in enumerate(ids)}
        self._pictures = self._read(results, shard)
        self._next: Picture | None = None

    def pixels(self, image_id: str) -> Pixels | None:
        """Those of one image; None if it cannot be read any more."""
        wanted = self._places.get(image_id, -1)
        while self._next is None or self._places[self._next.sample.image_id] < wanted:
            self._next = next(self._pictures, None)
            if self._next is None:
                return None
        return self._next.pixels if self._next.sample.image_id == image_id else None

    def _read(self, results: Results, shard: Shard) -> Iterator[Picture]:
        """What can be read; images without a mask are let alone: they may have killed a worker."""
        if not self._places:
            return
        color = Preprocessing.model_validate(results.record.identity["model.preprocessing"]).color
        wanted = Preprocessing(color=color, normalisation="range")  # nothing has to be counted
        decoder = Decoder(wanted, len(results.class_names), results.config.input)
        files = {*self._places, *(image_id.rpartition("#")[0] for image_id in self._places)}
        whole = with_members(results.run.store, shard) if shard.has_members else shard
        try:
            for sample in read_shard(results.source, whole):
                if sample.image_id in files:
                    bare = dataclasses.replace(sample, read_mask=None, open_mask=None)
                    for image in decoder.decode(bare):
                        if isinstance(image, Picture) and image.sample.image_id in self._places:
                            yield image
        except ShardError:
            return  # its tar or Parquet file is gone, or another
