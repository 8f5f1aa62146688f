"""Rows of a finished image: one in the metrics part, one for each mask window."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from unet_core.arrays import Array
from unet_core.errors import ImageError
from unet_core.images.codec import encode_mask
from unet_core.images.decoder import DecodedImage, Rejected
from unet_core.images.sample import Sample
from unet_core.inference.mask_assembler import MaskAssembler, MaskWindow
from unet_core.metrics import class_pixels, confusion, truth_columns

Row = dict[str, Any]


@dataclass(frozen=True)
class EncodedWindow:
    """One mask window of an image: its counts, and its row without the bytes."""

    row: Row
    payload: Callable[[], dict[str, bytes]]
    class_pixels: Array
    confusion_KK: Array | ImageError | None
    """Confusion with the truth, or why that cannot be used; None without truth."""
    confidence_sum: int


@dataclass(frozen=True)
class Encoder:
    """Encodes masks and makes rows; the same for all images of a run."""

    classes: int
    encoding: str
    ignore_index: int
    has_moments: bool = False
    """Images are normalized by mean and deviation, not by low and high."""

    def window(self, assembler: MaskAssembler, window: MaskWindow) -> EncodedWindow:
        """Encode and count one mask window; windows of a large image wait on disk."""
        payload = {"mask": encode_mask(window.mask_HW, self.encoding)}
        if window.probabilities_KHW is not None:
            payload["probabilities"] = window.probabilities_KHW.tobytes()
        height, width = assembler.decoded.pixels.shape
        row = {
            "image_id": assembler.decoded.sample.image_id,
            **window.box._asdict(),
            "image_height": height,
            "image_width": width,
            "encoding": self.encoding,
        }
        return EncodedWindow(
            row,
            assembler.spool.keep(payload) if assembler.spool is not None else lambda: payload,
            class_pixels(window.mask_HW, self.classes),
            self._compare(assembler.decoded, window),
            window.confidence_sum,
        )

    def _compare(self, decoded: DecodedImage, window: MaskWindow) -> Array | ImageError | None:
        if decoded.truth is None or isinstance(decoded.truth, ImageError):
            return decoded.truth
        try:
            truth_HW = decoded.truth.read(window.box).pixels_CHW[0]
        except ImageError as failure:
            return failure
        return confusion(truth_HW, window.mask_HW, self.classes, self.ignore_index)

    def _normalization(self, decoded: DecodedImage) -> dict[str, list[float]]:
        """Values of ``schema.NORMALIZATION`` that were used."""
        offset, span = map(list, zip(*decoded.measured.limits, strict=True))
        if self.has_moments:
            return {"mean": offset, "std": span}
        return {"low": offset, "high": [a + b for a, b in decoded.measured.limits]}

    def image(self, image: MaskAssembler | Rejected) -> tuple[Row, Iterable[Row]]:
        """The metrics row and the mask rows of an image. Waits until its windows are encoded; they
        were submitted to the pool before it, so they never wait for it.
        """
        if isinstance(image, Rejected):
            return _row(image.sample, "failed", image.failure), ()
        windows = sorted(
            (future.result() for future in image.encoded), key=lambda w: (w.row["y"], w.row["x"])
        )
        decoded = image.decoded
        if image.failure is not None:
            return _row(decoded.sample, "failed", image.failure), ()
        truths = [window.confusion_KK for window in windows]
        truth_failure = next((truth for truth in truths if isinstance(truth, ImageError)), None)
        height, width = decoded.pixels.shape
        pixels = sum(window.class_pixels for window in windows)
        valid = int(pixels.sum())
        row = _row(decoded.sample, "ok", truth_failure) | {
            "height": height,
            "width": width,
            "class_pixels": pixels.tolist(),
            "invalid_pixels": height * width - valid,
            "normalization": self._normalization(decoded),
            "is_extrapolated": decoded.measured.is_extrapolated,
            **decoded.georeference._asdict(),
            "confidence_sum": image.confidence_sum
            + sum(window.confidence_sum for window in windows),
        }
        if decoded.truth is not None and truth_failure is None:
            row |= truth_columns(sum(truths), valid)
        return row, (window.row | window.payload() for window in windows)


def _row(sample: Sample, status: str, failure: ImageError | None) -> Row:
    return {
        "image_id": sample.image_id,
        "key": sample.key,
        "source_uri": sample.source_uri,
        "status": status,
        "error_code": failure.code if failure else None,
        "error_message": str(failure) if failure else None,
    }
