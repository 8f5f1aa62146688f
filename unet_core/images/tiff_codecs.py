"""Colors of JPEG and JPEG 2000 streams in TIFFs: the stream's own, where a tag contradicts it."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from unet_core.errors import ImageError
from unet_core.images.tiff_pages import name_of

APERIO_YCC = "APERIO_JP2000_YCBC"
"""Compression 33003, whose streams are YCbCr whatever the page says."""
JPEG_2000 = (APERIO_YCC, "APERIO_JP2000_RGB", "JPEG_2000_LOSSY", "JPEG2000")
RGB, YCC = 2, 6
"""Photometric interpretations."""
FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG that begin a frame, and list its components."""
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
"""A marker of JPEG that ends in the color transform: 0 none, 1 YCbCr."""
CODESTREAM = b"\xff\x4f\xff\x51"
"""The first markers of a JPEG 2000 codestream; before it, a JP2 file has boxes."""
SRGB, SYCC = (b"colr\x01\x00\x00\x00\x00\x00" + bytes([space]) for space in (16, 18))
"""Color spaces in such boxes."""


def decode_to_rgb(page: Any) -> None:
    """Make a page of three samples decode its strips or tiles to RGB.

    What a JPEG says by JFIF, Adobe's marker or component ids holds, else the page's tag. A JPEG
    2000 is YCbCr in Aperio's compression 33003, and where the tag says so and its header does not
    say sRGB.
    """
    page, codec = page.keyframe, name_of(page.keyframe.compression)
    tag, subsampling = page.photometric, page.subsampling
    is_color = page.samplesperpixel == 3 and page.planarconfig == 1 and not page.extrasamples
    if not is_color or tag not in (RGB, YCC) or page.jpegheader is not None:
        return
    if codec == "JPEG" and page.bitspersample == 8:
        page.photometric = YCC  # then libjpeg decides by the stream
        page.decode = _after(page.decode, lambda data: _with_marker(data, tag == YCC))
    elif codec in JPEG_2000 and (tag == YCC or codec == APERIO_YCC):
        page.photometric, page.subsampling = RGB, None  # tifffile would refuse to decode it
        page.decode = _to_rgb(page.decode, codec == APERIO_YCC)
    page.photometric, page.subsampling = tag, subsampling


def _after(decode: Callable[..., Any], change: Callable[[bytes], bytes]) -> Callable[..., Any]:
    def changed(data: bytes | None, *args: Any, **options: Any) -> Any:
        return decode(data and change(data), *args, **options)

    return changed


def _with_marker(data: bytes, is_ycc: bool) -> bytes:
    """Add Adobe's marker to a JPEG that does not say its color space."""
    at = 2
    while data[at : at + 1] == b"\xff":
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        content = data[at + 4 : end]
        if (marker, content[:5]) in ((0xE0, b"JFIF\0"), (0xEE, b"Adobe")):
            return data
        if marker in FRAME_MARKERS:
            if content[6:15:3] == b"RGB":
                return data
            break
        at = end
    return data[:2] + ADOBE + bytes([is_ycc]) + data[2:]


def _to_rgb(decode: Callable[..., Any], is_aperio: bool) -> Callable[..., Any]:
    def converted(data: bytes | None, *args: Any, **options: Any) -> Any:
        segment_DHWS, *others = decode(data, *args, **options)
        if data and _is_ycc(data, is_aperio):
            if segment_DHWS.dtype != np.uint8:
                raise ImageError("mode", f"YCbCr of type {segment_DHWS.dtype} is not supported")
            ycc = Image.fromarray(segment_DHWS[0], "YCbCr")
            segment_DHWS = np.asarray(ycc.convert("RGB"))[None]
        return segment_DHWS, *others

    return converted


def _is_ycc(data: bytes, is_aperio: bool) -> bool:
    """Whether a JPEG 2000 that should be YCbCr is so when it is decoded.

    The decoder converts what its header calls sYCC, and what has subsampled chroma.
    """
    start = data.find(CODESTREAM)
    boxes, is_subsampled = data[:start], data[start + 46 : start + 47] not in (b"\1", b"")
    return not (is_subsampled or SYCC in boxes or (SRGB in boxes and not is_aperio))
