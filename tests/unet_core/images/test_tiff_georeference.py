import io

import numpy as np
import pytest
import rasterio
import tifffile

from tests.support.data import reading, tiff
from unet_core.images import large_tiff
from unet_core.images.codec import decode_images
from unet_core.images.large_tiff import open_large
from unet_core.storage.ranges import Ranged

GRAY = np.arange(64 * 48, dtype=np.uint16).reshape(64, 48)
UTM = rasterio.CRS.from_epsg(32633)
LOCAL = rasterio.CRS.from_proj4("+proj=tmerc +lat_0=1 +lon_0=7 +k=0.9 +x_0=5 +ellps=GRS80 +units=m")
NORTH_UP = rasterio.Affine(0.5, 0, 500000, 0, -0.25, 4.2e6)
TURNED = rasterio.Affine(0.5, 0.1, 500000, 0.1, -0.25, 4.2e6)
APERIO = "Aperio Image Library v11 \r\n48x64 JPEG/RGB Q=95|AppMag = 20|MPP = 0.4990"


def place(data, monkeypatch):
    """The georeference of an image, which is the same where it is read by window."""
    (image,) = decode_images(data, reading(10**6))
    monkeypatch.setattr(large_tiff, "SMALL_PIXELS", 0)
    by_window = open_large(Ranged(len(data), lambda a, b: data[a:b]), reading(10**6))
    assert by_window.georeference == image.georeference
    return image.georeference


def geotiff(**options):
    with rasterio.MemoryFile() as memory:
        options = {
            "driver": "GTiff",
            "width": 48,
            "height": 64,
            "count": 1,
            "dtype": "uint16",
        } | options
        with memory.open(**options) as file:
            file.write(GRAY, 1)
        return memory.read()


@pytest.mark.parametrize("transform", [NORTH_UP, TURNED])
@pytest.mark.parametrize(
    ("epsg", "unit"), [(32633, "m"), (2263, "US survey foot"), (4326, "degree")]
)
def test_coordinates_are_those_that_gdal_reads(epsg, unit, transform, monkeypatch):
    data = geotiff(crs=rasterio.CRS.from_epsg(epsg), transform=transform)
    where = place(data, monkeypatch)
    assert (where.crs, where.pixel_unit) == (f"EPSG:{epsg}", unit)
    with rasterio.MemoryFile(data) as memory, memory.open() as file:
        assert where.transform == pytest.approx(tuple(file.transform)[:6], rel=1e-15)
    size = np.hypot([transform.b, transform.a], [transform.e, transform.d])
    assert where.pixel_size == pytest.approx(size.tolist())


@pytest.mark.parametrize("name", ["ESRI:54009", "+proj=geos +h=35785831 +lon_0=0", "EPSG:4978"])
def test_a_unit_that_keys_do_not_tell_is_no_degree(name, monkeypatch):
    where = place(geotiff(crs=rasterio.CRS.from_string(name), transform=NORTH_UP), monkeypatch)
    assert where.crs.startswith("GEOTIFF:")
    assert where.pixel_unit is None
    assert where.pixel_size == (0.25, 0.5)


def test_coordinates_of_centres_become_those_of_corners(monkeypatch):
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", width=48, height=64, count=1, dtype="uint16", crs=UTM,
                         transform=NORTH_UP) as file:  # fmt: skip
            file.write(GRAY, 1)
            file.update_tags(AREA_OR_POINT="Point")
        data = memory.read()
    assert place(data, monkeypatch).transform == pytest.approx(tuple(NORTH_UP)[:6], rel=1e-15)


def test_a_system_without_a_code_is_kept_as_it_is_defined(monkeypatch):
    where = place(geotiff(crs=LOCAL, transform=NORTH_UP), monkeypatch)
    assert where.crs.startswith("GEOTIFF:{")
    assert where.pixel_unit == "m"


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"resolution": (20000, 10000), "resolutionunit": "CENTIMETER"}, (1.0, 0.5)),
        ({"resolution": (1200, 1200), "resolutionunit": "INCH"}, (25400 / 1200, 25400 / 1200)),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (1, 1), "resolutionunit": "NONE"}, None),
        ({"resolution": (0, 0), "resolutionunit": "CENTIMETER"}, None),
        ({"description": APERIO, "metadata": None}, (0.499, 0.499)),
        ({"imagej": True, "resolution": (4, 2), "metadata": {"unit": "um"}}, (0.5, 0.25)),
        ({"imagej": True, "resolution": (4, 2), "metadata": {"unit": "\\u00B5m"}}, (0.5, 0.25)),
        ({"imagej": True, "resolution": (4, 2), "metadata": {"unit": "pixel"}}, None),
        ({}, None),
    ],
)
def test_the_size_of_pixels_is_in_micrometers(options, size, monkeypatch):
    where = place(tiff(GRAY, **options), monkeypatch)
    assert (where and where.pixel_size) == (size and pytest.approx(size))
    assert where is None or (where.pixel_unit, where.crs) == ("µm", None)


@pytest.mark.parametrize(("unit", "factor"), [("µm", 1), ("nm", 1e-3), ("mm", 1e3), (None, 1)])
def test_ome_has_a_unit(unit, factor, monkeypatch):
    units = {f"PhysicalSize{axis}Unit": unit for axis in "XY"} if unit else {}
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}
    data = tiff(GRAY, ome=True, metadata={"axes": "YX", **sizes, **units})
    size = place(data, monkeypatch).pixel_size
    assert size == pytest.approx((0.5 * factor, 0.25 * factor))


@pytest.mark.parametrize(
    ("code", "kind", "value"),
    [(33550, 12, (1.0, float("nan"), 0.0)), (33550, 2, "far"), (34264, 12, (0.0,) * 16),
     (34735, 3, (1, 1)), (33922, 12, (1.0,))],
)  # fmt: skip
def test_damaged_tags_tell_nothing(code, kind, value, monkeypatch):
    buffer = io.BytesIO()
    tag = (code, kind, len(value), value, True)
    tifffile.imwrite(buffer, GRAY, extratags=[tag], metadata=None)
    assert place(buffer.getvalue(), monkeypatch) is None
