"""From a finished image to its rows: one in the metrics part, one for each mask window."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from unet_core.arrays import Array
from unet_core.errors import ImageError
from unet_core.images.codec import encode_mask
from unet_core.images.decoder import Pixels, Rejected
from unet_core.images.sample import Sample
from unet_core.inference.mask_assembler import MaskAssembler, MaskWindow
from unet_core.metrics import class_pixels, confusion, truth_columns

Row = dict[str, Any]


@dataclass(frozen=True)
class EncodedImage:
    """One image's rows, ready to be written."""

    metrics: Row
    masks: Iterable[Row]


@dataclass(frozen=True)
class EncodedWindow:
    """One mask window of an image: what it counts, and its row without the bytes."""

    row: Row
    payload: Callable[[], dict[str, bytes]]
    class_pixels: Array
    confusion_KK: Array | ImageError | None
    """Or what is wrong with the truth, if there is any."""
    confidence_sum: int


@dataclass(frozen=True)
class Encoder:
    """Makes rows; the same for all images of a run."""

    classes: int
    encoding: str
    ignore_index: int

    def window(self, assembler: MaskAssembler, window: MaskWindow) -> EncodedWindow:
        """Encode and count one mask window; its bytes wait on disk if there are many of them."""
        box = window.box
        payload = {"mask": encode_mask(window.mask_HW, self.encoding)}
        if window.probabilities_KHW is not None:
            payload["probabilities"] = window.probabilities_KHW.tobytes()
        height, width = assembler.decoded.pixels.shape
        row = {
            "image_id": assembler.decoded.sample.image_id,
            **box._asdict(),
            "image_height": height,
            "image_width": width,
            "encoding": self.encoding,
        }
        return EncodedWindow(
            row,
            assembler.spool.keep(payload) if assembler.spool is not None else lambda: payload,
            class_pixels(window.mask_HW, self.classes),
            self._compare(assembler.decoded.truth, window),
            window.confidence_sum,
        )

    def _compare(
        self, truth: Pixels | ImageError | None, window: MaskWindow
    ) -> Array | ImageError | None:
        if not isinstance(truth, Pixels):
            return truth
        try:
            truth_HW = truth.read(*window.box)[0]
        except ImageError as failure:
            return failure
        return confusion(truth_HW, window.mask_HW, self.classes, self.ignore_index)

    def image(self, assembler: MaskAssembler) -> EncodedImage:
        """The rows of an image whose windows are all encoded or about to be."""
        windows = sorted(
            (f.result() for f in assembler.encoded), key=lambda a: (a.row["y"], a.row["x"])
        )
        decoded = assembler.decoded
        if assembler.failure is not None:
            return rejected(Rejected(decoded.sample, assembler.failure))
        truths = (window.confusion_KK for window in windows)
        failure = next((truth for truth in truths if isinstance(truth, ImageError)), None)
        height, width = decoded.pixels.shape
        row = _row(decoded.sample, "ok", failure) | {
            "height": height,
            "width": width,
            "class_pixels": sum(window.class_pixels for window in windows).tolist(),
            "confidence_sum": assembler.confidence_sum
            + sum(window.confidence_sum for window in windows),
        }
        if decoded.truth is not None and failure is None:
            matrix = sum(window.confusion_KK for window in windows)
            row |= truth_columns(matrix, height * width)
        return EncodedImage(row, (window.row | window.payload() for window in windows))


def rejected(image: Rejected) -> EncodedImage:
    """The row of an image that failed."""
    return EncodedImage(_row(image.sample, "failed", image.failure), ())


def _row(sample: Sample, status: str, failure: ImageError | None) -> Row:
    return {
        "image_id": sample.image_id,
        "key": sample.key,
        "source_uri": sample.source_uri,
        "status": status,
        "error_code": failure.code if failure else None,
        "error_message": str(failure) if failure else None,
    }
