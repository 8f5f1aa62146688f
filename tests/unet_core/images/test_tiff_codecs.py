"""Colors of JPEG and JPEG 2000 in TIFFs, and full scales."""

import imagecodecs
import numpy as np
import openslide
import pytest
from PIL import Image

from tests.support.data import reading, tiff
from unet_core.errors import ImageError
from unet_core.images import large_tiff
from unet_core.images.codec import decode_images
from unet_core.images.large_tiff import open_large
from unet_core.storage.ranges import Ranged

RULES = reading(10**6)
RANDOM = np.random.default_rng(0)
RGB = np.asarray(
    Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64), 3)
)
YCC = np.asarray(Image.fromarray(RGB).convert("YCbCr"))
RGB_TAG, YCC_TAG = 2, 6


def both(data, monkeypatch):
    """The image of a file decoded whole, which equals the one read by window."""
    (image,) = decode_images(data, RULES)
    monkeypatch.setattr(large_tiff, "SMALL_PIXELS", 0)
    by_window = open_large(Ranged(len(data), lambda a, b: data[a:b]), RULES)
    assert by_window.full_scale == image.full_scale
    np.testing.assert_array_equal(by_window.whole().pixels_CHW, image.whole().pixels_CHW)
    return image


def one_tile(encoded, compression, tag, **about):
    """A TIFF of one tile that is encoded already."""
    options = {"outcolorspace": tag} if compression == 7 else {}
    return tiff(
        iter([encoded]), shape=RGB.shape, dtype=np.uint8, tile=(64, 64), metadata=None,
        photometric=tag, compression=compression, compressionargs=options, **about,
    )  # fmt: skip


def jpeg(space, *, has_markers):
    """A JPEG of RGB in a color space, whose component ids are R, G, B or 1, 2, 3."""
    data = imagecodecs.jpeg8_encode(RGB, 100, colorspace="rgb", outcolorspace=space,
                                    subsampling="444")  # fmt: skip
    marker_bytes = 2 + int.from_bytes(data[4:6], "big")
    assert data[3] in (0xE0, 0xEE)
    return data if has_markers else data[:2] + data[2 + marker_bytes :]


@pytest.mark.parametrize(
    ("space", "has_markers", "tag"),
    [("rgb", True, RGB_TAG), ("rgb", True, YCC_TAG), ("rgb", False, YCC_TAG),
     ("ycbcr", True, RGB_TAG), ("ycbcr", True, YCC_TAG), ("ycbcr", False, YCC_TAG)],
)  # fmt: skip
def test_what_a_jpeg_says_of_its_colours_holds(space, has_markers, tag, monkeypatch):
    image = both(one_tile(jpeg(space, has_markers=has_markers), 7, tag), monkeypatch)
    found = image.whole().pixels_CHW.transpose(1, 2, 0).astype(int)
    assert abs(found - RGB).max() <= 5


def test_a_jpeg_that_says_nothing_is_what_the_tag_says(monkeypatch):
    image = both(one_tile(jpeg("ycbcr", has_markers=False), 7, RGB_TAG), monkeypatch)
    found = image.whole().pixels_CHW.transpose(1, 2, 0).astype(int)
    assert abs(found - YCC).max() <= 3


def jpeg2000(pixels, space="UNSPECIFIED", codec="j2k"):
    return imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, codecformat=codec,
                                     colorspace=imagecodecs.JPEG2K.CLRSPC[space])  # fmt: skip


@pytest.mark.parametrize(
    ("pixels", "compression", "tag", "header"),
    [
        (YCC, 33003, RGB_TAG, {}),
        (YCC, 33003, YCC_TAG, {}),
        (YCC, 33003, RGB_TAG, {"codec": "jp2", "space": "SYCC"}),
        (RGB, 33005, RGB_TAG, {}),
        (RGB, 34712, RGB_TAG, {}),
        (YCC, 34712, YCC_TAG, {}),
        (YCC, 34712, RGB_TAG, {"codec": "jp2", "space": "SYCC"}),
        (YCC, 34712, YCC_TAG, {"codec": "jp2", "space": "SYCC"}),
        (RGB, 34712, YCC_TAG, {"codec": "jp2", "space": "SRGB"}),
    ],
)
def test_jpeg_2000_is_in_its_own_colours(pixels, compression, tag, header, monkeypatch):
    image = both(one_tile(jpeg2000(pixels, **header), compression, tag), monkeypatch)
    found = image.whole().pixels_CHW.transpose(1, 2, 0).astype(int)
    assert abs(found - RGB).max() <= 3


def test_ycbcr_of_16_bits_is_refused():
    data = tiff(iter([jpeg2000(YCC.astype(np.uint16))]), shape=RGB.shape, dtype=np.uint16,
                tile=(64, 64), metadata=None, photometric=RGB_TAG, compression=33003)  # fmt: skip
    with pytest.raises(ImageError, match="uint16"):
        decode_images(data, RULES)


@pytest.mark.parametrize(
    ("dtype", "options", "full_scale"),
    [
        (np.uint8, {}, 255),
        (np.uint16, {}, 65535),
        (np.uint32, {}, 2**32 - 1),
        (np.int8, {}, 127),
        (np.int16, {}, 32767),
        (np.int32, {}, 2**31 - 1),
        (np.int64, {}, 2**63 - 1),
        (np.float32, {}, 1),
        (np.float64, {}, 1),
        (bool, {}, 255),
        (np.uint8, {"bitspersample": 2}, 255),
        (np.uint8, {"bitspersample": 4}, 255),
        (np.uint8, {"bitspersample": 6}, 63),
        (np.uint16, {"bitspersample": 10}, 1023),
        (np.uint16, {"bitspersample": 12}, 4095),
        (np.uint16, {"photometric": "miniswhite"}, 65535),
        (np.uint16, {"extratags": [(281, 3, 1, 4095, True)]}, 65535),
        (np.uint8, {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, 255),
    ],
)
def test_the_full_scale_is_that_of_the_stored_bits(dtype, options, full_scale, monkeypatch):
    pixels = (RGB[..., 0] % 2).astype(dtype)
    assert both(tiff(pixels, rowsperstrip=8, **options), monkeypatch).full_scale == float(
        full_scale
    )


@pytest.mark.parametrize(
    ("encoded", "compression", "tag", "most"),
    [
        (jpeg2000(YCC), 33003, RGB_TAG, 1),
        (jpeg2000(RGB), 33005, RGB_TAG, 0),
        (jpeg("ycbcr", has_markers=False), 7, RGB_TAG, 0),
        (jpeg("ycbcr", has_markers=True), 7, YCC_TAG, 0),
        (jpeg("rgb", has_markers=False), 7, RGB_TAG, 0),
    ],
)
def test_openslide_sees_the_same_colours(encoded, compression, tag, most, tmp_path):
    data = one_tile(encoded, compression, tag, description="Aperio Image Library v11.2.1 \r\n64x64")
    (tmp_path / "a.svs").write_bytes(data)
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        expected = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3].astype(int)
    (image,) = decode_images(data, RULES)
    found = image.whole().pixels_CHW.transpose(1, 2, 0)
    assert abs(found - expected).max() <= most
