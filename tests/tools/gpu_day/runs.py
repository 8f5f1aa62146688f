"""Sections on whole jobs: predictions, trainings, and several actors on one device."""

import functools
import hashlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from jobs.backends import session
from jobs.job import prepare
from jobs.predict import predict
from jobs.tools.bench import bench
from tests.benchmarks.bare_training import bare, ours
from tests.tools.gpu_day.day import Measurement, Setup
from tests.tools.gpu_day.pieces import checkpoint_of, images_of
from unet_core.config.loading import build
from unet_core.config.predict import PredictConfig
from unet_core.config.train import TrainConfig
from unet_core.inference.engine import Batch, Engine, TileResult
from unet_core.inference.isolation import Isolation
from unet_core.inference.replica import Replica
from unet_core.inference.shard_segmenter import ShardSegmenter
from unet_core.inputs.formats import list_shards, open_source
from unet_core.runs.compute import RunSettings


def config_of(setup: Setup, images: Path, model: str, *overrides: str) -> PredictConfig:
    """A job in this process, into a folder of its own."""
    table = {
        "input": {"uri": str(images / "images")},
        "model": {"checkpoint": model, "device": setup.device_name},
        "output": {"uri": f"{tempfile.mkdtemp(dir=setup.scratch)}/run", "report": False},
        "storage": {"shared": True},
        "workers": {"count": "inline"},
    }
    side = () if setup.is_tiny else ("tile.size=512",)
    return build(PredictConfig, table, [*side, *overrides])


def segmented(config: PredictConfig) -> dict[str, Any]:
    """Speed of a whole job, and a digest of its masks; raises AssertionError for failed images."""
    wall, cpu = time.perf_counter(), time.process_time()
    totals = predict(config).totals
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    parts = sorted((Path(config.output.uri) / "masks").glob("*.parquet"))
    assert not totals.failed, f"{totals.failed} of {totals.images_seen} images failed"
    return {
        "images/s": totals.images_seen / wall,
        "ms of this process an image": cpu / totals.images_seen * 1e3,
        "masks": hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:16],
    }


def _empty(engine: Engine, batch: Batch) -> list[TileResult]:
    """What a network that takes no time gives."""
    ids_HW = np.zeros(batch.tiles_NCHW.shape[2:], np.uint8)
    margin = engine.header.tiling.margin
    return [TileResult(ids_HW[tile.kept(margin)], 1, is_finite=True) for tile in batch.keep]


def host(setup: Setup) -> Iterator[Measurement]:
    """Jobs with the network's work left out: what the cores can do alone."""
    kinds = (("png", 1), ("jpg", 1), ("png", 3), ("jpg", 3), ("tif", 1))
    cores = sorted({min(cores, setup.cores) for cores in (1, 4, 8, 16)})
    for kind, channels in kinds[:2] if setup.is_tiny else kinds:
        for count in cores[-1:] if setup.is_tiny else cores:
            call = functools.partial(_host, setup, kind, channels, count)
            yield f"{kind}, {channels} channels, {count} cores", call


def _host(setup: Setup, kind: str, channels: int, cores: int) -> dict[str, Any]:
    images = images_of(setup, *((4, 64) if setup.is_tiny else (1024, 512)), kind, channels)
    model = checkpoint_of(setup, 2 if setup.is_tiny else 8, channels)
    config = config_of(setup, images, model, f"workers.cpus={cores}", "input.shard_images=128")
    with mock.patch.object(Engine, "_segment", _empty):
        return segmented(config)


def isolation(setup: Setup) -> Iterator[Measurement]:
    """The child that tries images alone, with its memory limited beside the device."""
    yield "poison among sound images", functools.partial(_isolation, setup)


def _isolation(setup: Setup) -> int:
    images = images_of(setup, 4, 64, "png", 1)
    model = checkpoint_of(setup, 2, 1)
    config = config_of(setup, images, model)
    source = open_source(config.input)
    replica = Replica(prepare(config).replica_spec(1))
    segmenter = ShardSegmenter(replica, RunSettings(replica.probe(), {}))
    shard = next(iter(list_shards(source)))
    found = Isolation(replica.spec, segmenter.settings, shard, image_timeout_s=60.0).find_poison()
    assert not found, {place: str(failure) for place, failure in found.items()}
    return len(found)


def job(setup: Setup) -> Iterator[Measurement]:
    """The project's own benchmark, and the job itself."""
    models = ((64, "bfloat16"), (64, "float32"), (16, "bfloat16"), (8, "bfloat16"))
    for width, precision in ((2, "float32"),) if setup.is_tiny else models:
        yield f"bench width {width} {precision}", functools.partial(_bench, setup, width, precision)
        yield f"job width {width} {precision}", functools.partial(_job, setup, width, precision)


def _images(setup: Setup) -> Path:
    return images_of(setup, *((4, 64) if setup.is_tiny else (1024, 512)), "png", 1)


def _bench(setup: Setup, width: int, precision: str) -> dict[str, Any]:
    config = config_of(
        setup, _images(setup), checkpoint_of(setup, width, 1), f"model.precision={precision}",
        "input.shard_images=256",
    )  # fmt: skip
    return asdict(bench(config, rounds=1 if setup.is_tiny else 3))


def _job(setup: Setup, width: int, precision: str) -> dict[str, Any]:
    model = checkpoint_of(setup, width, 1)
    return segmented(config_of(setup, _images(setup), model, f"model.precision={precision}"))


def train(setup: Setup) -> Iterator[Measurement]:
    """Steps of a training beside those of a bare loop."""
    cases = (
        (64, 512, False),
        (64, 512, True),
        (16, 512, False),
        (8, 224, False),
    )
    for width, crop, compiles in ((2, 32, False),) if setup.is_tiny else cases:
        name = f"width {width} crop {crop}{' compiled' if compiles else ''}"
        yield name, functools.partial(_train, setup, width, crop, compiles)


def _train(setup: Setup, width: int, crop: int, compiles: bool) -> dict[str, float]:
    data = images_of(setup, *((4, 64) if setup.is_tiny else (96, 1024)), "png", 1)
    table = {
        "data": {"train": {"uri": str(data / "images"), "masks": f"{data}/masks/"}},
        "model": {"width": width, "device": setup.device_name},
        "train": {"epochs": 3, "crop": crop, "batch": 2 if setup.is_tiny else 8,
                  "compile": compiles},
        "output": {"uri": f"{tempfile.mkdtemp(dir=setup.scratch)}/model", "report": False},
    }  # fmt: skip
    config = build(TrainConfig, table, [])
    alone_s = bare(config)(3 if setup.is_tiny else 15)
    ours_s = min(seconds for _, seconds in list(ours(config))[1:])
    return {
        "bare ms": alone_s * 1e3,
        "training ms": ours_s * 1e3,
        "ratio": alone_s / ours_s,
        "crops/s": config.train.batch / ours_s,
    }


def ray(setup: Setup) -> Iterator[Measurement]:
    """The same masks from one, two and four actors on one device."""
    for count in (1,) if setup.is_tiny else (1, 2, 4):
        yield f"{count} actors", functools.partial(_actors, setup, count)


@functools.cache
def _inline(setup: Setup) -> str:
    """The masks of a job in this process."""
    return segmented(_of_actors(setup, "workers.count=inline"))["masks"]


def _of_actors(setup: Setup, *overrides: str) -> PredictConfig:
    images = images_of(setup, *((4, 64) if setup.is_tiny else (512, 512)), "png", 1)
    model = checkpoint_of(setup, 2 if setup.is_tiny else 16, 1)
    precision = "float32" if setup.is_tiny else "bfloat16"
    shards = f"input.shard_images={2 if setup.is_tiny else 64}"
    return config_of(setup, images, model, f"model.precision={precision}", shards, *overrides)


def _actors(setup: Setup, count: int) -> dict[str, Any]:
    gpus = 1 / count if setup.is_cuda else 0
    cores = max(1, setup.cores // count - 1)
    workers = (f"workers.count={count}", f"workers.gpus={gpus:g}", f"workers.cpus={cores}")
    with session.connected(shows_logs=False):
        found = segmented(_of_actors(setup, *workers))
    return found | {"same masks": found["masks"] == _inline(setup)}
