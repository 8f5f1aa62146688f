"""Images made to do harm: refused with a code, or decoded in bounded memory."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest

from tests.support import doors
from tests.support.confined import MIB, confined
from tests.support.hostile import squeezed
from unet_core.synthetic import nuclei

BOMB = squeezed(256 * MIB)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width, height, *extra, color=0, body=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
    end = chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + end


def bmp_of(width, height):
    fields = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + fields


def gif_of(width, height, frames):
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0)
    return b"GIF89a" + screen + b"\0\0\0\xff\xff\xff" + frame * frames + b";"


def webp_of(width, height):
    assembler = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    pixels = b"VP8L" + struct.pack("<I", 10) + b"\x2f\xff\xff\xff\x0f" + bytes(5)
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + assembler + pixels
    return b"RIFF" + struct.pack("<I", len(body)) + body


def pages_of(*pages, start=8):
    """A TIFF of directories: tag → value, all of them 32 bits, with the next one's offset last."""
    parts, at = [b"II*\0" + struct.pack("<I", start)], 8
    for number, tags in enumerate(pages):
        following = tags.get("next")
        entries = sorted((k, v) for k, v in tags.items() if k != "next")
        at += 6 + 12 * len(entries)
        if following is None:
            following = at if number + 1 < len(pages) else 0
        fields = [struct.pack("<HHII", k, *(v if isinstance(v, tuple) else (4, 1, v)))
                  for k, v in entries]  # fmt: skip
        parts.append(struct.pack("<H", len(entries)) + b"".join(fields))
        parts.append(struct.pack("<I", following))
    return b"".join(parts)


def tiff_of(width=8, height=8, data=bytes(64), **tags):
    """A gray strip, its pixels behind the header; tags by number (``t259``), None to leave out."""
    own = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 278: height, 279: len(data)}
    own |= {int(name[1:]): value for name, value in tags.items() if name != "next"}
    own = {key: value for key, value in own.items() if value is not None}
    start = 8 + 6 + 12 * (len(own) + (273 not in own))
    own.setdefault(273, start)
    if "next" in tags:
        own["next"] = tags["next"]
    return pages_of(own) + data


TILED = {"t322": 16, "t323": 16, "t324": 8, "t325": 64}
ONE = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 4, 277: 1, 278: 1, 279: 1}
LIE = np.zeros((9000, 9000), np.uint8)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(data, expected, id=name)
        for name, expected, data in [
            ("png pixels", "too_large", png_of(2**31 - 1, 2**31 - 1)),
            ("bmp pixels", "too_large", bmp_of(2**31 - 1, 2**31 - 1)),
            ("bmp below zero", "too_large", bmp_of(-5, -(2**31))),
            ("gif pixels", "too_large", gif_of(65535, 65535, 1)),
            ("webp pixels", "decode", webp_of(2**24, 2**24)),
            ("gif frames", "frames", gif_of(1, 1, 20_000)),
            ("apng frames", "frames",
             png_of(1, 1, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)))),
            ("png zTXt", "decode", png_of(2, 2, chunk(b"zTXt", b"k\0\0" + BOMB))),
            ("png iTXt", "decode", png_of(2, 2, chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB))),
            ("png iCCP", "decode", png_of(2, 2, chunk(b"iCCP", b"k\0\0" + BOMB), color=2)),
            ("png IDAT", [(2, 2, 1)], png_of(2, 2, body=BOMB)),
            ("png rgb IDAT", [(2, 2, 3)], png_of(2, 2, color=2, body=BOMB)),
            ("png without pixels", "decode", png_of(999, 999, color=2, body=zlib.compress(b""))),
            ("tiff pixels", "too_large", tiff_of(2**32 - 1, 2**32 - 1)),
            ("tiff deflate", "decode", tiff_of(64, 64, BOMB, t259=8)),
            ("tiff lzw", [(64, 64, 1)],
             tiff_of(64, 64, imagecodecs.lzw_encode(bytes(32 * MIB)), t259=5)),
            ("tiff zstd", "decode",
             tiff_of(64, 64, imagecodecs.zstd_encode(bytes(256 * MIB)), t259=50000)),
            ("tiff jpeg2000", "decode",
             tiff_of(64, 64, imagecodecs.jpeg2k_encode(LIE, level=0, codecformat="j2k"),
                     t259=34712)),
            ("tiff png", "decode", tiff_of(64, 64, imagecodecs.png_encode(LIE), t259=34933)),
            ("tiff 0 bits", "mode", tiff_of(t258=0)),
            ("tiff 65535 bits", "mode", tiff_of(t258=65535)),
            ("tiff 65535 samples", "decode", tiff_of(t277=65535)),
            ("tiff countless strips", "decode", tiff_of(t273=(4, 10**9, 8))),
            ("tiff long text", [(8, 8, 1)], tiff_of(t270=(2, 2**32 - 1, 8))),
            ("tiff countless tiles", [(8, 8, 1)], tiff_of(**TILED | {"t324": (4, 10**9, 8)})),
            ("tiff tiles of nothing", "decode", tiff_of(**TILED | {"t322": 0, "t323": 0})),
            ("tiff huge tiles", "too_large", tiff_of(t259=8, **TILED | {"t322": 2**16,
                                                                       "t323": 2**16})),
            ("tiff width is a text", "decode", tiff_of(t256=(2, 4, 0x41414141), t257=2**31)),
            ("tiff depth", "too_large", tiff_of(t32997=2**31)),
            ("tiff page is its own next", "decode", tiff_of(next=8)),
            ("tiff pages in a circle", "decode", pages_of(*[ONE] * 150, {**ONE, "next": 8})),
            ("tiff directory without entries", "decode", b"II*\0" + bytes([8, 0, 0, 0]) +
             struct.pack("<HI", 0, 8)),
            ("tiff many pages", "too_large", pages_of(*[ONE] * 1500)),
            ("tiff many entries", "decode", pages_of(ONE)[:8] + b"\xff\xff" + bytes(99)),
            ("bigtiff billion entries", "decode",
             b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 10**9) + bytes(999)),
        ]
    ],
)  # fmt: skip
def test_an_image_that_lies_is_refused_with_a_code_or_decoded_in_bounded_memory(data, expected):
    found = confined(doors.picture_or_code, data, memory=256 * MIB)
    assert (found.error, found.value) == ("", expected), found.text
    assert found.memory < 128 * MIB


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_an_image_cut_anywhere_is_refused_or_told(kind):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(nuclei(40, 40, np.random.default_rng(0))[0]).save(buffer, format=kind)
    cuts = [buffer.getvalue()[:stop] for stop in range(0, buffer.tell(), 1 + buffer.tell() // 150)]
    found = confined(doors.codes, cuts, memory=256 * MIB)
    assert found.error == "", found.text
    assert set(found.value) <= {"empty", "decode"}
