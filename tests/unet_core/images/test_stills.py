import io
import struct

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from tests.support.data import reading
from tests.support.rasters import labels_of, pixels_of
from unet_core.errors import ImageError
from unet_core.images.codec import decode_images

LIMIT = 10_000
RANDOM = np.random.default_rng(0)
RGB8 = RANDOM.integers(0, 256, (24, 31, 3), dtype=np.uint8)
RGB16 = RANDOM.integers(0, 65536, (24, 31, 3), dtype=np.uint16)
GRAY8, GRAY16 = RGB8[..., 0].copy(), RGB16[..., 0].copy()
GRAY12 = GRAY16 >> 4
RGBA16 = np.dstack([RGB16, GRAY16])
BITS = RANDOM.integers(0, 2, (24, 31), dtype=np.uint8)
MOVIE = np.stack([RGB8, RGB8])


def saved(pixels, kind):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def jp2(pixels, **options):
    return imagecodecs.jpeg2k_encode(pixels, level=0, **{"codecformat": "jp2", **options})


def jxl(pixels, **options):
    return imagecodecs.jpegxl_encode(pixels, lossless=True, **options)


def avif(pixels, bits):
    return imagecodecs.avif_encode(pixels, level=100, bitspersample=bits)


def pnm(kind, pixels, highest, space=b" "):
    height, width = pixels.shape[:2]
    head = space.join([b"P%d" % kind, b"%d" % width, b"%d" % height, b"%d" % highest]) + b"\n"
    if kind > 3:
        return head + pixels.astype(np.uint8 if highest < 256 else ">u2").tobytes()
    return head + b"\n".join(b"%d" % value for value in pixels.ravel())


LOSSLESS = {
    **{
        f"{name} {pixels.shape} {pixels.dtype}": (encode(pixels), pixels)
        for name, encode in {
            "jp2": jp2,
            "j2k": lambda pixels: jp2(pixels, codecformat="j2k"),
            "htj2k": imagecodecs.htj2k_encode,
            "jxl": jxl,
            "jxl in boxes": lambda pixels: jxl(pixels, usecontainer=True),
        }.items()
        for pixels in (GRAY8, RGB8, GRAY16, RGB16)
    },
    "jp2 of 12 bits": (jp2(GRAY12, bitspersample=12), GRAY12),
    "avif": (avif(RGB8, 8), RGB8),
    "avif of 10 bits": (avif(GRAY16 >> 6, 10), GRAY16 >> 6),
    "avif of 12 bits": (avif(RGB16 >> 4, 12), RGB16 >> 4),
    "pgm": (saved(GRAY8, "PPM"), GRAY8),
    "ppm": (saved(RGB8, "PPM"), RGB8),
    "pgm of 12 bits": (pnm(5, GRAY12, 4095, b"\n# a comment 7\n"), GRAY12),
    "pgm of 16 bits": (pnm(5, GRAY16, 65535), GRAY16),
    "ppm of 16 bits": (pnm(6, RGB16, 65535), RGB16),
    "pgm as text": (pnm(2, GRAY16, 65535), GRAY16),
    "ppm as text": (pnm(3, RGB8, 255), RGB8),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_values_keep_their_bits_as_images_and_as_labels(name):
    data, expected = LOSSLESS[name]
    (pixels,) = pixels_of(data, reading(LIMIT))
    np.testing.assert_array_equal(pixels, np.atleast_3d(expected))
    assert pixels.dtype == expected.dtype
    if expected.ndim == 2:
        labels = labels_of(data, reading(LIMIT, ignore_index=65535), 65536)[0]
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("shape", [(8, 8), (64, 128), (90, 108), (90, 160), (77, 33), (3, 3000)])
def test_every_way_to_write_the_size_of_a_jpeg_xl_is_understood(shape):
    pixels = RANDOM.integers(0, 256, shape, dtype=np.uint8)
    (found,) = pixels_of(jxl(pixels), reading(pixels.size))
    np.testing.assert_array_equal(found[..., 0], pixels)
    with pytest.raises(ImageError, match=f"^{shape[0]} × {shape[1]} pixels"):
        pixels_of(jxl(pixels), reading(pixels.size - 1))


def test_alpha_is_a_channel_that_can_be_chosen():
    for data in (jp2(RGBA16), jxl(RGBA16), avif(RGBA16 >> 4, 12)):
        depth = 4 if data[4:8] == b"ftyp" else 0
        (pixels,) = pixels_of(data, reading(LIMIT, channels=[3, 0]))
        np.testing.assert_array_equal(pixels, (RGBA16 >> depth)[..., [3, 0]])
        assert pixels_of(data, reading(LIMIT))[0].shape == RGB8.shape


def test_bits_are_black_and_white_as_images_and_ids_as_labels():
    text = b"P1 31 24\n" + b"\n".join(b"".join(b"%d" % (1 - bit) for bit in row) for row in BITS)
    for data in (saved(BITS.astype(bool), "PPM"), text, jp2(BITS, bitspersample=1)):
        np.testing.assert_array_equal(pixels_of(data, reading(LIMIT))[0][..., 0], BITS * 255)
        np.testing.assert_array_equal(labels_of(data, reading(LIMIT), 2)[0], BITS)


def test_jpeg_2000_in_ycc_becomes_rgb():
    y, x = np.mgrid[:24, :31]
    rgb = np.stack([y * 8, x * 8, (x + y) * 4], -1).astype(np.uint8)
    ycc = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    (pixels,) = pixels_of(jp2(ycc, colorspace="SYCC", mct=False), reading(LIMIT))
    assert np.abs(pixels.astype(int) - rgb).max() < 4


def lying(data, marker, position):
    """A file whose header claims far more pixels than it has."""
    at = data.index(marker) + position
    return data[:at] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + data[at + 8 :]


LARGE = np.zeros((200, 200), np.uint8)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (jp2(LARGE), "too_large"),
        (jxl(LARGE), "too_large"),
        (jxl(LARGE, usecontainer=True), "too_large"),
        (avif(LARGE, 8), "too_large"),
        (saved(LARGE, "PPM"), "too_large"),
        (b"P5 99999999 99999999 255\n", "too_large"),
        (lying(jp2(GRAY8), b"\xff\x4f\xff\x51", 8), "too_large"),
        (lying(avif(GRAY8, 8), b"ispe", 8), "decode"),
        (jxl(MOVIE), "frames"),
        (imagecodecs.avif_encode(MOVIE), "frames"),
        (jp2(GRAY8) + jp2(GRAY8)[jp2(GRAY8).index(b"jp2c") - 4 :], "frames"),
        (saved(GRAY8, "PPM") * 2, "frames"),
        (jp2(GRAY8)[:-300], "decode"),
        (jp2(GRAY8)[:60], "decode"),
        (jxl(GRAY8)[:-30], "decode"),
        (jxl(GRAY8)[:3], "decode"),
        (avif(GRAY8, 8)[:-300], "decode"),
        (saved(GRAY8, "PPM")[:-1], "decode"),
        (pnm(2, GRAY8, 255)[:-9], "decode"),
        (pnm(2, GRAY16, 255), "decode"),
        (pnm(2, GRAY8, 255)[:-4] + b" -", "decode"),
        (pnm(2, GRAY8, 255) + b" 1", "decode"),
        (pnm(2, GRAY8, 255)[:-4] + b" 4294967296", "decode"),
        (pnm(5, GRAY8, 0), "decode"),
        (b"P5 3 #", "decode"),
        (b"P5 0 3 255\n", "decode"),
        (jp2(GRAY8)[:32] + b"\0\0\0\1jp2c" + bytes(8), "decode"),
    ],
)
def test_what_cannot_be_decoded_is_refused_with_a_code(data, code):
    with pytest.raises(ImageError) as caught:
        pixels_of(data, reading(LIMIT))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("data", "highest"),
    [
        (jp2(GRAY12, bitspersample=12), 4095),
        (pnm(5, GRAY12.clip(0, 1000), 1000), 1000),
        (avif(GRAY12[..., None].repeat(3, 2), 12), 4095),
        (avif(RGB8, 8), 255),
        (jxl(GRAY16), 65535),
    ],
    ids=["JPEG 2000", "PNM", "AVIF of 12 bits", "AVIF of 8 bits", "JPEG XL"],
)
def test_the_full_scale_is_that_of_the_bits(data, highest):
    (image,) = decode_images(data, reading(LIMIT))
    assert image.full_scale == highest
