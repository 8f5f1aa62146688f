"""Segments one shard: read, decode, cut into tiles, segment, assemble, encode, commit two parts.

Reading, decoding and encoding run on threads beside the device; every attempt writes the same
bytes.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from operator import attrgetter

import numpy as np

from unet_core.concurrency import Prefetch
from unet_core.errors import ImageError, StoppedError
from unet_core.images.decoder import DecodedImage, Decoder, Rejected
from unet_core.images.sample import Sample
from unet_core.inference.engine import TileResult
from unet_core.inference.lanes import Lanes
from unet_core.inference.mask_assembler import MaskAssembler
from unet_core.inference.replica import Replica
from unet_core.inference.rows import Encoder, Row
from unet_core.inference.tile_queue import TileQueue, TileRef, stack_tiles
from unet_core.inputs.formats import read_shard
from unet_core.inputs.shards import Shard
from unet_core.metrics import Totals
from unet_core.runs.compute import RunSettings
from unet_core.runs.manifest import with_members
from unet_core.runs.parts import MasksPart, commit, compute_totals, metrics_name, metrics_part
from unet_core.runs.timings import ShardResult, Stopwatch
from unet_core.storage.spool import reports_full_disk
from unet_core.storage.store import Store
from unet_core.tiling.geometry import mask_windows

log = logging.getLogger(__name__)

DECODED_BYTES = 256 * 2**20
"""No further image is decoded while those that wait, encoded or decoded, hold more than this."""


DecodedFile = list[DecodedImage | Rejected]
"""The images of one file."""


class ShardSegmenter:
    """Segments shards with one replica. Two threads may call ``segment`` at once: while one has
    the device, the other already reads and decodes.
    """

    def __init__(
        self,
        replica: Replica,
        settings: RunSettings,
        on_image: Callable[[], None] = lambda: None,
    ) -> None:
        spec, config, header = replica.spec, replica.spec.config, replica.engine.header
        self.replica, self.engine, self.settings = replica, replica.engine, settings
        self.on_image = on_image
        self.output = Store(config.output.uri, config.storage)
        self.threads = max(2, spec.threads)
        self.decoder = Decoder(
            header.preprocessing, header.classes, spec.source.config, spec.statistics
        )
        self.encoder = Encoder(
            header.classes,
            config.output.encoding,
            config.input.ignore_index,
            has_moments=header.preprocessing.normalization in ("zscore", "standard"),
        )
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="codec")
        self.lanes = Lanes(self.engine)
        self._cancelled = threading.Event()
        self.steps: dict[str, int] = {}
        """Number of calls of ``step`` by shard under way; one that stays the same hangs."""

    def step(self, shard_id: str) -> None:
        """Count progress of a shard: rows of a large image read, an image decoded or encoded, a
        batch done. Raises StoppedError after ``cancel``.
        """
        if self._cancelled.is_set():
            raise StoppedError("stopped")
        self.steps[shard_id] = self.steps.get(shard_id, 0) + 1

    def cancel(self) -> None:
        """Make every shard under way raise StoppedError at its next step."""
        self._cancelled.set()

    @reports_full_disk()
    def segment(self, shard: Shard, poison: Mapping[int, ImageError] = {}) -> ShardResult:
        """Segment one shard and commit its parts. ``poison``: failures of samples that must not
        be decoded, by position in the shard; they become failed rows.

        Raises StoreError when storage or local temporary space fails, ShardError when the shard's
        file is not the one that was listed, CommitConflictError when another attempt wrote other
        bytes, WorkersError when the device has no memory for one tile, and StoppedError after
        ``cancel``; what is wrong with an image is a row, never an exception.
        """
        start, name = time.perf_counter(), shard.shard_id
        try:
            with self._attempt(partial(self.step, name)) as attempt:
                found = read_shard(self.replica.spec.source, with_members(self.output, shard))
                attempt.run(
                    replace(sample, failure=poison.get(number, sample.failure))
                    for number, sample in enumerate(_timed(found, attempt.stopwatch))
                )
                with attempt.stopwatch("writing"):
                    totals = attempt.commit(name)
            return ShardResult(name, totals, attempt.stopwatch.seconds, time.perf_counter() - start)
        finally:
            self.steps.pop(name, None)

    def dry_run(self, sample: Sample, on_step: Callable[[], None]) -> None:
        """Segment one image and discard its rows."""
        with self._attempt(on_step) as attempt:
            attempt.run(iter([sample]))

    @contextlib.contextmanager
    def _attempt(self, on_step: Callable[[], None]) -> Iterator["ShardAttempt"]:
        """Begin an attempt, with a place in the line for the device."""
        config = self.replica.spec.config.output
        part = MasksPart(config.encoding, self.settings.footer, config.probabilities != "none")
        with self.lanes.ticket() as stopwatch, contextlib.closing(part):
            yield ShardAttempt(self, part, stopwatch, on_step)


class ShardAttempt:
    """One attempt at a shard: what is under way, and the rows of both parts so far."""

    def __init__(
        self,
        segmenter: ShardSegmenter,
        part: MasksPart,
        stopwatch: Stopwatch,
        on_step: Callable[[], None],
    ) -> None:
        self._segmenter, self._part, self._on_step = segmenter, part, on_step
        self.stopwatch = stopwatch
        """Time by stage; also its ticket in the line for the device."""
        self._postprocessing = segmenter.engine.postprocessing
        self._queue = TileQueue(segmenter.settings.compute)
        self._ids: set[str] = set()
        self._seen = 0
        """Number of images so far, failed ones included."""
        self._batches: deque[tuple[list[TileRef], Future[list[TileResult]]]] = deque()
        """Batches on the device's lanes, in the order in which they were submitted."""
        self._image_rows: dict[int, Future[tuple[Row, Iterable[Row]]]] = {}
        """Rows of images that are not in the parts yet, by the number of the image."""
        self._rows: list[Row] = []
        """Rows of the metrics part, one for each image in order."""

    def run(self, samples: Iterator[Sample]) -> None:
        """Segment samples: afterwards the rows of both parts are complete."""
        segmenter = self._segmenter
        with Prefetch(
            segmenter.pool,
            self._decode,
            samples,
            2 * segmenter.threads + 2,
            _held_bytes,
            DECODED_BYTES,
            attrgetter("encoded_bytes"),
        ) as files:
            self._process_images(files)
            self._flush_rows(waits=True)
        assert len(self._rows) == self._seen, f"image {len(self._rows)} is missing"

    def commit(self, shard_id: str) -> Totals:
        """Publish both parts; returns the totals of the commit that counts."""
        output = self._segmenter.output
        masks, sha256, size = self._part.finish()
        footer = {
            **self._segmenter.settings.footer,
            "images_seen": str(self._seen),
            "masks_sha256": sha256,
            "masks_bytes": str(size),
        }
        committed = commit(output, shard_id, masks, metrics_part(self._rows, footer))
        totals = compute_totals(committed, output.uri(metrics_name(shard_id)))
        log.info("committed shard=%s images=%d failed=%d",
                 shard_id, self._seen, totals.failed)  # fmt: skip
        return totals

    def _decode(self, sample: Sample) -> DecodedFile:
        """Read and decode a file; samples of containers bring their bytes along."""
        with self.stopwatch("decoding"):
            reading = self.stopwatch("reading", inside="decoding")
            read_mask = sample.read_mask and reading(sample.read_mask)
            sample = replace(sample, read=reading(sample.read), read_mask=read_mask)
            return self._segmenter.decoder.decode(sample, self._on_step)

    def _process_images(self, files: Iterable[DecodedFile]) -> None:
        """Run every batch. Images are counted in the order of the shard, failed ones too. The next
        shard gets the device when the last batch of this one is under way.
        """
        tile_grid = self._segmenter.replica.tile_grid
        with self._segmenter.lanes.taken(self.stopwatch):
            for file in files:
                self._on_step()
                for found in file:
                    image, index = self._reject_invalid(found), self._seen
                    self._seen += 1
                    if isinstance(image, Rejected):
                        self._submit_rows(index, image)
                    else:
                        assembler = MaskAssembler(index, image, tile_grid, self._postprocessing)
                        self._submit_batches(self._queue.add(assembler))
            self._submit_batches(self._queue.rest())
        self._collect_batches(0)

    def _reject_invalid(self, image: DecodedImage | Rejected) -> DecodedImage | Rejected:
        """The image, or its rejection if the shard has an earlier one with its id, or if a row
        cannot hold the probabilities of a mask window.
        """
        if image.sample.image_id in self._ids:
            return Rejected(
                image.sample,
                ImageError("duplicate_id", "the shard has an earlier image of this id"),
            )
        self._ids.add(image.sample.image_id)
        if isinstance(image, Rejected) or self._postprocessing.probabilities == "none":
            return image
        box = mask_windows(*image.pixels.shape)[0]
        values = self._postprocessing.logits * box.height * box.width
        if values * np.dtype(self._postprocessing.probabilities).itemsize < 2**31:
            return image  # it fits a binary value of Arrow
        reason = f"{values} probabilities are too many for a row; keep fewer, or cut the image"
        return Rejected(image.sample, ImageError("too_large", reason))

    def _submit_batches(self, batches: Iterable[list[TileRef]]) -> None:
        segmenter = self._segmenter
        for tiles in batches:
            batch = segmenter.pool.submit(stack_tiles, tiles)
            self._batches.append((tiles, segmenter.lanes.submit(batch, self.stopwatch)))
            self._collect_batches(segmenter.engine.lanes + 1)

    def _collect_batches(self, keep: int) -> None:
        """Paste finished batches into their masks; wait until at most ``keep`` are under way."""
        encode = self.stopwatch("encoding")(self._segmenter.encoder.window)
        while self._batches and (len(self._batches) > keep or self._batches[0][1].done()):
            tiles, future = self._batches.popleft()
            results = future.result()
            self._on_step()
            for (assembler, tile), result in zip(tiles, results, strict=True):
                for window in assembler.paste(tile, result):
                    rows = self._segmenter.pool.submit(encode, assembler, window)
                    assembler.encoded.append(rows)
                if assembler.is_complete:
                    self._submit_rows(assembler.index, assembler)

    def _submit_rows(self, index: int, image: MaskAssembler | Rejected) -> None:
        rows = self._segmenter.pool.submit(self._segmenter.encoder.image, image)
        self._image_rows[index] = rows
        self._flush_rows()

    def _flush_rows(self, waits: bool = False) -> None:
        """Add the rows of images to the parts, in order and as far as they are encoded."""
        while (image := self._image_rows.get(len(self._rows))) and (waits or image.done()):
            row, mask_rows = self._image_rows.pop(len(self._rows)).result()
            self._on_step()
            self._rows.append(row)
            for mask_row in mask_rows:
                self._part.add(mask_row)
            self._segmenter.on_image()


def _timed(samples: Iterator[Sample], stopwatch: Stopwatch) -> Iterator[Sample]:
    """Measure the time that the reader takes for each sample."""
    while True:
        with stopwatch("reading"):
            sample = next(samples, None)
        if sample is None:
            return
        yield sample


def _held_bytes(file: DecodedFile) -> int:
    """Memory that the pixels and the truth of a file take."""
    return sum(image.held_bytes for image in file if isinstance(image, DecodedImage))
