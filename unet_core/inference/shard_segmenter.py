"""Segments one shard: read, decode, cut into tiles, segment, stitch, encode, and commit two parts.

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
from dataclasses import dataclass, field, replace
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


@dataclass
class _ShardState:
    """One attempt at a shard: the work under way and the rows so far."""

    part: MasksPart
    queue: TileQueue
    stopwatch: Stopwatch
    """Stopwatch of the attempt, and its ticket in the line for the device."""
    on_step: Callable[[], None]
    ids: set[str] = field(default_factory=set)
    pending: deque[tuple[list[TileRef], Future[list[TileResult]]]] = field(default_factory=deque)
    """Batches on the device's lanes, in the order in which they were submitted."""
    encoded: dict[int, Future[tuple[Row, Iterable[Row]]]] = field(default_factory=dict)
    """Rows of images that are not in the parts yet, by the number of the image."""
    seen: int = 0
    """Number of images so far, failed ones included."""
    rows: list[Row] = field(default_factory=list)
    """Rows of the metrics part, one for each image in order."""


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
        self.replica, self.engine, self._on_image = replica, replica.engine, on_image
        self.settings = settings
        self.output = Store(config.output.uri, config.storage)
        self._encoding, self._threads = config.output.encoding, max(2, spec.threads)
        self._decoder = Decoder(header.preprocessing, header.classes, spec.source.config)
        self._encoder = Encoder(header.classes, self._encoding, config.input.ignore_index)
        self._postprocessing = self.engine.postprocessing
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="codec")
        self._lanes = Lanes(self.engine)
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
        bytes and StoppedError after ``cancel``; what is wrong with an image is a row, never an
        exception.
        """
        start, name = time.perf_counter(), shard.shard_id
        try:
            with self._lanes.ticket() as stopwatch:
                found = read_shard(self.replica.spec.source, with_members(self.output, shard))
                samples = (
                    replace(sample, failure=poison.get(number, sample.failure))
                    for number, sample in enumerate(_timed(found, stopwatch))
                )
                segmented = self._segment_samples(samples, stopwatch, partial(self.step, name))
                with segmented as state, stopwatch("writing"):
                    totals = self._commit(state, shard)
            return ShardResult(name, totals, stopwatch.seconds, time.perf_counter() - start)
        finally:
            self.steps.pop(name, None)

    def dry_run(self, sample: Sample, on_step: Callable[[], None]) -> None:
        """Segment one image and discard its rows."""
        with (
            self._lanes.ticket() as stopwatch,
            self._segment_samples(iter([sample]), stopwatch, on_step),
        ):
            pass

    @contextlib.contextmanager
    def _segment_samples(
        self, samples: Iterator[Sample], stopwatch: Stopwatch, on_step: Callable[[], None]
    ) -> Iterator[_ShardState]:
        """Segment samples; yields the state with its masks part and its rows complete."""
        part = MasksPart(
            self._encoding, self.settings.footer, self._postprocessing.probabilities != "none"
        )
        with contextlib.closing(part):
            state = _ShardState(part, TileQueue(self.settings.compute), stopwatch, on_step)
            with Prefetch(
                self._pool,
                partial(self._decode, state),
                samples,
                2 * self._threads + 2,
                _held_bytes,
                DECODED_BYTES,
                attrgetter("encoded_bytes"),
            ) as images:
                self._process_images(state, images)
                self._flush_rows(state, waits=True)
                assert len(state.rows) == state.seen, f"image {len(state.rows)} is missing"
            yield state

    def _decode(self, state: _ShardState, sample: Sample) -> DecodedFile:
        """Read and decode a file; samples of containers bring their bytes along."""
        with state.stopwatch("decoding"):
            reading = state.stopwatch("reading", inside="decoding")
            read_mask = sample.read_mask and reading(sample.read_mask)
            sample = replace(sample, read=reading(sample.read), read_mask=read_mask)
            return self._decoder.decode(sample, state.on_step)

    def _process_images(self, state: _ShardState, files: Iterable[DecodedFile]) -> None:
        """Run every batch. Images are counted in the order of the shard, failed ones too. The next
        shard gets the device when the last batch of this one is under way.
        """
        with self._lanes.taken(state.stopwatch):
            for file in files:
                state.on_step()
                for found in file:
                    image, index = self._reject_invalid(found, state.ids), state.seen
                    state.seen += 1
                    if isinstance(image, Rejected):
                        self._submit_rows(state, index, image)
                    else:
                        assembler = MaskAssembler(
                            index, image, self.replica.tile_grid, self._postprocessing
                        )
                        self._submit_batches(state, state.queue.add(assembler))
            self._submit_batches(state, state.queue.rest())
        self._collect_batches(state, 0)

    def _reject_invalid(
        self, image: DecodedImage | Rejected, ids: set[str]
    ) -> DecodedImage | Rejected:
        """The image, or its rejection if the shard has an earlier one with its id, or if a row
        cannot hold the probabilities of a mask window.
        """
        if image.sample.image_id in ids:
            return Rejected(
                image.sample,
                ImageError("duplicate_id", "the shard has an earlier image of this id"),
            )
        ids.add(image.sample.image_id)
        if isinstance(image, Rejected) or self._postprocessing.probabilities == "none":
            return image
        box = mask_windows(*image.pixels.shape)[0]
        values = self._postprocessing.logits * box.height * box.width
        if values * np.dtype(self._postprocessing.probabilities).itemsize < 2**31:
            return image  # it fits a binary value of Arrow
        reason = f"{values} probabilities are too many for a row; keep fewer, or cut the image"
        return Rejected(image.sample, ImageError("too_large", reason))

    def _submit_batches(self, state: _ShardState, batches: Iterable[list[TileRef]]) -> None:
        for pieces in batches:
            batch = self._pool.submit(stack_tiles, pieces)
            state.pending.append((pieces, self._lanes.submit(batch, state.stopwatch)))
            self._collect_batches(state, self.engine.lanes + 1)

    def _collect_batches(self, state: _ShardState, keep: int) -> None:
        """Paste finished batches into their masks; wait until at most ``keep`` are under way."""
        pending, encode = state.pending, state.stopwatch("encoding")(self._encoder.window)
        while pending and (len(pending) > keep or pending[0][1].done()):
            pieces, future = pending.popleft()
            results = future.result()
            state.on_step()
            for (assembler, tile), result in zip(pieces, results, strict=True):
                for window in assembler.paste(tile, result):
                    assembler.encoded.append(self._pool.submit(encode, assembler, window))
                if assembler.is_complete:
                    self._submit_rows(state, assembler.index, assembler)

    def _submit_rows(self, state: _ShardState, index: int, image: MaskAssembler | Rejected) -> None:
        state.encoded[index] = self._pool.submit(self._encoder.image, image)
        self._flush_rows(state)

    def _flush_rows(self, state: _ShardState, waits: bool = False) -> None:
        """Add the rows of images to the parts, in order and as far as they are encoded."""
        while (image := state.encoded.get(len(state.rows))) and (waits or image.done()):
            row, mask_rows = state.encoded.pop(len(state.rows)).result()
            state.on_step()
            state.rows.append(row)
            for mask_row in mask_rows:
                state.part.add(mask_row)
            self._on_image()

    def _commit(self, state: _ShardState, shard: Shard) -> Totals:
        masks, sha256, size = state.part.finish()
        footer = {
            **self.settings.footer,
            "images_seen": str(state.seen),
            "masks_sha256": sha256,
            "masks_bytes": str(size),
        }
        committed = commit(self.output, shard.shard_id, masks, metrics_part(state.rows, footer))
        totals = compute_totals(committed, self.output.uri(metrics_name(shard.shard_id)))
        log.info("committed shard=%s images=%d failed=%d",
                 shard.shard_id, state.seen, totals.failed)  # fmt: skip
        return totals


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
