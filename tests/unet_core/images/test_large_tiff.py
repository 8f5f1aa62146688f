import io
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
import tifffile

from tests.support.data import reading, tiff
from tests.support.rasters import measured, pixels_of
from unet_core.errors import ImageError
from unet_core.images import large_tiff, tiff_segments
from unet_core.images.codec import _decode
from unet_core.images.large_tiff import open_large
from unet_core.images.preprocessing import Preprocessing
from unet_core.images.raster import ArrayRaster
from unet_core.storage.ranges import Ranged
from unet_core.tiling.geometry import Box

RANDOM = np.random.default_rng(0)
HEIGHT, WIDTH = 150, 117
RULES = reading(10**6)
GRAY8 = RANDOM.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
GRAY16 = RANDOM.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
RGB8 = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
RGBA8 = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
RGB16 = RANDOM.integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
FLOAT = RANDOM.normal(size=(HEIGHT, WIDTH)).astype(np.float32)
BITS = RANDOM.integers(0, 2, (HEIGHT, WIDTH)).astype(bool)
FOUR = RANDOM.integers(0, 16, (HEIGHT, WIDTH), dtype=np.uint8)
FIVE_CYX = RANDOM.integers(0, 65536, (5, HEIGHT, WIDTH), dtype=np.uint16)
COLORMAP = RANDOM.integers(0, 65536, (3, 256), dtype=np.uint16)
TILED = {"tile": (32, 48)}
STRIPED = {"rowsperstrip": 7}
CORNERS = [(0, 0, HEIGHT, WIDTH), (0, 0, 1, 1), (HEIGHT - 1, WIDTH - 1, 1, 1), (31, 47, 2, 2)]


@pytest.fixture(autouse=True)
def _small_images_are_large(monkeypatch):
    monkeypatch.setattr(large_tiff, "SMALL_PIXELS", 10_000)
    monkeypatch.setattr(tiff_segments, "BLOCK_BYTES", 2000)


def opened(data, rules=RULES, **options):
    return open_large(Ranged(len(data), lambda a, b: data[a:b]), rules, **options)


def cut(image, *window):
    """Pixels HWC of a window (y, x, height, width)."""
    return image.read(Box(*window)).pixels_CHW.transpose(1, 2, 0)


def pyramid(**options):
    """An OME-TIFF whose smaller levels are SubIFDs."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, ome=True, bigtiff=True) as writer:
        writer.write(RGB8, subifds=2, photometric="rgb", **TILED, **options)
        for step in (2, 4):
            writer.write(RGB8[::step, ::step], subfiletype=1, photometric="rgb", **TILED)
    return buffer.getvalue()


def flat_pyramid():
    """Levels as pages of their own, marked as reduced."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for step, kind in ((1, 0), (2, 1), (4, 1)):
            writer.write(RGB8[::step, ::step], subfiletype=kind, photometric="rgb", **TILED)
    return buffer.getvalue()


def slide():
    """An Aperio slide: a thumbnail after the first page, then a level, a label and an overview."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        about = {"photometric": "rgb", "description": "Aperio Image Library v1", "metadata": None}
        writer.write(RGB8, **TILED, **about)
        writer.write(RGB8[::8, ::8], **about)
        writer.write(RGB8[::4, ::4], tile=(16, 16), **about)
        writer.write(RGB8[::9, ::9], subfiletype=1, **about)
        writer.write(RGB8[::7, ::7], subfiletype=9, **about)
    return buffer.getvalue()


def sparse(**options):
    """Tiles of zeros are not stored."""
    tiles = [None if number % 2 else np.full((32, 48), number, np.uint8) for number in range(15)]
    return tiff(iter(tiles), shape=(HEIGHT, WIDTH), dtype=np.uint8, **TILED, **options)


FILES = {
    "rows": tiff(GRAY8),
    "rows, big endian": tiff(GRAY16.astype(">u2"), byteorder=">"),
    "rows, BigTIFF": tiff(RGB16, photometric="rgb", bigtiff=True),
    "rows, planar": tiff(np.moveaxis(RGB8, 2, 0), photometric="rgb", planarconfig="separate"),
    "rows, float64": tiff(FLOAT.astype(np.float64)),
    "rows, int32": tiff(GRAY16.astype(np.int32)),
    "strips": tiff(GRAY8, compression="deflate", **STRIPED),
    "strips, predictor": tiff(RGB8, photometric="rgb", compression="lzw", predictor=True,
                              **STRIPED),
    "strips, big endian": tiff(GRAY16, byteorder=">", compression="zstd", predictor=True,
                               **STRIPED),
    "strips, planar": tiff(np.moveaxis(RGB16, 2, 0), photometric="rgb", planarconfig="separate",
                           compression="deflate", **STRIPED),
    "strips, bits": tiff(BITS, **STRIPED),
    "strips, float predictor": tiff(FLOAT, compression="deflate", predictor=True, **STRIPED),
    "tiles": tiff(GRAY8, **TILED),
    "tiles, big endian": tiff(RGB16, photometric="rgb", byteorder=">", **TILED),
    "tiles, planar": tiff(np.moveaxis(RGB8, 2, 0), photometric="rgb", planarconfig="separate",
                          compression="lzw", **TILED),
    "tiles, deflate": tiff(RGB8, photometric="rgb", compression="deflate", bigtiff=True, **TILED),
    "tiles, zstd": tiff(GRAY16, compression="zstd", predictor=True, **TILED),
    "tiles, float": tiff(FLOAT, compression="lzw", **TILED),
    "tiles, bits": tiff(BITS, **TILED),
    "tiles, jpeg": tiff(RGB8, photometric="ycbcr", compression="jpeg", subsampling=(2, 2), **TILED),
    "strips, jpeg": tiff(RGB8, photometric="ycbcr", compression="jpeg", rowsperstrip=16),
    "tiles, jpeg gray": tiff(GRAY8, compression="jpeg", **TILED),
    "tiles, jpeg2000": tiff(RGB8, photometric="rgb", compression="jpeg2000", **TILED),
    "tiles, webp": tiff(RGBA8, photometric="rgb", compression="webp", extrasamples=["unassalpha"],
                        **TILED),
    "tiles, png": tiff(RGB16, photometric="rgb", compression="png", **TILED),
    "tiles, jpegxl": tiff(RGB8, photometric="rgb", compression="jpegxl", **TILED),
    "alpha": tiff(RGBA8, photometric="rgb", extrasamples=["unassalpha"], **TILED),
    "no alpha": tiff(RGBA8, photometric="rgb", extrasamples=["unspecified"], **TILED),
    "alpha before another": tiff(RGBA8, photometric="minisblack", planarconfig="contig",
                                 extrasamples=["unassalpha", "unspecified", "assocalpha"], **TILED),
    "gray alpha": tiff(RGBA8[..., :2], photometric="minisblack", planarconfig="contig",
                       extrasamples=["assocalpha"], compression="deflate", **STRIPED),
    "palette": tiff(GRAY8, photometric="palette", colormap=COLORMAP, **TILED),
    "white is zero": tiff(GRAY16, photometric="miniswhite", **TILED),
    "white is zero, bits": tiff(BITS, photometric="miniswhite", **STRIPED),
    "four bits": tiff(FOUR, bitspersample=4, **STRIPED),
    "CMYK": tiff(RGBA8, photometric="separated", **TILED),
    "five channels": tiff(np.moveaxis(FIVE_CYX, 0, -1), photometric="minisblack",
                          planarconfig="contig", **TILED),
    "OME": tiff(FIVE_CYX, ome=True, metadata={"axes": "CYX"}, **TILED),
    "OME, rows": tiff(FIVE_CYX, ome=True, metadata={"axes": "CYX"}),
    "OME, samples": tiff(RGB8[None].repeat(2, 0), ome=True, photometric="rgb",
                         metadata={"axes": "CYXS"}, **TILED),
    "OME, pyramid": pyramid(),
    "OME, pyramid, deflate": pyramid(compression="deflate"),
    "ImageJ": tiff(FIVE_CYX, imagej=True, metadata={"axes": "CYX"}),
    "pyramid": flat_pyramid(),
    "sparse": sparse(),
    "sparse, deflate": sparse(compression="deflate"),
    "sparse, no data": sparse(extratags=[(42113, 2, 4, "17", True)]),
}  # fmt: skip
CHANNELS = {"OME": (3, 1), "five channels": (4, 0), "rows, planar": (2,), "tiles, planar": (2, 0),
            "alpha": (3, 0), "palette": (1,), "OME, samples": (4, 1), "ImageJ": (2,)}  # fmt: skip
CASES = [(name, {}) for name in FILES] + [(name, {"channels": c}) for name, c in CHANNELS.items()]


def windows(count=12):
    """Corners, the whole, and windows at random."""
    random = np.random.default_rng(1)
    yield from CORNERS
    for _ in range(count):
        (y, bottom), (x, right) = (
            sorted(random.choice(length + 1, 2, replace=False)) for length in (HEIGHT, WIDTH)
        )
        yield int(y), int(x), int(bottom - y), int(right - x)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_window_is_that_part_of_the_whole(name, options):
    rules = reading(10**6, **options)
    whole_HWC = pixels_of(FILES[name], rules)[0]
    image = opened(FILES[name], rules)
    assert image.shape == whole_HWC.shape[:2]
    for y, x, height, width in windows():
        window_HWC = cut(image, y, x, height, width)
        np.testing.assert_array_equal(window_HWC, whole_HWC[y : y + height, x : x + width])
        assert window_HWC.dtype == whole_HWC.dtype == image.dtype
        assert window_HWC.dtype.isnative


@pytest.mark.parametrize("name", FILES)
def test_labels_are_what_is_stored(name):
    whole = _decode(FILES[name], RULES, as_labels=True)[0].pixels
    labels = opened(FILES[name], as_labels=True)
    for y, x, height, width in windows(3):
        window = cut(labels, y, x, height, width)
        np.testing.assert_array_equal(window, np.atleast_3d(whole)[y : y + height, x : x + width])
        assert window.dtype == whole.dtype == labels.dtype


@pytest.mark.parametrize("name", ["rows", "rows, planar", "OME, rows", "rows, big endian"])
def test_rows_too_long_for_the_cache_are_read_in_pieces(name, monkeypatch):
    monkeypatch.setattr(tiff_segments, "PIECE_COLUMNS", 50)
    whole_HWC = pixels_of(FILES[name], RULES)[0]
    image = opened(FILES[name], cache_bytes=10_000)
    for y, x, height, width in windows():
        np.testing.assert_array_equal(
            cut(image, y, x, height, width), whole_HWC[y : y + height, x : x + width]
        )


def test_a_slide_is_its_first_page():
    np.testing.assert_array_equal(cut(opened(slide()), 0, 0, HEIGHT, WIDTH), RGB8)


class RangeFile:
    """Remembers what was read of a file."""

    def __init__(self, data):
        self.data, self.reads = data, []

    def __call__(self, start, stop):
        self.reads.append((start, stop))
        return self.data[start:stop]


def test_only_touched_segments_are_read_and_each_once(monkeypatch):
    monkeypatch.setattr(large_tiff, "READ_BYTES", 512)
    ranges = RangeFile(FILES["tiles, deflate"])
    image = open_large(Ranged(len(ranges.data), ranges), RULES)
    assert sum(stop - start for start, stop in ranges.reads) < len(ranges.data) / 3
    ranges.reads.clear()
    cut(image, 0, 0, 30, 40)
    cut(image, 30, 46, 4, 4)
    cut(image, 10, 10, 5, 5)
    assert len(ranges.reads) == 4
    assert len(set(ranges.reads)) == 4


def test_only_chosen_channels_are_read():
    ranges = RangeFile(FILES["OME"])
    file = Ranged(len(ranges.data), ranges)
    image = open_large(file, reading(10**6, channels=(2, 4)))
    ranges.reads.clear()
    cut(image, 0, 0, 10, 10)
    assert len(ranges.reads) == 2


def test_threads_share_segments_and_failures():
    data = FILES["tiles, zstd"]
    ranges = RangeFile(data)
    image = open_large(Ranged(len(data), ranges), RULES)
    ranges.reads.clear()
    start = threading.Barrier(8)

    def read(number):
        if number < 8:
            start.wait()
        y, x = number * 7 % 100, number * 11 % 80
        return np.array_equal(cut(image, y, x, 40, 37)[..., 0], GRAY16[y : y + 40, x : x + 37])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(64)))
    assert len(ranges.reads) == len(set(ranges.reads)) <= 15


def test_small_images_and_other_formats_are_left_to_the_decoder():
    assert opened(tiff(GRAY8[:100, :100], **TILED)) is None
    assert opened(imagecodecs.png_encode(RGB8)) is None
    assert opened(b"") is None


def test_files_that_cannot_be_read_by_window_are_left_to_the_decoder(monkeypatch):
    stack = tiff(FIVE_CYX, photometric="minisblack")
    assert opened(stack, reading(10**6, pages="expand")) is None
    hidden = tiff(FIVE_CYX, imagej=True, metadata={"axes": "CYX"}, truncate=True)
    assert opened(hidden) is None
    volume = tiff(FIVE_CYX, photometric="minisblack", volumetric=True, tile=(16, 16, 16))
    assert opened(volume, reading(10**6, pages="expand")) is None
    monkeypatch.setattr(tiff_segments, "STRIP_BYTES", 10_000)
    assert opened(tiff(GRAY8, compression="deflate")) is None


@pytest.mark.parametrize(
    ("data", "rules", "code"),
    [
        (tiff(FIVE_CYX, photometric="minisblack"), {}, "frames"),
        (tiff(FIVE_CYX, ome=True, metadata={"axes": "ZYX"}), {}, "frames"),
        (tiff(FIVE_CYX, photometric="minisblack"), {"axes": "TCYX"}, "axes"),
        (tiff(FIVE_CYX, photometric="miniswhite"), {"axes": "CYX"}, "mode"),
        (FILES["OME"], {"channels": (5,)}, "channels"),
        (FILES["tiles"], {"channels": (1,)}, "channels"),
        (tiff(RGB8, photometric="cielab", **TILED), {}, "mode"),
        (tiff(FLOAT.astype(np.complex64), **TILED), {}, "mode"),
    ],
)
def test_what_the_decoder_refuses_is_refused_from_the_header(data, rules, code):
    for attempt in (opened, pixels_of):
        with pytest.raises(ImageError) as caught:
            attempt(data, reading(10**6, **rules))
        assert caught.value.code == code


def test_a_declared_stack_of_channels_needs_no_metadata():
    data = tiff(FIVE_CYX, photometric="minisblack", **TILED)
    window_HWC = cut(opened(data, reading(10**6, axes="CYX")), 30, 40, 50, 60)
    np.testing.assert_array_equal(window_HWC, np.moveaxis(FIVE_CYX, 0, -1)[30:80, 40:100])


def test_a_window_beyond_the_image_is_a_mistake():
    image = opened(FILES["tiles"])
    for window in ((-1, 0, 5, 5), (0, 0, HEIGHT + 1, 5), (0, 0, 0, 5), (0, WIDTH, 1, 1)):
        with pytest.raises(ValueError, match="no window"):
            cut(image, *window)


def test_nan_is_refused_in_the_windows_that_hold_it():
    pixels = FLOAT.copy()
    pixels[70, 60] = np.nan
    image = opened(tiff(pixels, **TILED))
    np.testing.assert_array_equal(cut(image, 71, 0, 40, 117)[..., 0], FLOAT[71:111])
    with pytest.raises(ImageError, match="NaN") as caught:
        cut(image, 60, 50, 20, 20)
    assert caught.value.code == "not_finite"


def with_tag(data, code, change, dtype=None):
    """The file with another value of a tag of its first page."""
    buffer = io.BytesIO(data)
    with tifffile.TiffFile(buffer, mode="r+") as file:
        tag = file.pages[0].tags[code]
        tag.overwrite(change(tag.value), dtype=dtype)
    return buffer.getvalue()


def values_of(data, code):
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        return file.pages[0].tags[code].value


OFFSETS, COUNTS = 324, 325


def test_a_damaged_segment_spoils_only_the_windows_that_touch_it():
    data = FILES["tiles, zstd"]
    offset = values_of(data, OFFSETS)[4]
    image = opened(data[:offset] + bytes(16) + data[offset + 16 :])
    np.testing.assert_array_equal(cut(image, 0, 0, 32, 117)[..., 0], GRAY16[:32])
    for _ in range(2):  # failures are not remembered as pixels
        with pytest.raises(ImageError, match="row 32, column 48") as caught:
            cut(image, 0, 0, HEIGHT, WIDTH)
        assert caught.value.code == "decode"


def test_a_value_without_a_colour_spoils_only_the_windows_that_hold_it():
    pixels = GRAY8 // 16
    pixels[70, 60] = 200
    data = tiff(pixels, photometric="palette", colormap=COLORMAP, **TILED)
    image = opened(with_tag(data, 320, lambda colors: colors[:, :16].ravel()))
    assert cut(image, 71, 0, 40, 117).shape == (40, 117, 3)
    with pytest.raises(ImageError, match="row 60, column 50: index 200 is out of bounds") as caught:
        cut(image, 60, 50, 20, 20)
    assert caught.value.code == "decode"


@pytest.mark.parametrize("name", ["tiles", "tiles, deflate", "strips", "rows"])
def test_a_truncated_file_is_refused(name):
    data = FILES[name]
    beginning = data[: len(data) * 2 // 3]
    with pytest.raises(ImageError) as caught:
        cut(opened(beginning), 0, 0, HEIGHT, WIDTH)
    assert caught.value.code == "decode"


def test_a_file_that_has_become_shorter_is_refused():
    data = FILES["tiles"]
    file = [data]
    image = open_large(Ranged(len(data), lambda a, b: file[0][a:b]), RULES)
    file[0] = data[:15_000]
    with pytest.raises(ImageError, match="changed while it was read") as caught:
        cut(image, 0, 0, HEIGHT, WIDTH)
    assert caught.value.code == "changed"


@pytest.mark.parametrize(
    ("code", "value"), [(COUNTS, 2**62), (COUNTS, 2**20), (OFFSETS, 2**63), (OFFSETS, 2**64 - 1)]
)
def test_segments_beyond_the_file_are_refused_unread(code, value):
    data = FILES["tiles, deflate"]
    image = opened(with_tag(data, code, lambda values: (value, *values[1:]), "Q"))
    with pytest.raises(ImageError) as caught:
        cut(image, 0, 0, 5, 5)
    assert caught.value.code in ("decode", "too_large")


def test_headers_that_lie_about_sizes_are_refused(monkeypatch):
    data = FILES["tiles, zstd"]
    huge_tiles = with_tag(with_tag(data, 322, lambda _: 65520), 323, lambda _: 65520)
    with pytest.raises(ImageError, match="tiles of") as caught:
        opened(huge_tiles)
    assert caught.value.code == "too_large"
    with pytest.raises(ImageError, match="15 strips or tiles"):
        opened(with_tag(data, 257, lambda _: 65000))
    monkeypatch.setattr(large_tiff, "TAG_BYTES", 50)
    with pytest.raises(ImageError, match="header value"):
        opened(data)
    monkeypatch.setattr(large_tiff, "HEADER_BYTES", 100)
    with pytest.raises(ImageError, match="header takes"):
        opened(data)


def test_a_huge_image_in_a_small_tile_is_not_decoded():
    data = FILES["tiles, jpeg2000"]
    bomb = imagecodecs.jpeg2k_encode(np.zeros((3000, 3000), np.uint8), level=0, codecformat="j2k")
    offset, end, *_ = values_of(data, OFFSETS)
    assert len(bomb) < end - offset
    data = data[:offset] + bomb + data[offset + len(bomb) :]
    with pytest.raises(ImageError, match="3000 × 3000 pixels in a segment"):
        cut(opened(data), 0, 0, 5, 5)


def test_metadata_of_countless_planes_is_refused():
    honest = values_of(tiff(GRAY8, ome=True, metadata={"axes": "YX"}), 270)
    data = tiff(GRAY8, description=honest.replace('SizeT="1"', 'SizeT="99999999"'), metadata=None)
    for attempt in (opened, pixels_of):
        with pytest.raises(ImageError, match="99999999 planes by its metadata"):
            attempt(data, RULES)


def test_any_damage_to_a_header_is_an_image_error_or_other_pixels():
    data = FILES["tiles, deflate"]
    ifd = struct.unpack_from("<Q", data, 8)[0]
    random = np.random.default_rng(2)
    for _ in range(300):
        damaged = bytearray(data)
        at = int(random.integers(ifd, ifd + 420))
        damaged[at % len(data)] = int(random.integers(256))
        try:
            image = opened(bytes(damaged))
            if image is not None and image.shape[0] * image.shape[1] < 10**6:
                cut(image, 0, 0, *image.shape)
        except ImageError:
            pass


def test_statistics_of_a_large_tiff_are_those_of_its_pixels():
    image = opened(FILES["tiles, deflate"])
    wanted = Preprocessing(color="rgb", normalization="percentile")
    in_memory = ArrayRaster(RGB8.transpose(2, 0, 1))
    np.testing.assert_array_equal(measured(image, wanted), measured(in_memory, wanted))
