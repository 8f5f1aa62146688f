import io
import struct

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.support.data import reading, tiff
from tests.support.rasters import labels_of, pixels_of
from unet_core.errors import ImageError

LIMIT = 10_000
RULES = reading(LIMIT)
RANDOM = np.random.default_rng(0)
GRAY8 = RANDOM.integers(0, 256, (24, 31), dtype=np.uint8)
RGB8 = RANDOM.integers(0, 256, (24, 31, 3), dtype=np.uint8)
GRAY16 = RANDOM.integers(0, 65536, (24, 31), dtype=np.uint16)
RGB16 = RANDOM.integers(0, 65536, (24, 31, 3), dtype=np.uint16)
FLOAT = RANDOM.normal(size=(24, 31)).astype(np.float32)
BITS = RANDOM.integers(0, 2, (24, 31)).astype(bool)
INDICES = RANDOM.integers(0, 4, (24, 31), dtype=np.uint8)
COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [9, 8, 7]], dtype=np.uint8)


def saved(pixels, kind="PNG", mode=None, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def palette(kind="PNG", mode="P"):
    image = Image.fromarray(INDICES, mode="P")
    image.putpalette(COLORS.ravel().tolist())
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def stray_alpha(pixels, **options):
    """A TIFF that calls one of its colours alpha, as a tag that was left behind does."""
    data = tiff(pixels, extratags=[(65000, 3, 1, 2, True)], **options)
    return data.replace(struct.pack("<HHI", 65000, 3, 1), struct.pack("<HHI", 338, 3, 1))


def alpha(pixels):
    return np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 99, pixels.dtype)], axis=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(GRAY8), GRAY8),
        (saved(RGB8), RGB8),
        (saved(alpha(RGB8)), RGB8),
        (saved(alpha(GRAY8[..., None])), GRAY8),
        (saved(GRAY16), GRAY16),
        (imagecodecs.png_encode(RGB16), RGB16),
        (imagecodecs.png_encode(alpha(RGB16)), RGB16),
        (palette(), COLORS[INDICES]),
        (palette("TIFF", "PA"), COLORS[INDICES]),
        (saved(BITS), BITS * np.uint8(255)),
        (saved(GRAY8, "BMP"), GRAY8),
        (saved(RGB8, "WEBP", lossless=True), RGB8),
        (saved(GRAY8, "GIF"), GRAY8[..., None].repeat(3, 2)),
        (tiff(GRAY8), GRAY8),
        (tiff(GRAY16, byteorder=">"), GRAY16),
        (stray_alpha(GRAY8), GRAY8),
        (tiff(RGB16, photometric="rgb"), RGB16),
        (tiff(np.moveaxis(RGB8, 2, 0), photometric="rgb", planarconfig="separate"), RGB8),
        (tiff(RGB8, photometric="rgb", compression="lzw"), RGB8),
        (tiff(GRAY16, compression="deflate", tile=(16, 16)), GRAY16),
        (tiff(GRAY8, photometric="miniswhite"), 255 - GRAY8),
        (tiff(FLOAT), FLOAT),
        (tiff(FLOAT.astype(np.float64)), FLOAT),
        (tiff(GRAY16.astype(np.int32)), GRAY16.astype(np.float32)),
    ],
)
def test_pixels_are_what_was_stored(data, expected):
    pixels = pixels_of(data, RULES)[0]
    expected = expected if expected.ndim == 3 else expected[..., None]
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.dtype == expected.dtype
    assert pixels.dtype.isnative


def test_lossy_and_cmyk_images_become_rgb():
    smooth = np.repeat(np.linspace(0, 255, 24).astype(np.uint8)[:, None, None], 31, 1).repeat(3, 2)
    for data in (saved(smooth, "JPEG", quality=95), saved(smooth, "JPEG", mode="CMYK", quality=95),
                 tiff(smooth, photometric="rgb", compression="jpeg"),
                 saved(smooth, "TIFF", mode="CMYK")):  # fmt: skip
        pixels = pixels_of(data, RULES)[0]
        assert pixels.shape == smooth.shape
        assert np.abs(pixels.astype(int) - smooth).max() <= 12


def test_exif_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(RGB8, "JPEG", exif=exif.tobytes(), quality=95)
    assert pixels_of(data, RULES)[0].shape == RGB8.shape


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"not an image at all", "decode"),
        (saved(RGB8)[:-40], "decode"),
        (saved(GRAY8)[:-40], "decode"),
        (saved(RGB8, "JPEG")[:-200], "decode"),
        (tiff(GRAY8)[:-100], "decode"),
        (saved(GRAY8, "TGA"), "decode"),
        (saved(np.zeros((200, 200), np.uint8)), "too_large"),
        (tiff(np.zeros((200, 200), np.uint8)), "too_large"),
        (tiff(np.zeros((3, 24, 31), np.uint8), photometric="minisblack"), "frames"),
        (tiff(np.array([[0.0, np.nan]], np.float32)), "not_finite"),
        (tiff(np.array([[0.0, np.inf]], np.float32)), "not_finite"),
        (tiff(np.zeros((24, 31), np.complex64)), "mode"),
        (saved(RGB8, "TIFF", mode="LAB"), "mode"),
        (tiff(FLOAT, photometric="miniswhite"), "mode"),
        (tiff(np.moveaxis(RGB8, 2, 0), photometric="ycbcr", compression="jpeg",
              planarconfig="separate"), "mode"),
        (stray_alpha(RGB8, photometric="ycbcr", compression="jpeg"), "mode"),
    ],
)  # fmt: skip
def test_what_cannot_be_segmented_is_refused_with_a_code_and_repeatable_words(data, code):
    messages = set()
    for _ in range(2):
        with pytest.raises(ImageError) as caught:
            pixels_of(data, RULES)
        assert caught.value.code == code
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "0x" not in messages.pop()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(INDICES), INDICES),
        (palette(), INDICES),
        (palette("TIFF", "PA"), INDICES),
        (saved(BITS), BITS),
        (saved(GRAY16), GRAY16),
        (saved(np.repeat(INDICES[..., None], 3, axis=2)), INDICES),
        (tiff(GRAY16), GRAY16),
        (tiff(GRAY16.astype(np.uint64)), GRAY16),
        (imagecodecs.png_encode(INDICES), INDICES),
        (imagecodecs.png_encode(GRAY16[..., None].repeat(3, 2)), GRAY16),
        (saved(alpha(INDICES[..., None])), INDICES),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_labels_are_ids_and_never_scaled(data, expected):
    labels = labels_of(data, reading(LIMIT, ignore_index=65535), classes=65536)[0]
    np.testing.assert_array_equal(labels, expected.astype(np.uint16))


def test_labels_of_two_and_four_bits_are_not_stretched():
    for bits in (2, 4):
        values = RANDOM.integers(0, 2**bits, (24, 32), dtype=np.uint8)
        packed = values.reshape(24, -1, 8 // bits)
        shifts = np.arange(8 // bits)[::-1] * bits
        rows = np.left_shift(packed, shifts).sum(-1).astype(np.uint8)
        data = _png_of_rows(rows, 32, 24, bits)
        labels = labels_of(data, RULES, 16)[0]
        np.testing.assert_array_equal(labels, values)
        stretched = values * (255 // (2**bits - 1))
        np.testing.assert_array_equal(pixels_of(data, RULES)[0][..., 0], stretched)


def _png_of_rows(rows, width, height, bits):
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(
            ">I", zlib.crc32(kind + body)
        )  # fmt: skip

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_label_values_are_mapped_and_strangers_are_named():
    mask = np.array([[0, 255], [7, 255]], np.uint8)
    rules = reading(LIMIT, label_map={255: 1, 7: 9}, ignore_index=9)
    (labels,) = labels_of(saved(mask), rules, 2)
    assert labels.tolist() == [[0, 1], [9, 1]]
    with pytest.raises(ImageError, match="holds 7, 255, but classes are 0 to 1"):
        labels_of(saved(mask), reading(LIMIT, ignore_index=9), 2)
    with pytest.raises(ImageError, match="coloured"):
        labels_of(saved(RGB8), RULES, 2)
    for dtype in (np.float32, np.complex64):
        with pytest.raises(ImageError, match=np.dtype(dtype).name):
            labels_of(tiff(FLOAT.astype(dtype)), RULES, 2)


def test_the_image_of_a_tiff_is_not_its_thumbnail():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(GRAY8[:8, :8], subfiletype=1)
        writer.write(GRAY8)
    np.testing.assert_array_equal(pixels_of(buffer.getvalue(), RULES)[0][..., 0], GRAY8)


def test_declared_alpha_of_a_tiff_is_dropped():
    data = tiff(alpha(RGB8), photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(pixels_of(data, RULES)[0], RGB8)
    five, extras = np.dstack([alpha(RGB8), GRAY8]), ["unassalpha", "unspecified"]
    stack = tiff(five[None].repeat(2, 0), photometric="rgb", extrasamples=extras, ome=True,
                 metadata={"axes": "ZYXS"})  # fmt: skip
    for data in (tiff(five, photometric="rgb", extrasamples=extras), stack):
        for pixels in pixels_of(data, reading(LIMIT, pages="expand")):
            np.testing.assert_array_equal(pixels, np.dstack([RGB8, GRAY8]))
