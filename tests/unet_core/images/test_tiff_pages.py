"""What a page is, for files that are decoded whole and for those that are read by window."""

import io

import numpy as np
import pytest
import tifffile

from tests.support.data import reading
from tests.support.rasters import pixels_of
from unet_core.errors import ImageError
from unet_core.images import large_tiff
from unet_core.images.large_tiff import open_large
from unet_core.images.tiff import decode_tiff
from unet_core.storage.ranges import Ranged

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (96, 80, 3), dtype=np.uint8)
GRAY = RGB[..., 0]
TILES = {"tile": (32, 32)}
RULES = reading(10**6)
APERIO = "Aperio Image Library v11.2.1 \r\n80x96 [0,0 80x96] (32x32) JPEG/RGB Q=95|AppMag = 20"
LEICA = """<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">
<collection name="c" sizeX="1000" sizeY="1000">
<image name="a"><pixels sizeX="20" sizeY="24"><dimension sizeX="20" sizeY="24" r="0" ifd="0"/>
</pixels><view sizeX="8000" sizeY="9600" offsetX="0" offsetY="0"/></image>
<image name="b"><pixels sizeX="80" sizeY="96"><dimension sizeX="80" sizeY="96" r="0" ifd="1"/>
<dimension sizeX="40" sizeY="48" r="1" ifd="2"/></pixels>
<view sizeX="800" sizeY="960" offsetX="50" offsetY="50"/></image>{more}</collection></scn>"""
REGION = """<image name="c"><pixels sizeX="80" sizeY="96"><dimension sizeX="80" sizeY="96" r="0"
ifd="3"/></pixels><view sizeX="800" sizeY="960" offsetX="950" offsetY="50"/></image>"""


def pages(*written):
    """A file of pages, each an array and options."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for array, options in written:
            photometric = "rgb" if array.ndim == 3 else "minisblack"
            writer.write(array, **{"photometric": photometric, "metadata": None} | options)
    return buffer.getvalue()


def with_bits(data, page, bits):
    """The file with another NewSubfileType of a page, which tifffile would not write."""
    buffer = io.BytesIO(data)
    with tifffile.TiffFile(buffer, mode="r+") as file:
        file.pages[page].tags[254].overwrite(bits)
    return buffer.getvalue()


def by_window(data, rules=RULES):
    return open_large(Ranged(len(data), lambda a, b: data[a:b]), rules)


def both(data, monkeypatch, rules=RULES):
    """Pixels HWC of each image decoded whole, and of the same file read by window."""
    whole = pixels_of(data, rules)
    monkeypatch.setattr(large_tiff, "SMALL_PIXELS", 0)
    image = by_window(data, rules)
    return whole, image and image.whole().pixels_CHW.transpose(1, 2, 0)


MASK = ((GRAY > 9), {"subfiletype": 4, "photometric": "mask"})
SLIDE = [
    (RGB, TILES | {"description": APERIO}),
    (RGB[::4, ::4], {"description": APERIO}),
    (RGB[::2, ::2], {"tile": (16, 16), "description": APERIO}),
    (RGB[:30, :90], {"description": "Aperio label", "subfiletype": 1}),
    (RGB[:20, :70], {"description": "Aperio macro", "subfiletype": 9}),
]
ONE_IMAGE = {
    "mask": pages((RGB, TILES), MASK),
    "mask first": pages(MASK, (RGB, TILES)),
    "mask by its colour alone": pages((RGB, TILES), (MASK[0], {"photometric": "mask"})),
    "mask like the image": with_bits(
        pages((RGB, TILES), (RGB, TILES | {"subfiletype": 2})), 1, 4
    ),
    "COG": pages(
        (RGB, TILES), MASK, (RGB[::2, ::2], {"subfiletype": 1}),
        (MASK[0][::2, ::2], {"subfiletype": 5, "photometric": "mask"}),
    ),
    "overview of another kind": pages((RGB, TILES), (GRAY[::3, ::3], {"subfiletype": 1})),
    "pyramid without bits": pages(*((RGB[::n, ::n], {"tile": (16, 16)}) for n in (1, 2, 4))),
    "overviews alone": pages((RGB, TILES | {"subfiletype": 1})),
    "Aperio": pages(*SLIDE),
    "Aperio, thumbnail of the same size": pages(SLIDE[0], (RGB, {"description": APERIO})),
    "Aperio without tiles": pages((RGB, {"description": APERIO}), *SLIDE[1:2]),
    "Leica": pages(
        (RGB[::4, ::4], {"description": LEICA.format(more="")}), (RGB, TILES), (RGB[::2, ::2], {})
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_IMAGE)
def test_a_file_of_one_image_is_one_image(name, monkeypatch):
    whole, in_windows = both(ONE_IMAGE[name], monkeypatch)
    assert len(whole) == 1
    np.testing.assert_array_equal(whole[0], RGB)
    np.testing.assert_array_equal(in_windows, RGB)


@pytest.mark.parametrize(
    "data",
    [
        pages((RGB, TILES), (RGB[::-1], TILES)),
        pages((RGB, TILES), MASK, (RGB[::-1], TILES), MASK),
        pages((RGB, TILES), (RGB[:90], TILES)),
        pages(
            (RGB[::4, ::4], {"description": LEICA.format(more=REGION)}),
            (RGB, TILES), (RGB[::2, ::2], {}), (RGB[::-1], TILES),
        ),
    ],
)  # fmt: skip
def test_several_images_are_refused_by_both(data, monkeypatch):
    monkeypatch.setattr(large_tiff, "SMALL_PIXELS", 0)
    for attempt in (pixels_of, by_window):
        with pytest.raises(ImageError, match="holds 2 pages") as caught:
            attempt(data, RULES)
        assert caught.value.code == "frames"
    assert len(pixels_of(data, reading(10**6, pages="expand"))) == 2


def test_focal_planes_of_a_slide_are_pages(monkeypatch):
    planes = [(array, TILES | {"description": APERIO}) for array in (RGB, RGB[::-1])]
    data = pages(planes[0], SLIDE[1], planes[1], SLIDE[2])
    with pytest.raises(ImageError, match="holds 2 pages"):
        both(data, monkeypatch)
    images, in_windows = both(data, monkeypatch, reading(10**6, pages="expand"))
    assert in_windows is None
    for image, (plane, _) in zip(images, planes, strict=True):
        np.testing.assert_array_equal(image, plane)


def test_pictures_beside_an_ome_slide_are_none(monkeypatch):
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, ome=True) as writer:
        for name, array in (("scan", RGB), ("label image", RGB[:90]), ("Macro", RGB[:, :70])):
            writer.write(array, photometric="rgb", metadata={"axes": "YXS", "Name": name}, **TILES)
    whole, in_windows = both(buffer.getvalue(), monkeypatch)
    assert len(whole) == 1
    np.testing.assert_array_equal(whole[0], RGB)
    np.testing.assert_array_equal(in_windows, RGB)


def test_a_stack_with_a_mask_is_a_stack(monkeypatch):
    planes = [(RGB[..., channel], TILES) for channel in (0, 1, 2)]
    whole, in_windows = both(pages(*planes, MASK), monkeypatch, reading(10**6, axes="CYX"))
    np.testing.assert_array_equal(whole[0], RGB)
    np.testing.assert_array_equal(in_windows, RGB)


def test_countless_planes_of_a_slide_are_refused():
    lying = LEICA.format(more="").replace('r="1" ifd', 'c="99999999" r="1" ifd')
    data = pages((RGB[::4, ::4], {"description": lying}), (RGB, {}), (RGB[::2, ::2], {}))
    with pytest.raises(ImageError, match="planes by its metadata"):
        pixels_of(data, RULES)


def test_a_mask_may_be_a_label_image():
    labels = pages((GRAY > 9, {"subfiletype": 4, "photometric": "mask"}))
    with pytest.raises(ImageError, match="MASK"):
        pixels_of(labels, RULES)
    stored = decode_tiff(labels, RULES, as_labels=True)[0]
    np.testing.assert_array_equal(stored.pixels, GRAY > 9)


def test_a_file_without_pages_is_refused():
    with pytest.raises(ImageError, match="no page"):
        pixels_of(b"II*\0" + (2**20).to_bytes(4, "little") + bytes(100), RULES)
