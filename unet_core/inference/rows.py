"""From a finished image to its rows: one in the metrics part, one for each mask window."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from unet_core.arrays import Array
from unet_core.errors import ImageError
from unet_core.images.codec import encode_mask
from unet_core.images.decoder import Pixels, Rejected
from unet_core.images.sample import Sample
from unet_core.inference.mask_assembler import Area, Canvas
from unet_core.metrics import class_pixels, confusion, truth_columns

Row = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One image's rows, ready to be written."""

    metrics: Row
    masks: Iterable[Row]
    encode_s: float = 0.0


@dataclass(frozen=True)
class EncodedArea:
    """One mask window of an image: what it counts, and its row without the bytes."""

    row: Row
    payload: Callable[[], dict[str, bytes]]
    class_pixels: Array
    confusion_KK: Array | ImageError | None
    """Or what is wrong with the truth, if there is any."""
    confidence_sum: int
    encode_s: float


@dataclass(frozen=True)
class Encoder:
    """Makes rows; the same for all images of a run."""

    classes: int
    encoding: str
    ignore_index: int

    def area(self, canvas: Canvas, area: Area) -> EncodedArea:
        """Encode and count one mask window; its bytes wait on disk if there are many of them."""
        start = time.perf_counter()
        box = area.box
        payload = {"mask": encode_mask(area.mask_HW, self.encoding)}
        if area.probabilities_KHW is not None:
            payload["probabilities"] = area.probabilities_KHW.tobytes()
        height, width = canvas.picture.pixels.shape
        row = {
            "image_id": canvas.picture.sample.image_id,
            **box._asdict(),
            "image_height": height,
            "image_width": width,
            "encoding": self.encoding,
        }
        return EncodedArea(
            row,
            canvas.spool.keep(payload) if canvas.spool is not None else lambda: payload,
            class_pixels(area.mask_HW, self.classes),
            self._compare(canvas.picture.truth, area),
            area.confidence_sum,
            time.perf_counter() - start,
        )

    def _compare(self, truth: Pixels | ImageError | None, area: Area) -> Array | ImageError | None:
        if not isinstance(truth, Pixels):
            return truth
        try:
            truth_HW = truth.read(*area.box)[0]
        except ImageError as failure:
            return failure
        return confusion(truth_HW, area.mask_HW, self.classes, self.ignore_index)

    def image(self, canvas: Canvas) -> Encoded:
        """The rows of an image whose areas are all encoded or about to be."""
        areas = sorted((f.result() for f in canvas.encoded), key=lambda a: (a.row["y"], a.row["x"]))
        picture, encode_s = canvas.picture, sum(area.encode_s for area in areas)
        if canvas.failure is not None:
            return rejected(Rejected(picture.sample, canvas.failure), encode_s)
        truths = (area.confusion_KK for area in areas)
        failure = next((truth for truth in truths if isinstance(truth, ImageError)), None)
        height, width = picture.pixels.shape
        row = _row(picture.sample, "ok", failure) | {
            "height": height,
            "width": width,
            "class_pixels": sum(area.class_pixels for area in areas).tolist(),
            "confidence_sum": canvas.confidence_sum + sum(area.confidence_sum for area in areas),
        }
        if picture.truth is not None and failure is None:
            matrix = sum(area.confusion_KK for area in areas)
            row |= truth_columns(matrix, height * width)
        return Encoded(row, (area.row | area.payload() for area in areas), encode_s)


def rejected(image: Rejected, encode_s: float = 0.0) -> Encoded:
    """The row of an image that failed."""
    return Encoded(_row(image.sample, "failed", image.failure), (), encode_s)


def _row(sample: Sample, status: str, failure: ImageError | None) -> Row:
    return {
        "image_id": sample.image_id,
        "key": sample.key,
        "source_uri": sample.source_uri,
        "status": status,
        "error_code": failure.code if failure else None,
        "error_message": str(failure) if failure else None,
    }
