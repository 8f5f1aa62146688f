"""The doors through which foreign bytes come in, each a function that a child process calls.

What they return is small and says what came of it; what they raise is the door's own.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unet_core.config import InputConfig
from unet_core.errors import ImageError
from unet_core.images import large_tiff
from unet_core.images.codec import decode_images, decode_labels
from unet_core.images.tiff import Rules
from unet_core.inputs.formats import list_shards, open_source, read_shard
from unet_core.networks import checkpoint

PIXELS = 2**20


def image(data: bytes, **rules: Any) -> list[tuple[int, ...]]:
    """Shapes of the images of a file."""
    return [r.pixels_HWC.shape for r in decode_images(data, Rules(PIXELS, **rules))]


def labels(data: bytes) -> tuple[int, ...]:
    """The shape of a mask."""
    return decode_labels(data, Rules(PIXELS), {}, 2, 255).shape


def windows(data: bytes, **rules: Any) -> tuple[int, ...] | None:
    """The shape of an image that is read by window, all of it; None if it is not."""
    large_tiff.SMALL_PIXELS = 0
    rule = Rules(PIXELS, **rules)
    large = large_tiff.open_large(lambda start, stop: data[start:stop], len(data), rule)
    if large is None:
        return None
    height, width = large.shape
    for y in (0, max(0, height - 64)):
        for x in (0, max(0, width - 64)):
            large.read(y, x, min(64, height), min(64, width))
    return large.shape


def rows(name: str, data: bytes, **keys: Any) -> list[tuple[str, str]]:
    """Id and outcome of each image of an input file: an error code, or how many bytes it has."""
    with _file(name, data) as path:
        return [row for _, row in zip(range(10), _rows(path, keys), strict=False)]
    

def _rows(path: Path, keys: dict[str, Any]) -> Iterator[tuple[str, str]]:
    source = open_source(InputConfig(uri=str(path), **keys))
    for shard in list_shards(source):
        for sample in read_shard(source, shard):
            try:
                if sample.failure is not None:
                    raise sample.failure
                found = str(len(sample.read()))
            except ImageError as error:
                found = error.code
            yield sample.image_id, found


def weights(data: bytes) -> list[str]:
    """The class names of a checkpoint, loaded."""
    with _file("x.safetensors", data) as path:
        checkpoint.read_header(str(path))
        return list(checkpoint.load(str(path))[1].class_names)


@contextmanager
def _file(name: str, data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        yield Path(folder) / name


def rows_with(name: str, data: bytes, keys: dict[str, Any]) -> list[tuple[str, str]]:
    return rows(name, data, **keys)
