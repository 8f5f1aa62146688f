"""The images that a shard's masks are of, read once more beside them."""

from collections.abc import Iterator, Sequence

from unet_core.errors import ShardError
from unet_core.images.picture import Picture, Pixels
from unet_core.inputs.shards import Shard
from unet_core.results import Results, pictures


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
        """What can be read."""
        if not self._places:
            return
        try:
            for image in pictures(results, shard, self._places.keys(), results.source, False):
                if isinstance(image, Picture):
                    yield image
        except ShardError:
            return  # its tar or Parquet file is gone, or another
