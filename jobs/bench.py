"""``unet-jobs bench``: how near a job on this machine comes to its model, and the model to what the
device can multiply.

All figures are of the same images, in megapixels of input a second. Each stage is measured alone,
on one thread; the model with its batches in memory, on as many lanes as in a job; the job as
``predict`` does it in one process, from its first read to its last commit. All is measured in
turn, some rounds of it, so that a busy machine slows all of it; figures are medians.
"""

import contextlib
import copy
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from jobs import session
from jobs.board import Board
from jobs.dispatch import dispatch
from jobs.inline import InlineWorkers
from jobs.job import Job, prepare
from unet_core.canvas import Canvas, Look
from unet_core.compute import Compute
from unet_core.config import PredictConfig
from unet_core.engine import Batch, Engine, Segmented
from unet_core.errors import ConfigError
from unet_core.images.picture import Decoder, Picture
from unet_core.inputs.formats import list_shards, read_shard
from unet_core.inputs.shards import Sample, Shard
from unet_core.manifest import draft
from unet_core.replica import Replica
from unet_core.rows import Encoder
from unet_core.tiling import Piece, TileQueue, stack
from unet_core.timings import Seconds, ShardResult

ENOUGH_IMAGES = 64
"""Shards are taken until the sample has so many."""
MATRIX_SIDE = 2048
ROUNDS = 5


@dataclass(frozen=True)
class Bench:
    """Rates in megapixels a second unless another unit is said."""

    device: str
    lanes: int
    shards: int
    images: int
    megapixels: float
    matrix_gflop_per_s: float
    """Of multiplying large matrices in the model's precision."""
    gflop_per_megapixel: float
    """Of the network's convolutions, tiles' halos and padding included."""
    model: float
    model_over_limit: float
    """1 would be a device that does nothing but multiply; as the next one, median of the rounds."""
    read: float
    decode: float
    encode: float
    write: float
    """As it went during the job."""
    job: float
    job_over_model: float
    """1 would be a device that never waits."""
    job_over_work: float
    """1 would be lanes that never wait, where a CPU decodes and encodes beside the model."""
    images_per_s: float
    """Of the job."""
    waited: dict[str, float]
    """What the device did during the job, as shares."""
    peak_memory_bytes: int

    @property
    def limit(self) -> float:
        """What the model could do if its device did nothing but multiply."""
        return self.matrix_gflop_per_s / self.gflop_per_megapixel


def bench(config: PredictConfig, rounds: int = ROUNDS) -> Bench:
    """Measure with the first shards of an input; nothing of it is kept.

    Raises what ``predict`` raises, and ConfigError if no image of them can be segmented.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = config.output.model_copy(update={"uri": f"{scratch}/run"})
        job = prepare(config.model_copy(update={"output": output}))
        with draft(list_shards(job.source)) as found:
            job.source.listing.clear()
            shards = _sample(job, [found.with_members(head) if head.has_members else head
                                   for head in found.heads])  # fmt: skip
        return _measured(job, shards, rounds)


def _sample(job: Job, shards: list[Shard]) -> list[Shard]:
    taken, images = [], 0
    for shard in shards:
        if images >= ENOUGH_IMAGES:
            break
        taken.append(shard)
        images += shard.count if shard.count is not None else _count(job, shard)
    return taken


def _count(job: Job, shard: Shard) -> int:
    return sum(1 for _ in read_shard(job.source, shard))


@dataclass(frozen=True)
class Round:
    """Seconds of all that is compared, one after the other."""

    matrix_s: float
    """For a large matrix on each lane."""
    read_s: float
    decode_s: float
    model_s: float
    encode_s: float
    job_s: float

    def work_s(self, lanes: int) -> float:
        """What decoding, the model and encoding would take with no lane ever idle."""
        return self.model_s + (self.decode_s + self.encode_s) / lanes


def _measured(job: Job, shards: list[Shard], rounds: int) -> Bench:
    replica = Replica(job.replica(session.local_cpus(job.config.workers)))
    engine, compute = replica.engine, replica.probe()
    turns, spent = [], Seconds()
    for _ in range(rounds):
        matrix_s = _matrix_s(engine)
        stages = _Stages(job, engine, compute)
        for shard in shards:
            stages.take(shard)
        if not stages.batches:
            raise ConfigError(f"no image of {job.config.input.uri} can be segmented; try predict")
        model_s, results = _model(engine, stages.batches)
        stages.encode(results)
        job_s, seconds = _job_s(job, shards)
        turns.append(
            Round(matrix_s, stages.read_s, stages.decode_s, model_s, stages.encode_s, job_s)
        )
        spent += seconds
    lanes, megapixels = engine.lanes, stages.pixels / 1e6
    gflop = sum(_gflop(engine, batch) for batch in stages.batches)
    matrix_gflop = 2 * MATRIX_SIDE**3 * lanes / 1e9

    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, turns))

    return Bench(
        device=compute.device,
        lanes=lanes,
        shards=len(shards),
        images=stages.images,
        megapixels=megapixels,
        matrix_gflop_per_s=matrix_gflop / median(lambda turn: turn.matrix_s),
        gflop_per_megapixel=gflop / megapixels,
        model=megapixels / median(lambda turn: turn.model_s),
        model_over_limit=median(lambda turn: gflop / turn.model_s * turn.matrix_s / matrix_gflop),
        read=megapixels / median(lambda turn: turn.read_s),
        decode=megapixels / median(lambda turn: turn.decode_s),
        encode=megapixels / median(lambda turn: turn.encode_s),
        write=rounds * megapixels / spent.writing,
        job=megapixels / median(lambda turn: turn.job_s),
        job_over_model=median(lambda turn: turn.model_s / turn.job_s),
        job_over_work=median(lambda turn: turn.work_s(lanes) / turn.job_s),
        images_per_s=stages.images / median(lambda turn: turn.job_s),
        waited=spent.shares,
        peak_memory_bytes=_peak_bytes(),
    )


class _Stages:
    """Reading, decoding and encoding of the sample, one after the other on this thread."""

    def __init__(self, job: Job, engine: Engine, compute: Compute) -> None:
        self._job, self._compute = job, compute
        header, config = job.header, job.config
        self._decoder = Decoder(header.preprocessing, header.classes, config.input)
        self._encoder = Encoder(header.classes, config.output.encoding, config.input.ignore_index)
        self._look = Look(header.network.classes, engine.threshold, engine.probabilities_kept)
        self.read_s = self.decode_s = self.encode_s = 1e-9
        self.images = self.pixels = 0
        self._pieces: list[list[Piece]] = []
        self.batches: list[Batch] = []

    def take(self, shard: Shard) -> None:
        """Read and decode a shard, and keep its batches."""
        queue = TileQueue(self._compute)
        for sample in self._read(shard):
            start = time.perf_counter()
            images = self._decoder.decode(sample)
            self.decode_s += time.perf_counter() - start
            for picture in images:
                if isinstance(picture, Picture):
                    canvas = Canvas(self.images, picture, self._job.windows, self._look)
                    self.images += 1
                    self.pixels += picture.pixels.height * picture.pixels.width
                    self._keep(queue.add(canvas))
        self._keep(queue.rest())

    def _read(self, shard: Shard) -> Iterator[Sample]:
        samples = iter(read_shard(self._job.source, shard))
        while True:
            start = time.perf_counter()
            sample = next(samples, None)
            if sample is None:
                return
            if sample.failure is None:
                sample = _in_memory(sample)
            self.read_s += time.perf_counter() - start
            yield sample

    def _keep(self, due: Iterator[list[Piece]]) -> None:
        for pieces in due:
            self._pieces.append(pieces)
            self.batches.append(stack(pieces))

    def encode(self, results: list[list[Segmented]]) -> None:
        """Put masks together and encode them."""
        start = time.perf_counter()
        for pieces, batch in zip(self._pieces, results, strict=True):
            for (canvas, tile), result in zip(pieces, batch, strict=True):
                for area in canvas.paste(tile, result):
                    self._encoder.area(canvas, area)
        self.encode_s += time.perf_counter() - start


def _in_memory(sample: Sample) -> Sample:
    """The sample with its bytes, and its truth's."""
    mask = partial(_given, sample.read_mask()) if sample.read_mask is not None else None
    read = partial(_given, sample.read())
    return replace(sample, read=read, read_mask=mask, open=None, open_mask=None)


def _given(data: bytes) -> bytes:
    return data


def _model(engine: Engine, batches: list[Batch]) -> tuple[float, list[list[Segmented]]]:
    """Seconds for all batches once, and what they gave."""
    with ThreadPoolExecutor(engine.lanes) as lanes:
        start = time.perf_counter()
        results = list(lanes.map(engine.run, batches))
        return time.perf_counter() - start, results


def _matrix_s(engine: Engine) -> float:
    """Seconds for one product of large matrices on each lane, the median of some."""
    square = torch.ones(MATRIX_SIDE, MATRIX_SIDE, device=engine.device, dtype=engine.dtype)

    def multiply(_: int) -> None:
        with torch.inference_mode():
            square @ square

    def once() -> float:
        start = time.perf_counter()
        list(lanes.map(multiply, range(engine.lanes)))
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return time.perf_counter() - start

    with ThreadPoolExecutor(engine.lanes) as lanes:
        return statistics.median(once() for _ in range(5))


def _gflop(engine: Engine, batch: Batch) -> float:
    """Of one pass of a batch, two for each multiply-add."""
    network = copy.deepcopy(engine.network).to("meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(batch.tiles_NCHW.shape, device="meta", dtype=engine.dtype))
    return counter.get_total_flops() / 1e9


def _job_s(job: Job, shards: list[Shard]) -> tuple[float, Seconds]:
    """The job from its first read to its last commit, the model being loaded; not kept."""
    seconds: list[Seconds] = []

    def on_done(result: ShardResult, *_: object) -> None:
        seconds.append(result.seconds)

    with contextlib.closing(
        InlineWorkers(job.replica(session.local_cpus(job.config.workers)), lambda: None)
    ) as workers:
        record = job.record(workers.probe())
        with draft(iter(shards)) as found:
            job.run.publish_manifest(found)
            workers.configure(record.compute, job.footer(record))
            board = Board.of(found.heads, job.config.errors)
            start = time.perf_counter()
            dispatch(board, workers, on_done)
            took_s = time.perf_counter() - start
    job.run.store.remove_all()
    return took_s, sum(seconds, Seconds())


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
