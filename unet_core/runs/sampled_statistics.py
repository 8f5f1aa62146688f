"""Statistics of a whole input, or of its groups, by a sample of images that their names decide."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from heapq import nsmallest
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from unet_core.arrays import Array
from unet_core.concurrency import map_in_order
from unet_core.errors import ConfigError, ImageError, few
from unet_core.images.decoder import DecodedImage, Decoder, Rejected
from unet_core.images.preprocessing import Limits, Preprocessing
from unet_core.images.sample import Sample
from unet_core.images.statistics import group_of, known_values
from unet_core.inputs.formats import read_shard
from unet_core.inputs.shards import Member, Shard, Source
from unet_core.tiling.geometry import Box

DATASET_IMAGES = 64
"""Images sampled of an input: their percentiles vary little, and they are read within a minute."""
GROUP_IMAGES = 16
"""Images sampled of each group: groups are alike inside."""
MOST_GROUPS = 1000
"""Largest number of groups: 16,000 images are read before work begins."""
GRID, SIDE = 8, 64
"""Windows along an axis, and their side in pixels, that are read of an image larger than these
together: a sample of 262,144 pixels, without reading all of a large image."""
READ_THREADS = 16  # a store answers them side by side


class Sampled(NamedTuple):
    """A part of the pixels of an image."""

    image_id: str
    full_scale: float
    values: list[Array]
    """Known values of each channel, in a grid of windows."""

    @classmethod
    def of(cls, image: DecodedImage) -> "Sampled":
        """Read the part. Raises ImageError."""
        pixels = image.pixels
        starts = [
            [0]
            if length <= GRID * SIDE
            else np.linspace(0, length - SIDE, GRID, dtype=int).tolist()
            for length in pixels.shape
        ]
        sides = [length if length <= GRID * SIDE else SIDE for length in pixels.shape]
        windows = [pixels.read(Box(y, x, *sides)) for y in starts[0] for x in starts[1]]
        values = [*map(np.concatenate, zip(*map(known_values, windows), strict=True))]
        return cls(image.sample.image_id, pixels.full_scale, values)


def sample_limits(
    source: Source,
    shards: list[Shard],
    with_members: Callable[[Shard], Shard],
    wanted: Preprocessing,
    by_group: bool,
) -> dict[str, list[Limits]]:
    """Measure the limits of each channel over sampled images, by group, or all under an empty name.

    Raises ConfigError if none can be read, if images of one group have values of different types,
    and for groups that are too many or not known from listing.
    """
    color = Preprocessing(color=wanted.color, normalization="range")  # nothing has to be counted
    without_truth = source.config.model_copy(update={"masks": ""})
    decoder = Decoder(color, 2, without_truth)

    def sample_image(sample: Sample) -> list[Sampled | str]:
        """Decode the images of a file and keep a part of each, or the reason why it fails."""
        found: list[Sampled | str] = []
        for image in decoder.decode(replace(sample, read_mask=None, open_mask=None)):
            try:
                if isinstance(image, Rejected):
                    raise image.failure
                found.append(Sampled.of(image))
            except ImageError as failure:  # also from pixels that are only read now
                found.append(f"{image.sample.image_id}: {failure}")
        return found

    if by_group:
        grouped = _of_groups(source, shards, with_members)
    else:
        grouped = {"": _of_dataset(source, shards, with_members)}
    limits, failures = dict[str, list[Limits]](), list[str]()
    for group, samples in grouped.items():
        images = [*chain.from_iterable(map_in_order(sample_image, samples, READ_THREADS))]
        failures += (image for image in images if isinstance(image, str))
        if sampled := [image for image in images if isinstance(image, Sampled)]:
            limits[group] = _limits(sampled, wanted)
    if not limits:
        raise ConfigError(
            f"input.statistics: none of {len(failures)} sampled images can be read; "
            f"{few(failures, 1)}"
        )
    return limits


def _of_dataset(
    source: Source, shards: list[Shard], with_members: Callable[[Shard], Shard]
) -> Iterator[Sample]:
    """Sample images of all shards, or of as many as images are needed; the first ones of a tar or
    Parquet file, which are read from the front.
    """
    chosen = nsmallest(DATASET_IMAGES, shards, key=lambda shard: _order(shard.shard_id))
    each = math.ceil(DATASET_IMAGES / len(chosen))
    for shard in chosen:
        full = with_members(shard)
        members = nsmallest(each, full.members, key=_key_order)
        yield from islice(read_shard(source, replace(full, members=tuple(members))), each)


def _of_groups(
    source: Source, shards: list[Shard], with_members: Callable[[Shard], Shard]
) -> dict[str, Iterable[Sample]]:
    """Sample images of each group."""
    members = defaultdict[str, list[Member]](list)
    for shard in shards:
        if not shard.has_members:
            raise ConfigError(
                f"input.statistics = 'group' needs loose images or a list, but the format is "
                f"{source.format!r}; use 'dataset' or 'image'"
            )
        for member in with_members(shard).members:
            members[group_of(member.key)].append(member)
    if len(members) > MOST_GROUPS:
        raise ConfigError(
            f"input.statistics = 'group': {len(members)} folders, allowed: {MOST_GROUPS}; use "
            "'dataset' or 'image'"
        )
    chosen = {group: nsmallest(GROUP_IMAGES, members[group], key=_key_order) for group in members}
    return {
        group: read_shard(source, replace(shards[0], members=tuple(chosen[group])))
        for group in sorted(chosen)
    }


def _key_order(member: Member) -> bytes:
    return _order(member.key)


def _order(name: str) -> bytes:
    """Order names at random, but always in the same way."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _limits(images: list[Sampled], wanted: Preprocessing) -> list[Limits]:
    """Measure the limits of each channel over the sampled pixels of all images."""
    scales = {image.full_scale: image.image_id for image in images}
    if len(scales) > 1:
        raise ConfigError(
            "input.statistics: values of different types have no common limits: "
            + ", ".join(f"{image_id} reaches {scale:g}" for scale, image_id in scales.items())
            + "; use 'image'"
        )
    by_channel = zip(*(image.values for image in images), strict=True)
    return [
        _limits_of(np.concatenate(values), ends, wanted.normalization == "zscore")
        for values, ends in zip(by_channel, wanted.ends(1.0, 99.8), strict=True)
    ]


def _limits_of(values: Array, ends: tuple[float, float], has_moments: bool) -> Limits:
    """Find two percentiles of values, or their mean and deviation."""
    if not values.size:
        return Limits(0.0, 0.0)
    if has_moments:
        wide = values.astype(np.float64)
        return Limits(float(wide.mean()), float(wide.std()))
    ranks = [max(1, math.ceil(values.size * end / 100)) - 1 for end in ends]
    low, high = np.partition(values, ranks)[ranks].tolist()
    return Limits(low, high - low)
