import io
import json

import numpy as np
import openslide
import pytest
import rasterio
import tifffile
from PIL import Image

from tests.reference.overviews import halved
from unet_core.export.mask_images import Appearance, encode_png, encode_tiff
from unet_core.export.overviews import level_shapes, most_frequent
from unet_core.images.georeference import DEFINED, Georeference
from unet_core.networks.header import palette_of

RANDOM = np.random.default_rng(0)
UTM = Georeference("EPSG:32633", (10.0, 0.0, 500000.0, 0.0, -10.0, 4200000.0), (10.0, 10.0), "m")
ROTATED = Georeference("EPSG:3857", (8.0, 1.0, 5.0, 1.0, -8.0, 7.0), None, "m")
DEGREES = Georeference("EPSG:4326", (0.5, 0.0, -180.0, 0.0, -0.5, 90.0), (0.5, 0.5), "degree")
SLIDE = Georeference(None, None, (0.5, 0.25), "µm")


def ids_with_nodata(height, width, classes=3, nodata=255):
    ids_HW = RANDOM.integers(0, classes, (-(-height // 16), -(-width // 16)), dtype=np.uint8)
    ids_HW[0] = nodata
    return ids_HW.repeat(16, 0).repeat(16, 1)[:height, :width]


def written(ids_HW, look, tmp_path, rows=1024):
    bands = (ids_HW[y : y + rows] for y in range(0, len(ids_HW), rows))
    path = tmp_path / "mask.tif"
    with encode_tiff(ids_HW.shape, bands, look) as file:
        file.seek(0)
        path.write_bytes(file.read())
    return path


@pytest.mark.parametrize(
    ("nodata", "kind"), [(255, "u1"), (None, "u1"), (65535, "<u2"), (None, "u4")]
)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (7, 9), (40, 31), (33, 64)])
def test_an_overview_has_the_most_frequent_ids(shape, nodata, kind):
    ids_HW = RANDOM.choice(np.array([0, 1, 2, nodata or 3], kind), shape)
    small_HW = most_frequent(ids_HW, nodata)
    np.testing.assert_array_equal(small_HW, halved(ids_HW, nodata), strict=True)


def test_nodata_of_a_png_is_transparent_and_reads_back(tmp_path):
    ids_HW = ids_with_nodata(64, 80)
    with encode_png(ids_HW, Appearance(palette_of(3), 255)) as file:
        file.seek(0)
        shown = Image.open(io.BytesIO(file.read()))
    assert (np.asarray(shown) == ids_HW).all()
    assert ((np.asarray(shown.convert("RGBA"))[..., 3] == 0) == (ids_HW == 255)).all()


@pytest.mark.parametrize("where", [UTM, ROTATED, DEGREES])
def test_gis_reads_place_nodata_and_overviews(where, tmp_path):
    ids_HW = ids_with_nodata(300, 4200)
    path = written(ids_HW, Appearance(palette_of(3), 255, where), tmp_path, rows=256)
    with rasterio.open(path) as opened:
        assert opened.crs == rasterio.CRS.from_string(where.crs)
        assert tuple(opened.transform)[:6] == where.transform
        assert opened.nodata == 255
        assert ((opened.dataset_mask() > 0) == (ids_HW != 255)).all()
        assert (opened.read(1) == ids_HW).all()
        assert opened.overviews(1) == [2, 4, 8, 16]
        small_HW = most_frequent(most_frequent(ids_HW, 255), 255)
    with rasterio.open(path, overview_level=1) as opened:
        assert (opened.read(1) == small_HW).all()


def test_slide_viewers_read_size_resolution_and_levels(tmp_path):
    ids_HW = ids_with_nodata(4500, 2100)
    path = written(ids_HW, Appearance(palette_of(3), 255, SLIDE), tmp_path)
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (2100, 4500)
        assert slide.level_dimensions == ((2100, 4500), (1050, 2250), (525, 1125), (263, 563),
                                          (132, 282))  # fmt: skip
        mpp = [float(slide.properties[f"openslide.mpp-{axis}"]) for axis in "yx"]
        assert mpp == pytest.approx([0.5, 0.25])
        shown = np.asarray(slide.read_region((0, 16), 0, (64, 64)))[..., :3]
        colors = np.array(palette_of(3), np.uint8)
        assert (shown == colors[ids_HW[16:80, :64]]).all()


def test_names_of_systems_need_not_be_ascii(tmp_path):
    """French, Portuguese … citations are UTF-8."""
    name, wanted = "Réseau géodésique|", 3857
    keys = [1, 1, 0, 4, 1024, 0, 1, 1, 1025, 0, 1, 1, 1026, 34737, len(name.encode()), 0]
    document = {"keys": [*keys, 3072, 0, 1, wanted], "doubles": [], "texts": name}
    where = UTM._replace(crs=DEFINED + json.dumps(document))
    path = written(ids_with_nodata(32, 32), Appearance(palette_of(3), 255, where), tmp_path)
    with rasterio.open(path) as opened:
        assert opened.crs.to_epsg() == wanted
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].tags[34737].value == name


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e12, 1e15])
def test_a_resolution_that_tiff_cannot_tell_is_left_out(size, tmp_path):
    where = SLIDE._replace(pixel_size=(0.5, size))
    path = written(ids_with_nodata(32, 32), Appearance(palette_of(3), 255, where), tmp_path)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].tags["ResolutionUnit"].value == 1  # none


def test_small_images_have_no_overviews():
    assert level_shapes((4096, 4096)) == []
    assert level_shapes((4097, 10))[0] == (2049, 5)


def test_exports_of_earlier_versions_have_no_overviews(tmp_path):
    look = Appearance(palette_of(3), has_overviews=False)
    with tifffile.TiffFile(written(ids_with_nodata(100, 4200), look, tmp_path)) as tiff:
        assert len(tiff.pages) == 1
