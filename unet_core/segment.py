"""The story of one shard: read, decode, cut, segment, stitch, encode, and commit two parts.

Reading, decoding and encoding run on threads beside the device. Which tiles share a batch depends
on the shard and the run's ``compute`` section alone, so every attempt writes the same bytes.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Full, Queue
from typing import Any

import numpy as np
import numpy.typing as npt

from unet_core.codec import decode_image, decode_labels, encode_mask
from unet_core.config import InputConfig
from unet_core.compute import Compute
from unet_core.engine import Batch, Engine, Segmented
from unet_core.errors import ImageError, StoppedError
from unet_core.geometry import Tile, mask_windows, tiles
from unet_core.metrics import confusion, scores_of
from unet_core.parts import MasksPart, commit, metrics_part, read_totals
from unet_core.preprocessing import offset_and_scale, to_color
from unet_core.schema import MAX_CONFUSION_CLASSES
from unet_core.shards import Sample, Shard, Source
from unet_core.store import Store
from unet_core.timings import Seconds, ShardResult

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.generic]
Row = dict[str, Any]

PENDING_BATCHES = 8
"""Tiles of shapes that do not fill a batch wait for at most this many batches of pixels."""


@dataclass
class Picture:
    """One image on its way through the shard."""

    index: int
    sample: Sample
    pixels_CHW: Pixels | None = None
    offset: npt.NDArray[np.float32] | None = None
    scale: npt.NDArray[np.float32] | None = None
    truth_HW: npt.NDArray[np.unsignedinteger] | None = None
    failure: ImageError | None = None
    truth_failure: ImageError | None = None
    shape: tuple[int, int] | None = None
    mask_HW: npt.NDArray[np.unsignedinteger] | None = None
    confidence_sum: int = 0
    tiles_left: int = 0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Finished:
    """One image's rows, encoded."""

    metrics: Row
    masks: list[Row]
    encode_s: float


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


class Segmenter:
    """Segments shards with one engine. Two threads may call ``segment`` at once: while one has
    the device, the other already reads and decodes."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="codec")
        self._device = threading.Lock()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Let every shard under way raise StoppedError before its next image."""
        self._cancelled.set()

    def segment(self, shard: Shard) -> ShardResult:
        """Segment one shard and commit its parts.

        Raises StoreError when storage fails, CommitConflictError when another attempt wrote
        other bytes and StoppedError after ``cancel``; what is wrong with an image is a row, never an exception.
        """
        part = MasksPart(self.settings.encoding, self.settings.footer)
        seconds = Seconds()
        rows: list[Row] = []
        with _Prefetch(self._pool, self._decode, self._samples(shard), self._ahead) as pictures:
            try:
                results = _InOrder()
                with self._device:
                    for index, future in self._compute(pictures, seconds):
                        results.add(index, future)
                        self._append(results.ready(), rows, part, seconds)
                self._append(results.rest(), rows, part, seconds)
                return self._commit(shard, rows, part, pictures.seen, seconds)
            finally:
                part.close()

    def _append(
        self, images: Iterable[Finished], rows: list[Row], part: MasksPart, seconds: Seconds
    ) -> None:
        for image in images:
            seconds.encoding += image.encode_s
            rows.append(image.metrics)
            for row in image.masks:
                part.add(row)
            self.settings.on_image()

    @property
    def _ahead(self) -> int:
        return 2 * self.settings.threads + 2

    def _samples(self, shard: Shard) -> Iterator[tuple[int, Sample]]:
        """The shard's images, numbered; a second image with the same id is a failure."""
        seen: set[str] = set()
        for index, sample in enumerate(self.settings.source.read(shard)):
            if sample.image_id in seen:
                failure = ImageError("duplicate_id", "the shard has an earlier image of this id")
                sample = Sample(
                    sample.image_id, sample.key, sample.source_uri, sample.read, None, failure
                )
            seen.add(sample.image_id)
            yield index, sample

    def _decode(self, numbered: tuple[int, Sample]) -> Picture:
        index, sample = numbered
        start = time.perf_counter()
        picture = Picture(index, sample)
        try:
            if sample.failure is not None:
                raise sample.failure
            self._decode_pixels(picture, sample.read())
        except ImageError as failure:
            picture.failure = failure
        if picture.failure is None and sample.read_mask is not None:
            try:
                self._decode_truth(picture, sample.read_mask())
            except ImageError as failure:
                picture.truth_failure = failure
        picture.decode_s = time.perf_counter() - start
        return picture

    def _decode_pixels(self, picture: Picture, data: bytes) -> None:
        wanted = self.engine.header.preprocessing
        raster = decode_image(data, self._input.max_pixels)
        picture.shape = (raster.height, raster.width)
        picture.pixels_CHW = to_color(raster, wanted.color)
        picture.offset, picture.scale = offset_and_scale(picture.pixels_CHW, wanted)

    def _decode_truth(self, picture: Picture, data: bytes) -> None:
        header, config = self.engine.header, self._input
        labels = decode_labels(
            data, config.max_pixels, config.label_map, header.classes, config.ignore_index
        )
        if labels.shape != picture.shape:
            raise ImageError(
                "labels", f"the mask has shape {labels.shape}, the image {picture.shape}"
            )
        picture.truth_HW = labels

    @property
    def _input(self) -> InputConfig:
        return self.settings.source.config

    def _compute(
        self, pictures: Iterable[Picture], seconds: Seconds
    ) -> Iterator[tuple[int, Future[Finished]]]:
        """Run every batch; yield (index, encoded rows to come) as images become complete."""
        queue = _TileQueue(self.settings.compute)
        for picture in _timed(pictures, seconds):
            if self._cancelled.is_set():
                raise StoppedError("stopped")
            seconds.decoding += picture.decode_s
            if picture.failure is not None:
                yield picture.index, self._pool.submit(self._encode, picture)
                continue
            for batch in queue.add(picture, self._cut(picture)):
                yield from self._run(batch, seconds)
        for batch in queue.rest():
            yield from self._run(batch, seconds)

    def _cut(self, picture: Picture) -> list[Tile]:
        assert picture.shape is not None
        header = self.engine.header
        cuts = tiles(*picture.shape, self.settings.tile_size, header.halo, header.spec.stride)
        dtype = np.uint8 if header.classes <= 256 else np.uint16
        picture.mask_HW = np.empty(picture.shape, dtype=dtype)
        picture.tiles_left = len(cuts)
        return cuts

    def _run(
        self, batch: list[tuple[Picture, Tile]], seconds: Seconds
    ) -> Iterator[tuple[int, Future[Finished]]]:
        start = time.perf_counter()
        segmented = self.engine.run(_stack(batch))
        for (picture, tile), result in zip(batch, segmented, strict=True):
            _stitch(picture, tile, result)
            if not picture.tiles_left:
                picture.pixels_CHW = None
                yield picture.index, self._pool.submit(self._encode, picture)
        seconds.device += time.perf_counter() - start

    def _encode(self, picture: Picture) -> Finished:
        start = time.perf_counter()
        failure = picture.failure or picture.truth_failure
        row: Row = {
            "image_id": _utf8(picture.sample.image_id),
            "key": _utf8(picture.sample.key),
            "source_uri": _utf8(picture.sample.source_uri),
            "status": "failed" if picture.failure else "ok",
            "error_code": failure.code if failure else None,
            "error_message": _utf8(str(failure)) if failure else None,
        }
        masks: list[Row] = []
        if picture.mask_HW is not None:
            row |= self._counts(picture)
            masks = self._windows(row["image_id"], picture.mask_HW)
        return Finished(row, masks, time.perf_counter() - start)

    def _counts(self, picture: Picture) -> Row:
        mask_HW, classes = picture.mask_HW, self.engine.header.classes
        assert mask_HW is not None
        row: Row = {
            "height": mask_HW.shape[0],
            "width": mask_HW.shape[1],
            "class_pixels": np.bincount(mask_HW.ravel(), minlength=classes).tolist(),
            "confidence_sum": picture.confidence_sum,
        }
        if picture.truth_HW is not None:
            matrix = confusion(picture.truth_HW, mask_HW, classes, self._input.ignore_index)
            scores = scores_of(matrix)
            row |= {name: [getattr(s, name) for s in scores] for name in ("tp", "fp", "fn")}
            row["ignored_pixels"] = mask_HW.size - int(matrix.sum())
            if classes <= MAX_CONFUSION_CLASSES:
                row["confusion"] = matrix.ravel().tolist()
        return row

    def _windows(self, image_id: str, mask_HW: npt.NDArray[np.unsignedinteger]) -> list[Row]:
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


class _Prefetch:
    """Reads and decodes ahead on threads, and gives pictures in the order of the shard."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        decode: Callable[[tuple[int, Sample]], Picture],
        samples: Iterator[tuple[int, Sample]],
        ahead: int,
    ) -> None:
        self.seen = 0
        self._queue: Queue[Future[Picture] | BaseException | None] = Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(pool, decode, samples), name="reader", daemon=True
        )

    def __enter__(self) -> "_Prefetch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Picture]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.result()

    def _read(
        self,
        pool: ThreadPoolExecutor,
        decode: Callable[[tuple[int, Sample]], Picture],
        samples: Iterator[tuple[int, Sample]],
    ) -> None:
        try:
            for numbered in samples:
                self.seen += 1
                if not self._put(pool.submit(decode, numbered)):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001  # raised again where the pictures are used
            self._put(error)

    def _put(self, item: Future[Picture] | BaseException | None) -> bool:
        """Wait for a place in the queue; False if nobody reads it any more."""
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except Full:
                continue
        return False


class _TileQueue:
    """Groups tiles by shape and type, in the order of the shard, into batches.

    A shape that does not fill its batch waits until the shard ends, or until too many pixels wait;
    then the one that waits longest goes first.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._groups: dict[Any, list[tuple[Picture, Tile]]] = {}
        self._pixels = 0

    def add(self, picture: Picture, cuts: list[Tile]) -> Iterator[list[tuple[Picture, Tile]]]:
        """Queue the tiles of a picture; yield the batches that are due."""
        assert picture.pixels_CHW is not None
        for tile in cuts:
            key = (tile.shape, picture.pixels_CHW.dtype.str)
            group = self._groups.setdefault(key, [])
            group.append((picture, tile))
            self._pixels += tile.shape[0] * tile.shape[1]
            if len(group) >= self._compute.batch_of(*tile.shape):
                yield self._take(key)
            elif self._pixels > PENDING_BATCHES * self._compute.batch_pixels:
                yield self._take(next(iter(self._groups)))

    def rest(self) -> Iterator[list[tuple[Picture, Tile]]]:
        """What is left when the shard ends."""
        while self._groups:
            yield self._take(next(iter(self._groups)))

    def _take(self, key: Any) -> list[tuple[Picture, Tile]]:
        group = self._groups.pop(key)
        self._pixels -= sum(tile.shape[0] * tile.shape[1] for _, tile in group)
        return group


def _timed(pictures: Iterable[Picture], seconds: Seconds) -> Iterator[Picture]:
    """Count the time in which the device waits for the next picture."""
    iterator = iter(pictures)
    while True:
        start = time.perf_counter()
        picture = next(iterator, None)
        seconds.waiting += time.perf_counter() - start
        if picture is None:
            return
        yield picture


def _stack(batch: list[tuple[Picture, Tile]]) -> Batch:
    windows, offsets, scales = [], [], []
    for picture, tile in batch:
        assert picture.pixels_CHW is not None
        windows.append(window(picture.pixels_CHW, tile))
        offsets.append(picture.offset)
        scales.append(picture.scale)
    return Batch(
        np.stack(windows), np.stack(offsets), np.stack(scales), [tile for _, tile in batch]
    )


def window(pixels_CHW: Pixels, tile: Tile) -> Pixels:
    """Cut a tile; what lies below or to the right of the image is its reflection."""
    height, width = pixels_CHW.shape[1:]
    cut_CHW = pixels_CHW[
        :, tile.y.start : min(tile.y.stop, height), tile.x.start : min(tile.x.stop, width)
    ]
    below = tile.shape[0] - cut_CHW.shape[1]
    right = tile.shape[1] - cut_CHW.shape[2]
    if below or right:
        return np.pad(cut_CHW, ((0, 0), (0, below), (0, right)), mode="reflect")
    return cut_CHW


def _stitch(picture: Picture, tile: Tile, result: Segmented) -> None:
    assert picture.mask_HW is not None
    rows, columns = (slice(s.keep_start, s.keep_stop) for s in (tile.y, tile.x))
    picture.mask_HW[rows, columns] = result.mask_HW
    picture.confidence_sum += result.confidence_sum
    picture.tiles_left -= 1


class _InOrder:
    """Gives images in the order of the shard, however they were completed."""

    def __init__(self) -> None:
        self._early: dict[int, Future[Finished]] = {}
        self._line: deque[Future[Finished]] = deque()
        self._following = 0

    def add(self, index: int, future: Future[Finished]) -> None:
        """Image number ``index`` is being encoded."""
        self._early[index] = future
        while self._following in self._early:
            self._line.append(self._early.pop(self._following))
            self._following += 1

    def ready(self) -> Iterator[Finished]:
        """What can be given without waiting."""
        while self._line and self._line[0].done():
            yield self._line.popleft().result()

    def rest(self) -> Iterator[Finished]:
        """Everything else; all images must have been added."""
        assert not self._early
        while self._line:
            yield self._line.popleft().result()


def _utf8(text: str) -> str:
    """Text that Parquet can hold: bytes that are no UTF-8 are shown as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
