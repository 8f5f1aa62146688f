"""Which pixels of TIFFs are pixels: the same for files decoded whole and read by window."""

import io

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.data import reading, tiff
from unet_core.images import large_tiff, tiff_segments
from unet_core.images.codec import decode_images
from unet_core.images.large_tiff import open_large
from unet_core.storage.ranges import Ranged
from unet_core.tiling.geometry import Box

RANDOM = np.random.default_rng(0)
HEIGHT, WIDTH = 75, 90
GRAY = RANDOM.integers(1, 200, (HEIGHT, WIDTH), dtype=np.uint8)
RGB = RANDOM.integers(1, 200, (HEIGHT, WIDTH, 3), dtype=np.uint8)
YY, XX = np.mgrid[:HEIGHT, :WIDTH]
INSIDE = (YY + XX > 40) & (YY + XX < 120)
TILES = {"tile": (16, 32)}
RULES = reading(10**6)


@pytest.fixture(autouse=True)
def _every_image_is_large(monkeypatch):
    monkeypatch.setattr(large_tiff, "SMALL_PIXELS", 0)
    monkeypatch.setattr(tiff_segments, "BLOCK_BYTES", 2000)


def tagged(nodata):
    return {"extratags": [(42113, 2, 0, nodata, True)], "metadata": None}


def opened(data, rules=RULES):
    return open_large(Ranged(len(data), lambda a, b: data[a:b]), rules)


def assert_windows_are_parts(image, whole):
    """Pixels and validity of windows are those of the whole."""
    random = np.random.default_rng(1)
    shape_HW, shape_CHW = image.shape, whole.pixels_CHW.shape
    corners = [(0, 0, 1, 1), (0, 0, 20, 20), (0, 0, *shape_HW)]
    for _ in range(8):
        (y, bottom), (x, right) = (
            sorted(random.choice(side + 1, 2, replace=False).tolist()) for side in shape_HW
        )
        corners.append((y, x, bottom - y, right - x))
    for corner in corners:
        box = Box(*corner)
        window = image.read(box)
        np.testing.assert_array_equal(window.pixels_CHW, whole.pixels_CHW[:, *box.slices])
        for found, all_of_it, shape in (
            (valid_of(window), valid_of(whole), shape_HW),
            (known_of(window), known_of(whole), shape_CHW),
        ):
            there = np.broadcast_to(all_of_it, shape)[..., *box.slices]
            np.testing.assert_array_equal(np.broadcast_to(found, there.shape), there)


def valid_of(window):
    return np.True_ if window.valid_HW is None else window.valid_HW


def known_of(window):
    return valid_of(window) if window.known_CHW is None else window.known_CHW


def contents(data, rules=RULES):
    """Pixels HWC, where they are pixels, and which samples are known (HWC)."""
    (image,) = decode_images(data, rules)
    whole = image.whole()
    assert_windows_are_parts(opened(data, rules), whole)
    shape_HWC = whole.pixels_CHW.shape[1:] + whole.pixels_CHW.shape[:1]
    known = known_of(whole)
    return (
        whole.pixels_CHW.transpose(1, 2, 0),
        np.broadcast_to(valid_of(whole), image.shape),
        np.broadcast_to(
            known.transpose(1, 2, 0) if known.ndim == 3 else known[..., None], shape_HWC
        ),
    )


def outside_is(value, pixels, dtype):
    stored = pixels.astype(dtype)
    stored[~INSIDE] = value
    return stored


@pytest.mark.parametrize(
    ("text", "dtype", "value"),
    [
        ("0", "uint8", 0),
        ("255 ", "uint8", 255),
        ("255.0", "uint8", 255),
        ("65535", ">u2", 65535),
        ("-9999", "int16", -9999),
        ("-2147483648", "int32", -(2**31)),
        ("-9999", "float32", -9999),
        ("-3.40282346638529e+38", "float32", np.finfo(np.float32).min),
        ("-3.4028234663852886e+38", "float32", np.finfo(np.float32).min),
        ("0.1", "float32", np.float32(0.1)),
        ("1e20", "float64", 1e20),
        ("nan", "float32", np.nan),
        ("inf", "float32", np.inf),
    ],
)
def test_a_declared_value_is_no_pixel(text, dtype, value):
    stored = outside_is(value, GRAY, dtype)
    pixels, valid, _ = contents(tiff(stored, **tagged(text), **TILES))
    np.testing.assert_array_equal(valid, INSIDE)
    np.testing.assert_array_equal(pixels[INSIDE, 0], GRAY[INSIDE])


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("-9999", "uint8"), ("256", "uint8"), ("0.5", "uint8"), ("nan", "uint16"), ("none", "uint8"),
     ("", "uint8"), ("0x00", "uint8"), ("1e300", "float32"), ("9" * 400, "int32")],
)  # fmt: skip
def test_a_value_that_the_type_has_not_means_none(text, dtype):
    _, valid, _ = contents(tiff(outside_is(0, GRAY, dtype), **tagged(text), **TILES))
    assert valid.all()


def test_the_config_overrules_the_file():
    data = tiff(outside_is(7, np.where(GRAY == 7, 8, GRAY), np.uint8), **tagged("0"), **TILES)
    assert contents(data)[1].all()
    np.testing.assert_array_equal(contents(data, reading(10**6, nodata=7))[1], INSIDE)


def test_one_band_that_is_nodata_leaves_the_pixel_valid():
    stored = RGB.copy()
    stored[~INSIDE] = 0
    stored[30, 40:45, 1] = 0
    for layout in (
        tiff(stored, photometric="rgb", **tagged("0"), **TILES),
        tiff(np.moveaxis(stored, 2, 0), photometric="rgb", planarconfig="separate", **tagged("0")),
        tiff(np.moveaxis(stored, 2, 0), ome=True, metadata={"axes": "CYX"}, **TILES,
             extratags=tagged("0")["extratags"]),
    ):  # fmt: skip
        _, valid, known = contents(layout)
        np.testing.assert_array_equal(valid, INSIDE)
        np.testing.assert_array_equal(known, stored > 0)
        _, valid, _ = contents(layout, reading(10**6, channels=(1,)))
        np.testing.assert_array_equal(valid, stored[..., 1] > 0)
        _, valid, _ = contents(layout, reading(10**6, channels=(2, 1)))
        np.testing.assert_array_equal(valid, INSIDE)


def test_stored_values_are_compared_before_their_colours():
    stored = outside_is(0, GRAY, np.uint8)
    colormap = np.zeros((3, 256), np.uint16)
    for data in (
        tiff(stored, photometric="palette", colormap=colormap, **tagged("0"), **TILES),
        tiff(stored, photometric="miniswhite", **tagged("0"), **TILES),
        tiff(np.dstack([stored] * 4), photometric="separated", **tagged("0"), **TILES),
        tiff(stored // 16 + INSIDE, bitspersample=4, **tagged("0"), rowsperstrip=7),
    ):
        np.testing.assert_array_equal(contents(data)[1], INSIDE)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("is_planar", [False, True])
def test_alpha_says_which_pixels_are_valid(kind, is_planar):
    rgba = np.dstack([RGB, np.where(INSIDE, GRAY, 0)])
    planar = {"planarconfig": "separate" if is_planar else "contig", "photometric": "rgb"}
    stored = np.moveaxis(rgba, 2, 0) if is_planar else rgba
    data = tiff(stored, extrasamples=[kind], **planar, **TILES)
    pixels, valid, _ = contents(data)
    np.testing.assert_array_equal(pixels, RGB)
    np.testing.assert_array_equal(valid, INSIDE)
    np.testing.assert_array_equal(contents(data, reading(10**6, channels=(2, 0)))[1], INSIDE)
    assert contents(data, reading(10**6, channels=(0, 3)))[1].all()
    assert contents(data, reading(10**6, nodata="none"))[1].all()
    nodata = tiff(stored, extrasamples=[kind], **planar, **tagged(str(RGB[40, 30, 0])), **TILES)
    _, valid, known = contents(nodata)
    np.testing.assert_array_equal(
        known, (RGB[40, 30, 0] != RGB) & INSIDE[..., None] | (known & ~INSIDE[..., None])
    )
    np.testing.assert_array_equal(valid, INSIDE & (RGB[40, 30, 0] != RGB).any(axis=2))


@pytest.mark.parametrize("constant", [0, 255])
def test_constant_alpha_says_nothing(constant):
    rgba = np.dstack([RGB, np.full_like(GRAY, constant)])
    pixels, valid, _ = contents(tiff(rgba, photometric="rgb", extrasamples=["unassalpha"], **TILES))
    np.testing.assert_array_equal(pixels, RGB)
    assert valid.all()


def test_alpha_is_asked_for_no_longer_than_until_it_is_seen():
    alpha = np.zeros_like(GRAY)
    alpha[0, 40] = 1
    data = tiff(np.dstack([RGB, alpha]), photometric="rgb", extrasamples=["unassalpha"],
                compression="deflate", **TILES)  # fmt: skip
    reads = []

    def read(start, stop):
        reads.append(start)
        return data[start:stop]

    image = open_large(Ranged(len(data), read), RULES)
    reads.clear()
    for _ in range(3):
        assert not image.read(Box(70, 0, 5, 30)).valid_HW.any()
    assert len(reads) == 3  # the window's tile, and the first two of the image


def masked(mask, **options):
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(RGB, photometric="rgb", metadata=None, **TILES, **options)
        writer.write(mask, subfiletype=4, photometric="mask", metadata=None, **TILES)
    return buffer.getvalue()


def test_a_mask_page_says_which_pixels_are_valid():
    pixels, valid, _ = contents(masked(INSIDE))
    np.testing.assert_array_equal(pixels, RGB)
    np.testing.assert_array_equal(valid, INSIDE)
    assert contents(masked(INSIDE), reading(10**6, nodata="none"))[1].all()
    both = contents(masked(INSIDE, **{"extratags": [(42113, 2, 0, "7", True)]}))
    np.testing.assert_array_equal(both[1], INSIDE & (RGB != 7).any(axis=2))
    small = masked(INSIDE[:40])
    assert contents(small)[1].all()


def test_each_page_has_its_own_mask():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for mask in (INSIDE, ~INSIDE):
            writer.write(GRAY, metadata=None)
            writer.write(mask, subfiletype=4, photometric="mask", metadata=None)
    images = decode_images(buffer.getvalue(), reading(10**6, pages="expand"))
    np.testing.assert_array_equal(images[0].whole().valid_HW, INSIDE)
    np.testing.assert_array_equal(images[1].whole().valid_HW, ~INSIDE)


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_tiles_that_were_never_written_are_nodata(compression):
    tiles = [None if n % 2 else np.full((16, 32), 9, np.uint8) for n in range(15)]
    options = {"shape": (HEIGHT, WIDTH), "dtype": np.uint8, "compression": compression, **TILES}
    is_written = ((YY // 16 * 3 + XX // 32) % 2) == 0
    pixels, valid, _ = contents(tiff(iter(tiles), **tagged("17"), **options))
    np.testing.assert_array_equal(pixels[..., 0], np.where(is_written, 9, 17))
    np.testing.assert_array_equal(valid, is_written)
    for text, rules in (("-1", RULES), ("17", reading(10**6, nodata="none"))):
        pixels, valid, _ = contents(tiff(iter(tiles), **tagged(text), **options), rules)
        assert valid.all()
        assert pixels[0, 40, 0] == (0 if text == "-1" else 17)
    _, valid, _ = contents(tiff(iter(tiles), metadata=None, **options), reading(10**6, nodata=3))
    np.testing.assert_array_equal(valid, is_written)


def test_labels_are_never_invalid():
    labels = open_large(
        Ranged(
            len(data := masked(INSIDE, **{"extratags": [(42113, 2, 0, "7", True)]})),
            lambda a, b: data[a:b],
        ),
        reading(10**6, nodata=5),
        as_labels=True,
    )
    assert labels.whole().valid_HW is None
    np.testing.assert_array_equal(labels.whole().pixels_CHW, RGB.transpose(2, 0, 1))


NODATA = {
    "uint8": ("0", "255", "201"), "uint16": ("0", "65535", "201"), "int16": ("-9999", "0"),
    "float32": ("-9999", "nan", "-3.40282346638529e+38", "0"),
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(d, v) for d, values in NODATA.items() for v in values]),
    st.sampled_from([None, "deflate", "lzw", "zstd"]),
    st.booleans(),
    st.sampled_from([{"tile": (16, 32)}, {"rowsperstrip": 7}, {}]),
    st.sampled_from([1, 3, 5]),
    st.integers(0, 2**32 - 1),
)
def test_no_nodata_value_changes_what_is_valid(kind, compression, is_planar, layout, bands, seed):
    random = np.random.default_rng(seed)
    scene = random.integers(1, 200, (HEIGHT, WIDTH, bands))
    is_known = random.random(scene.shape) > 0.1
    is_known[~INSIDE] = False
    dtype, text = kind
    stored = np.where(is_known, scene, np.float64(text)).astype(dtype)
    if dtype == "float32" and text.startswith("-3.4"):
        stored[~is_known] = np.finfo(np.float32).min
    options = {"photometric": "minisblack", "compression": compression, **layout, **tagged(text)}
    if bands > 1:
        options["planarconfig"] = "separate" if is_planar else "contig"
    if bands == 1:
        stored = stored[..., 0]
    elif is_planar:
        stored = np.moveaxis(stored, 2, 0)
    with np.errstate(all="ignore"):
        pixels, valid, known = contents(tiff(stored, **options))
    np.testing.assert_array_equal(valid, is_known.any(axis=2))
    np.testing.assert_array_equal(known, is_known)
    np.testing.assert_array_equal(pixels[is_known], scene[is_known])
