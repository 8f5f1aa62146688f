"""JPEG 2000, JPEG XL and PNM: kinds that Pillow cuts to 8 bits, scales, or does not open.

imagecodecs decodes the first two whatever their size, so their headers are read here before. PNM is
so plain that NumPy reads it.
"""

import re
from collections.abc import Callable, Iterator
from struct import unpack_from
from typing import Any

import imagecodecs
import numpy as np

from unet_core.errors import ImageError
from unet_core.images.tiff import VALUES_PER_PIXEL, check_size

JPEG2000_START = b"\xff\x4f\xff\x51"  # SOC and SIZ: a bare codestream
JPEGXL_START = b"\xff\x0a"  # of a bare codestream
JPEG2000_MAGICS = (b"\0\0\0\x0cjP  \r\n\x87\n", JPEG2000_START)
JPEGXL_MAGICS = (b"\0\0\0\x0cJXL \r\n\x87\n", JPEGXL_START)
PNM_MAGICS = tuple(b"P%d%c" % (kind, space) for kind in range(1, 7) for space in b" \t\r\n")
STRETCHES = {1: 255, 3: 85, 15: 17}
"""Factors by the largest value that make 1-, 2- and 4-bit gray 8 bits, as in PNG."""
MAX_BOXES = 2**16
"""Boxes in a file; real ones have a few, and each takes a microsecond to pass over."""
JPEGXL_HEADER_BYTES = 64
"""More than everything up to the flag of animations can take."""
RATIOS = ((0, 1), (1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""Widths over heights by their code in JPEG XL (ISO/IEC 18181-1); 0: the width follows."""
PNM_NUMBER = re.compile(rb"(?:\s|#[^\n]*\n)+(\d{1,9})")


def decode_still(data: bytes, max_pixels: int, as_labels: bool) -> tuple[Any, float | None] | None:
    """Decode a file of one of these kinds to HW or HWC, alpha included, and the largest value that
    it can store, if that is not the one of its type; None for another kind.

    Values are as stored, but 1-, 2- and 4-bit gray is stretched unless it holds labels. Raises
    ImageError with code ``decode``, ``too_large`` or ``frames``.
    """
    kinds: tuple[tuple[tuple[bytes, ...], Callable[[bytes, int], tuple[Any, int]]], ...] = (
        (JPEG2000_MAGICS, _decode_jpeg2000),
        (JPEGXL_MAGICS, _decode_jpegxl),
        (PNM_MAGICS, _decode_pnm),
    )
    for magics, decode in kinds:
        if data.startswith(magics):
            pixels, highest = decode(data, max_pixels)
            stretch = 1 if as_labels else STRETCHES.get(highest, 1)
            return pixels * np.uint8(stretch) if stretch > 1 else pixels, highest * stretch or None
    return None


def _decode_jpeg2000(data: bytes, max_pixels: int) -> tuple[Any, int]:
    """Return pixels, sYCC as RGB, and the largest value that their bits allow."""
    streams = [data] if data.startswith(JPEG2000_START) else list(_boxes(data, b"jp2c"))
    if not streams or streams[0][:4] != JPEG2000_START:
        raise ImageError("decode", "the JPEG 2000 has no codestream")
    if len(streams) > 1:
        raise ImageError("frames", f"the file holds {len(streams)} frames; give them one by one")
    right, bottom, left, top = unpack_from(">4I", streams[0], 8)
    channels, bits = unpack_from(">HB", streams[0], 40)
    _check_values(max(0, right - left), max(0, bottom - top), channels, max_pixels)
    return imagecodecs.jpeg2k_decode(data, numthreads=1), (2 << (bits & 127)) - 1


def _decode_jpegxl(data: bytes, max_pixels: int) -> tuple[Any, int]:
    """Return pixels in their stored orientation; 0 says that they are never stretched."""
    head = data[:JPEGXL_HEADER_BYTES]
    if not head.startswith(JPEGXL_START):  # parts of a codestream are numbered
        parts = [part[:JPEGXL_HEADER_BYTES] for part in _boxes(data, b"jxlc")]
        head = b"".join(parts or (p[4 : 4 + JPEGXL_HEADER_BYTES] for p in _boxes(data, b"jxlp")))
    bits = int.from_bytes(head[2:JPEGXL_HEADER_BYTES], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    def side(is_small: int) -> int:
        return 8 * (take(5) + 1) if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    def size() -> tuple[int, int]:
        height, ratio = side(is_small := take(1)), take(3)
        width_of, height_of = RATIOS[ratio]
        return height, height * width_of // height_of if ratio else side(is_small)

    height, width = size()
    check_size(width, height, max_pixels)
    if not take(1) and take(1):  # not all is default, and there are extra fields
        take(3)  # orientation
        if take(1):
            size()  # for display
        if take(1) or take(1):
            raise ImageError(
                "frames", "the JPEG XL is an animation, or has a preview; give one image"
            )
    pixels = imagecodecs.jpegxl_decode(data, keeporientation=True, numthreads=1)
    if pixels.shape[:2] != (height, width):
        raise ImageError("decode", f"{pixels.shape} pixels, {height} × {width} by its header")
    return pixels, 0


def _boxes(data: bytes, kind: bytes) -> Iterator[memoryview]:
    """Contents of the top-level boxes of one kind, as in every ISO media file."""
    at = count = 0
    while at + 8 <= len(data):
        size, start = int.from_bytes(data[at : at + 4]), at + 8
        if size == 1:
            size, start = int.from_bytes(data[at + 8 : at + 16]), at + 16
        end, count = at + size if size else len(data), count + 1
        if end < start or count > MAX_BOXES:
            raise ImageError("decode", f"the box at byte {at} is too short, or one of too many")
        if data[at + 4 : at + 8] == kind:
            yield memoryview(data)[start:end]
        at = end


def _decode_pnm(data: bytes, max_pixels: int) -> tuple[Any, int]:
    """Return pixels, white being 1 in bitmaps, and the largest value by the header."""
    width, height, highest, start = _pnm_header(data)
    kind, channels = data[1:2], 3 if data[1:2] in b"36" else 1
    _check_values(width, height, channels, max_pixels)
    if not 0 < highest < 2**16:
        raise ImageError("decode", f"the largest value is {highest}, allowed: 1 to 65535")
    row, dtype = width * channels, np.dtype(np.uint8 if highest < 256 else ">u2")
    shape = (height, width) if channels == 1 else (height, width, channels)
    if kind in b"123":
        text = data[start:].strip()
        text = re.sub(rb"[01]", rb"\g<0> ", text) if kind == b"1" else text
        is_text = re.fullmatch(rb"[\d\s]*", text)  # NumPy takes a sign alone for a number
        values = np.fromstring(text if is_text else "", np.int64, sep=" ")
        if len(values) != height * row or values.max() > highest:
            raise ImageError("decode", "the PNM holds other values than its header says")
        pixels = values.astype(dtype).reshape(shape)
        return 1 - pixels if kind == b"1" else pixels, highest
    row_bytes = (width + 7) // 8 if kind == b"4" else row * dtype.itemsize
    rows = np.frombuffer(data, np.uint8, height * row_bytes, start).reshape(height, row_bytes)
    if data[start + rows.size : start + rows.size + 64].lstrip().startswith(PNM_MAGICS):
        raise ImageError("frames", "the PNM holds several images; give them one by one")
    if kind == b"4":
        return 1 - np.unpackbits(rows, axis=1, count=width), highest
    return rows.view(dtype).reshape(shape), highest


def _pnm_header(data: bytes) -> tuple[int, int, int, int]:
    """Return the width, height, largest value, and where the pixels begin."""
    numbers, at = list[int](), 2
    while len(numbers) < (2 if data[1:2] in b"14" else 3):
        if not (found := PNM_NUMBER.match(data, at)):
            raise ImageError("decode", "the header of the PNM is cut short or damaged")
        numbers, at = [*numbers, int(found[1])], found.end()
    width, height, highest = (*numbers, 1)[:3]
    return width, height, highest, at + 1


def _check_values(width: int, height: int, channels: int, max_pixels: int) -> None:
    """Raise ImageError for images without pixels, or with too many pixels or values."""
    check_size(width, height, max_pixels)
    if width * height * channels > VALUES_PER_PIXEL * max_pixels or not channels:
        allowed = VALUES_PER_PIXEL * max_pixels
        raise ImageError(
            "too_large", f"{width * height * channels} values in all channels, allowed: {allowed}"
        )
