"""The story of one shard: read, decode, cut, segment, stitch, encode, and commit two parts.

Reading, decoding and encoding run on threads beside the device; every attempt writes the same
bytes.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unet_core.arrays import Array
from unet_core.codec import encode_mask
from unet_core.compute import Compute
from unet_core.engine import Engine, Segmented
from unet_core.errors import ImageError, StoppedError
from unet_core.geometry import mask_windows
from unet_core.inputs import read_shard
from unet_core.metrics import confusion, scores_of
from unet_core.ordered import InOrder, Prefetch
from unet_core.parts import MasksPart, commit, metrics_part, read_totals
from unet_core.picture import Picture, Rejected, decode
from unet_core.schema import MAX_CONFUSION_CLASSES
from unet_core.shards import Sample, Shard, Source
from unet_core.store import Store
from unet_core.tiling import Canvas, Piece, TileQueue, stack
from unet_core.timings import Seconds, ShardResult

log = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is fixed for a run and the same on every actor."""

    source: Source
    output: Store
    compute: Compute
    footer: dict[str, str]
    tile_size: int
    encoding: str
    threads: int = 2
    """For decoding and encoding."""
    on_image: Callable[[], None] = field(default=lambda: None)
    """Called after each image, for progress."""


@dataclass(frozen=True)
class Decoded:
    """What a decoding thread hands over."""

    images: list[Picture | Rejected]
    decode_s: float


@dataclass(frozen=True)
class Encoded:
    """One image's rows, ready to be written."""

    metrics: Row
    masks: list[Row]
    encode_s: float


class Segmenter:
    """Segments shards with one engine. Two threads may call ``segment`` at once: while one has
    the device, the other already reads and decodes.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="codec")
        self._lanes = ThreadPoolExecutor(engine.lanes, thread_name_prefix="device")
        self._device = threading.Lock()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Let every shard under way raise StoppedError before its next image."""
        self._cancelled.set()

    def segment(self, shard: Shard) -> ShardResult:
        """Segment one shard and commit its parts.

        Raises StoreError when storage fails, CommitConflictError when another attempt wrote other
        bytes and StoppedError after ``cancel``; what is wrong with an image is a row, never an
        exception.
        """
        part = MasksPart(self.settings.encoding, self.settings.footer)
        seconds = Seconds()
        rows: list[Row] = []
        encoded: InOrder[Encoded] = InOrder()
        ahead = 2 * self.settings.threads + 2
        try:
            with Prefetch(
                self._pool, self._decode, read_shard(self.settings.source, shard), ahead
            ) as images:
                for index, future in self._compute(images, encoded, seconds):
                    encoded.add(index, future)
                    self._append(encoded.ready(), rows, part, seconds)
                self._append(encoded.rest(), rows, part, seconds)
                return self._commit(shard, rows, part, encoded.numbers, seconds)
        finally:
            part.close()

    def _decode(self, sample: Sample) -> Decoded:
        start = time.perf_counter()
        header = self.engine.header
        images = decode(sample, header.preprocessing, header.classes, self.settings.source.config)
        return Decoded(images, time.perf_counter() - start)

    def _compute(
        self, images: Iterable[Decoded], encoded: InOrder[Encoded], seconds: Seconds
    ) -> Iterator[tuple[int, Future[Encoded]]]:
        """Run every batch; yield each image's number and its rows to come once it is complete.

        Images are numbered, and so counted, as they come from the reader, before anything can
        happen to them. The next shard gets the device when the last batch of this one is under way.
        """
        queue, running = TileQueue(self.settings.compute), _Running()
        ids: set[str] = set()
        with self._device:
            for decoded in running.timed(images, seconds, self.engine.lanes):
                if self._cancelled.is_set():
                    raise StoppedError("stopped")
                seconds.decoding += decoded.decode_s
                for decoded_image in decoded.images:
                    image, index = _unless_seen(decoded_image, ids), encoded.number()
                    if isinstance(image, Rejected):
                        yield index, self._pool.submit(self._encode_rejected, image)
                        continue
                    canvas = Canvas(index, image, self.engine.header, self.settings.tile_size)
                    for pieces in queue.add(canvas):
                        running.add(pieces, self._lanes.submit(self._run, pieces))
                        yield from self._paste(running.finished(self.engine.lanes + 1), seconds)
            for pieces in queue.rest():
                running.add(pieces, self._lanes.submit(self._run, pieces))
                yield from self._paste(running.finished(self.engine.lanes + 1), seconds)
        yield from self._paste(running.finished(0), seconds)

    def _run(self, pieces: list[Piece]) -> tuple[list[Segmented], float]:
        start = time.perf_counter()
        return self.engine.run(stack(pieces)), time.perf_counter() - start

    def _paste(
        self, finished: Iterator[tuple[list[Piece], list[Segmented], float]], seconds: Seconds
    ) -> Iterator[tuple[int, Future[Encoded]]]:
        for pieces, results, device_s in finished:
            seconds.device += device_s
            for (canvas, tile), result in zip(pieces, results, strict=True):
                canvas.paste(tile, result)
                if canvas.is_complete:
                    yield canvas.index, self._pool.submit(self._encode, canvas)

    def _encode(self, canvas: Canvas) -> Encoded:
        start = time.perf_counter()
        picture = canvas.picture
        if not canvas.is_finite:
            failure = ImageError("not_finite", "the network's output is NaN or infinite here")
            return self._encode_rejected(Rejected(picture.sample, failure))
        row = _row(picture.sample, "ok", picture.truth_failure)
        row |= self._counts(canvas)
        masks = self._windows(row["image_id"], canvas.mask_HW)
        return Encoded(row, masks, time.perf_counter() - start)

    def _encode_rejected(self, image: Rejected) -> Encoded:
        return Encoded(_row(image.sample, "failed", image.failure), [], 0.0)

    def _counts(self, canvas: Canvas) -> Row:
        mask_HW, classes = canvas.mask_HW, self.engine.header.classes
        row: Row = {
            "height": mask_HW.shape[0],
            "width": mask_HW.shape[1],
            "class_pixels": np.bincount(mask_HW.ravel(), minlength=classes).tolist(),
            "confidence_sum": canvas.confidence_sum,
        }
        truth_HW = canvas.picture.truth_HW
        if truth_HW is not None:
            ignore_index = self.settings.source.config.ignore_index
            matrix = confusion(truth_HW, mask_HW, classes, ignore_index)
            scores = scores_of(matrix)
            row |= {name: [getattr(s, name) for s in scores] for name in ("tp", "fp", "fn")}
            row["ignored_pixels"] = mask_HW.size - int(matrix.sum())
            if classes <= MAX_CONFUSION_CLASSES:
                row["confusion"] = matrix.ravel().tolist()
        return row

    def _windows(self, image_id: str, mask_HW: Array) -> list[Row]:
        encoding = self.settings.encoding
        return [
            {
                "image_id": image_id,
                "y": y,
                "x": x,
                "height": height,
                "width": width,
                "image_height": mask_HW.shape[0],
                "image_width": mask_HW.shape[1],
                "encoding": encoding,
                "mask": encode_mask(mask_HW[y : y + height, x : x + width], encoding),
            }
            for y, x, height, width in mask_windows(*mask_HW.shape)
        ]

    def _append(
        self, images: Iterable[Encoded], rows: list[Row], part: MasksPart, seconds: Seconds
    ) -> None:
        for image in images:
            seconds.encoding += image.encode_s
            rows.append(image.metrics)
            for row in image.masks:
                part.add(row)
            self.settings.on_image()

    def _commit(
        self, shard: Shard, rows: list[Row], part: MasksPart, seen: int, seconds: Seconds
    ) -> ShardResult:
        start = time.perf_counter()
        masks, sha256, size = part.finish()
        footer = {
            **self.settings.footer,
            "images_seen": str(seen),
            "masks_sha256": sha256,
            "masks_bytes": str(size),
        }
        commit(self.settings.output, shard.shard_id, masks, metrics_part(rows, footer))
        totals = read_totals(self.settings.output, shard.shard_id)
        seconds.writing = time.perf_counter() - start
        log.info("committed shard=%s images=%d failed=%d", shard.shard_id, seen, totals.failed)
        return ShardResult(shard.shard_id, totals, seconds)


def _row(sample: Sample, status: str, failure: ImageError | None) -> Row:
    return {
        "image_id": sample.image_id,
        "key": sample.key,
        "source_uri": sample.source_uri,
        "status": status,
        "error_code": failure.code if failure else None,
        "error_message": str(failure) if failure else None,
    }


def _unless_seen(image: Picture | Rejected, ids: set[str]) -> Picture | Rejected:
    """The image, or its rejection if the shard has an earlier one with its id."""
    if image.sample.image_id in ids:
        failure = ImageError("duplicate_id", "the shard has an earlier image of this id")
        return Rejected(image.sample, failure)
    ids.add(image.sample.image_id)
    return image


class _Running:
    """Batches on the device's lanes, in the order in which they were submitted."""

    def __init__(self) -> None:
        self._line: deque[tuple[list[Piece], Future[tuple[list[Segmented], float]]]] = deque()

    def add(self, pieces: list[Piece], future: Future[tuple[list[Segmented], float]]) -> None:
        self._line.append((pieces, future))

    def finished(self, keep: int) -> Iterator[tuple[list[Piece], list[Segmented], float]]:
        """What is done; waits until at most ``keep`` batches are under way."""
        while self._line and (len(self._line) > keep or self._line[0][1].done()):
            pieces, future = self._line.popleft()
            yield pieces, *future.result()

    def timed(self, images: Iterable[Decoded], seconds: Seconds, lanes: int) -> Iterator[Decoded]:
        """Count the time in which a lane of the device is idle because no image is decoded."""
        iterator = iter(images)
        while True:
            busy = sum(not future.done() for _, future in self._line)
            start = time.perf_counter()
            image = next(iterator, None)
            if busy < lanes:
                seconds.waiting += time.perf_counter() - start
            if image is None:
                return
            yield image
