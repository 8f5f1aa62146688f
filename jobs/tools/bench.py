"""``unet-jobs bench``: rates of a job on this machine, of its model, and of the device's matrix
product.

All figures are of the same images, in megapixels of input a second. Each stage is measured alone,
on one thread; the model with its batches in memory, on as many lanes as in a job; the job by the
timings of a run in this process, from its first read to its last commit. All is measured in turn
for some rounds, so that a busy machine slows all of it; figures are medians.
"""

import copy
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import torch

from jobs.backends import session
from jobs.job import Job, prepare
from jobs.tools.describe import count_flop
from jobs.tools.scratch import scratch_run
from unet_core.config.predict import PredictConfig
from unet_core.errors import ConfigError
from unet_core.images.decoder import DecodedImage, Decoder
from unet_core.images.sample import Sample
from unet_core.inference.engine import Engine, TileResult
from unet_core.inference.mask_assembler import MaskAssembler
from unet_core.inference.postprocessing import Postprocessing
from unet_core.inference.replica import Replica
from unet_core.inference.rows import Encoder
from unet_core.inference.tile_queue import TileQueue, TileRef, stack_tiles
from unet_core.inputs.formats import list_shards, read_shard
from unet_core.inputs.shards import Shard
from unet_core.runs.compute import Compute
from unet_core.runs.timings import Seconds, read_timings

ENOUGH_IMAGES = 64
"""Images after which no further shard is sampled: a run of some seconds on a laptop."""
MATRIX_SIDE = 2048
"""Side of the matrices: large enough to be bound by arithmetic, not by memory."""
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Bench:
    """Rates in megapixels a second unless another unit is said."""

    device: str
    lanes: int
    shards: int
    images: int
    megapixels: float
    matrix_gflop_per_s: float
    """Rate of multiplying large matrices in the model's precision."""
    gflop_per_megapixel: float
    """Operations of the network's convolutions, with the halos and padding of tiles."""
    model: float
    model_over_limit: float
    """Share of the limit that the model reaches; a median, like the next ones."""
    read: float
    decode: float
    encode: float
    write: float
    """Measured during the job."""
    job: float
    job_over_model: float
    """Share of the model's rate that the job reaches; at 1 the device never waits."""
    job_over_work: float
    """The same with decoding and encoding counted, which a CPU does beside the model."""
    images_per_s: float
    """Images a second of the job."""
    waited: dict[str, float]
    """Shares of the device's time during the job."""
    peak_memory_bytes: int

    @property
    def limit(self) -> float:
        """Rate of the model if its device did nothing but multiply."""
        return self.matrix_gflop_per_s / self.gflop_per_megapixel


def bench(config: PredictConfig, rounds: int = 5) -> Bench:
    """Measure with the first shards of an input; nothing of it is kept.

    Raises what ``predict`` raises, and ConfigError if no image of them can be segmented.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = config.output.model_copy(update={"uri": f"{scratch}/run"})
        job = prepare(config.model_copy(update={"output": output}))
        shards = _sample(job)
        replica = Replica(job.replica_spec(session.local_cpus(job.config.workers)))
        engine, compute = replica.engine, replica.probe()
        turns = [_round(job, shards, engine, compute) for _ in range(rounds)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Bench(
        device=compute.device,
        lanes=engine.lanes,
        shards=len(shards),
        waited=sum((spent for _, spent in turns), Seconds()).shares,
        peak_memory_bytes=peak if sys.platform == "darwin" else peak * 1024,
        **{name: statistics.median(turn[name] for turn, _ in turns) for name in turns[0][0]},
    )


def _sample(job: Job) -> list[Shard]:
    """Take shards until they have ``ENOUGH_IMAGES``."""
    taken, images = [], 0
    for shard in list_shards(job.source):
        taken.append(shard)
        images += shard.count or sum(1 for _ in read_shard(job.source, shard))
        if images >= ENOUGH_IMAGES:
            break
    return taken


def _round(
    job: Job, shards: list[Shard], engine: Engine, compute: Compute
) -> tuple[dict[str, Any], Seconds]:
    """Measure everything once, in turn; also return the seconds of the job by stage."""
    decoder = Decoder(job.header.preprocessing, job.header.classes, job.config.input)
    matrix_s = _matrix_s(engine)
    read_s, read = _timed(lambda: [list(map(_in_memory, read_shard(job.source, shard)))
                                   for shard in shards])  # fmt: skip
    decode_s, decoded = _timed(lambda: [list(chain.from_iterable(map(decoder.decode, samples)))
                                        for samples in read])  # fmt: skip
    shown = [[image for image in images if isinstance(image, DecodedImage)] for images in decoded]
    pieces = [
        group
        for decoded_images in shown
        for group in _pieces(job, engine.postprocessing, compute, decoded_images)
    ]
    if not pieces:
        raise ConfigError(f"no image of {job.config.input.uri} can be segmented; try predict")
    batches = list(map(stack_tiles, pieces))
    with ThreadPoolExecutor(engine.lanes) as pool:
        model_s, results = _timed(lambda: list(pool.map(engine.run, batches)))
    encode_s, _ = _timed(lambda: _encode(job, pieces, results))
    job_s, spent = _job_s(job, shards)
    decoded_images = list(chain(*shown))
    megapixels = sum(math.prod(decoded.pixels.shape) for decoded in decoded_images) / 1e6
    shapes = [batch.tiles_NCHW.shape for batch in batches]
    gflop = count_flop(copy.deepcopy(engine.network).to("meta"), shapes) / 1e9
    matrix_gflop = 2 * MATRIX_SIDE**3 * engine.lanes / 1e9
    return {
        "images": len(decoded_images),
        "megapixels": megapixels,
        "matrix_gflop_per_s": matrix_gflop / matrix_s,
        "gflop_per_megapixel": gflop / megapixels,
        "model": megapixels / model_s,
        "model_over_limit": gflop / model_s * matrix_s / matrix_gflop,
        "read": megapixels / read_s,
        "decode": megapixels / decode_s,
        "encode": megapixels / encode_s,
        "write": megapixels / spent.writing,
        "job": megapixels / job_s,
        "job_over_model": model_s / job_s,
        "job_over_work": (model_s + (decode_s + encode_s) / engine.lanes) / job_s,
        "images_per_s": len(decoded_images) / job_s,
    }, spent


def _timed(call: Callable[[], ResultT]) -> tuple[float, ResultT]:
    """Return the seconds of a call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _in_memory(sample: Sample) -> Sample:
    """Read the bytes of a sample and its truth."""
    if sample.failure is not None:
        return sample
    image, mask = sample.read(), sample.read_mask() if sample.read_mask is not None else None
    return replace(
        sample,
        read=lambda: image,
        read_mask=None if mask is None else lambda: mask,
        open=None,
        open_mask=None,
    )


def _pieces(
    job: Job, postprocessing: Postprocessing, compute: Compute, decoded_images: list[DecodedImage]
) -> list[list[TileRef]]:
    """Cut the images of a shard into batches of tiles."""
    queue = TileQueue(compute)
    assemblers = (
        MaskAssembler(n, decoded, job.tile_grid, postprocessing)
        for n, decoded in enumerate(decoded_images)
    )
    return [*chain.from_iterable(map(queue.add, assemblers)), *queue.rest()]


def _encode(job: Job, pieces: list[list[TileRef]], results: list[list[TileResult]]) -> None:
    encoder = Encoder(job.header.classes, job.config.output.encoding, job.config.input.ignore_index)
    for (assembler, tile), result in zip(chain(*pieces), chain(*results), strict=True):
        for window in assembler.paste(tile, result):
            encoder.window(assembler, window)


def _matrix_s(engine: Engine) -> float:
    """Seconds for one product of large matrices on each lane, a median."""
    square = torch.ones(MATRIX_SIDE, MATRIX_SIDE, device=engine.device, dtype=engine.dtype)

    def multiply(_: int) -> None:
        with torch.inference_mode():
            square @ square
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)

    with ThreadPoolExecutor(engine.lanes) as pool:
        spans = [_timed(lambda: list(pool.map(multiply, range(engine.lanes)))) for _ in range(5)]
    return statistics.median(seconds for seconds, _ in spans)


def _job_s(job: Job, shards: list[Shard]) -> tuple[float, Seconds]:
    """Time of the job from its first read to its last commit, without loading the model."""
    workers = job.config.workers.model_copy(update={"count": "inline"})
    with scratch_run(job, shards, workers) as run:
        timings = read_timings(run.store, len(shards))
    rows = [(row["finished"].timestamp(), row["whole_s"]) for row in timings.to_pylist()]
    began = min(finished - whole_s for finished, whole_s in rows)
    return max(finished for finished, _ in rows) - began, Seconds.of_table(timings)
