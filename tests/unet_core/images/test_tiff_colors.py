"""JPEG and JPEG 2000 in TIFF are in the colors of their own streams, whatever a tag says."""

import io

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.support.data import reading
from unet_core.images import large_tiff
from unet_core.images.codec import decode_images
from unet_core.images.large_tiff import open_large
from unet_core.storage.ranges import Ranged

Y, X = np.mgrid[:64, :64].astype(np.float32)
RGB = np.stack([2 * X + Y, 200 - 2 * X, 40 + Y], axis=-1).clip(0, 255).astype(np.uint8)
JP2_YCBCR, JP2_RGB, JPEG = 33003, 33005, 7


def jp2(pixels):
    return imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", mct=False)


def jpeg(marker):
    """A stream of YCbCr that says so as JFIF, or by Adobe's marker."""
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "JPEG", quality=98, subsampling=0)
    data = buffer.getvalue()
    length = int.from_bytes(data[4:6], "big")
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"
    return data if marker == "JFIF" else data[:2] + adobe + data[4 + length :]


STREAMS = {
    "JPEG 2000, YCbCr": (JP2_YCBCR, jp2(np.asarray(Image.fromarray(RGB).convert("YCbCr")))),
    "JPEG 2000, RGB": (JP2_RGB, jp2(RGB)),
    "JPEG, Adobe": (JPEG, jpeg("Adobe")),
    "JPEG, JFIF": (JPEG, jpeg("JFIF")),
}


@pytest.mark.parametrize("small_pixels", [2**24, 0], ids=["whole", "by window"])
@pytest.mark.parametrize("name", STREAMS)
def test_the_stream_decides_and_not_a_tag_of_rgb(name, small_pixels, monkeypatch):
    compression, stream = STREAMS[name]
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(iter([stream]), shape=RGB.shape, dtype="uint8", tile=(64, 64),
                     photometric="rgb", compression=compression, metadata=None)  # fmt: skip
    data = buffer.getvalue()
    monkeypatch.setattr(large_tiff, "SMALL_PIXELS", small_pixels)
    rules = reading(10**6)
    image = (
        decode_images(data, rules)[0]
        if small_pixels
        else open_large(Ranged(len(data), lambda a, b: data[a:b]), rules)
    )
    off = np.abs(image.whole().pixels_CHW.transpose(1, 2, 0).astype(int) - RGB)
    assert off.max() <= 5
