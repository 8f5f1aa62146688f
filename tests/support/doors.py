"""The doors through which foreign bytes come in, each a function that a child process calls.

What they return is small and says what came of it; what they raise is the door's own.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.data import reading
from unet_core.config.sections import InputConfig
from unet_core.errors import ImageError
from unet_core.images import large_tiff, tiff_pages
from unet_core.images.codec import decode_images, decode_labels
from unet_core.inputs import webdataset
from unet_core.inputs.formats import list_shards, open_source, read_shard
from unet_core.networks import checkpoint
from unet_core.networks.foreign.weights import read_tensors
from unet_core.networks.header import read_header
from unet_core.storage.ranges import Ranged
from unet_core.tiling.geometry import Box

PIXELS = 2**20
SIDE = 64
SHOWN = 20


def image(data: bytes, **rules: Any) -> list[tuple[Any, ...]]:
    """Shapes of the images of a file, or what is wrong with some of its pages."""
    pages = decode_images(data, reading(PIXELS, **rules))
    return [
        (str(page),) if isinstance(page, ImageError) else (*page.shape, page.channels)
        for page in pages
    ][:SHOWN]


def labels(data: bytes) -> tuple[int, ...]:
    """The shape of a mask."""
    return decode_labels(data, reading(PIXELS, ignore_index=65535), 65536)[0].shape


def windows(data: bytes) -> tuple[int, ...] | None:
    """The shape of an image of any size that is read by window, at its corners; None if it is not.

    For a child process: it changes what counts as large.
    """
    large_tiff.SMALL_PIXELS = 0
    rules = reading(PIXELS)
    file = Ranged(len(data), lambda start, stop: data[start:stop])
    large = large_tiff.open_large(file, rules)
    if large is None:
        return None
    height, width = large.shape
    for y in (0, max(0, height - SIDE)):
        for x in (0, max(0, width - SIDE)):
            large.read(Box(y, x, min(SIDE, height), min(SIDE, width)))
    return large.shape


def picture(data: bytes) -> list[tuple[int, ...]]:
    """A file decoded by window, as a mask and whole; raises what the last one does."""
    for attempt in (windows, labels):
        with contextlib.suppress(ImageError):
            attempt(data)
    return image(data)


def picture_or_code(data: bytes) -> object:
    """The shapes, or the code of the refusal. For a child process: it allows fewer pages."""
    tiff_pages.MAX_PAGES = 1000
    try:
        return picture(data)
    except ImageError as error:
        return error.code


def codes(files: list[bytes]) -> list[str]:
    """The codes of those files that are refused."""
    found = map(picture_or_code, files)
    return [code for code in found if isinstance(code, str)]


def few_bytes(data: bytes) -> list[tuple[str, str]]:
    """The rows of a tar whose members may hold 64 MiB, which ``verify`` must count alike.

    For a child process: it changes that limit.
    """
    webdataset.MAX_ENCODED_BYTES = 64 * 2**20
    with _file("t.tar", data) as path:
        found = list(_rows(path, {}))
        source = open_source(InputConfig(uri=str(path)))
        (shard,) = list_shards(source)
        counted = list(webdataset.recount(source, shard))
    assert counted == [image_id for image_id, outcome in found if outcome != "tar"]
    return found[:SHOWN]


def rows(name: str, data: bytes, keys: dict[str, Any]) -> list[tuple[str, str]]:
    """Id and outcome of the first images of an input file: an error code, or how many bytes it has.

    Reads all of them; relative URIs of a list start in an empty folder.
    """
    with _file(name, data) as path:
        return list(_rows(path, keys))[:SHOWN]


def _rows(path: Path, keys: dict[str, Any]) -> Iterator[tuple[str, str]]:
    source = open_source(InputConfig(uri=str(path), **keys))
    for shard in list_shards(source):
        for sample in read_shard(source, shard):
            try:
                if sample.failure is not None:
                    raise sample.failure
                outcome = str(len(sample.read()))
                if sample.read_mask is not None:
                    sample.read_mask()
            except ImageError as error:
                outcome = error.code
            yield sample.image_id, outcome


def listed(name: str, data: bytes, keys: dict[str, Any]) -> int:
    """How many images a list names; none is opened."""
    with _file(name, data) as path:
        source = open_source(InputConfig(uri=str(path), format="list", **keys))
        return sum(len(shard.members) for shard in list_shards(source))


def network(data: bytes) -> tuple[str, ...]:
    """The class names of a checkpoint, loaded."""
    with _file("x.safetensors", data) as path:
        read_header(str(path))
        return checkpoint.load(str(path))[1].class_names


def tensors(data: bytes) -> int:
    """How many tensors a file from elsewhere has."""
    with _file("x.pth", data) as path:
        return len(read_tensors(str(path)))


@contextlib.contextmanager
def _file(name: str, data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path
