"""Exports of runs whose images have nodata, alpha and a place, as other programs read them."""

import io
import json

import numpy as np
import openslide
import pyarrow.dataset as ds
import pytest
import rasterio
import tifffile
from affine import Affine
from PIL import Image
from pycocotools import mask as pycoco

from jobs.predict import predict
from tests.reference.overviews import halved
from tests.support.runs import config_of
from unet_core import open_run
from unet_core.export.instances import find_objects
from unet_core.synthetic import nuclei

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__:DeprecationWarning",  # pycocotools' own
    "ignore:Dataset has no geotransform",
)

GRAY, _ = nuclei(330, 410, np.random.default_rng(2))
Y, X = np.mgrid[:330, :410]
OUTSIDE = (Y - 150) ** 2 + (X - 200) ** 2 > 140**2
LAMBERT = rasterio.CRS.from_proj4(
    "+proj=lcc +lat_1=45 +lat_2=49 +lat_0=47 +lon_0=3 +x_0=700000 +y_0=6600000 +ellps=GRS80"
)
PLACES = {
    "utm": (rasterio.CRS.from_epsg(32633), Affine(10, 0, 5e5, 0, -10, 4.2e6)),
    "degrees": (rasterio.CRS.from_epsg(4326), Affine(0.25, 0, -180, 0, -0.25, 90)),
    "rotated": (rasterio.CRS.from_epsg(3857), Affine(8, 1, 5, 1, -8, 7)),
    "defined": (LAMBERT, Affine(20, 0, 652000, 0, -20, 6862000)),
}


def write_inputs(root):
    """A GeoTIFF with nodata for each place, a PNG with alpha, and a slide of 0.5 × 0.25 µm."""
    root.mkdir()
    pixels = np.where(OUTSIDE, -9999, GRAY.astype(np.int16))
    for name, (crs, transform) in PLACES.items():
        with rasterio.open(
            root / f"{name}.tif", "w", driver="GTiff", width=410, height=330, count=1,
            dtype="int16", nodata=-9999, crs=crs, transform=transform,
        ) as file:  # fmt: skip
            file.write(pixels, 1)
    with_alpha = np.dstack([np.where(OUTSIDE, 255, GRAY), ~OUTSIDE * 255]).astype(np.uint8)
    Image.fromarray(with_alpha).save(root / "alpha.png")
    resolution = {"resolution": (1e4 / 0.25, 1e4 / 0.5), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(root / "slide.tif", GRAY, tile=(64, 64), **resolution)
    return root


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """All inputs, as small images."""
    root = tmp_path_factory.mktemp("validity")
    predict(config_of(write_inputs(root / "images"), tiny_model, root / "run"))
    return root / "run"


def rows_of(folder):
    return ds.dataset(folder, exclude_invalid_files=False).to_table().to_pylist()


def test_a_png_reads_back_as_ids_and_is_transparent_where_there_is_no_pixel(run, tmp_path, run_cli):
    assert run_cli("export", run, "--format", "png", "--out", tmp_path)[0] == 0
    results = open_run(str(run))
    for row in results.metrics.to_pylist():
        data = (tmp_path / f"{row['image_id']}.png").read_bytes()
        with Image.open(io.BytesIO(data)) as shown:
            ids_HW, alpha_HW = np.asarray(shown), np.asarray(shown.convert("RGBA"))[..., 3]
            assert len(shown.getpalette()) == 3 * 256
        assert data[24] == 8  # bits of a sample
        assert (ids_HW == results.mask(row["image_id"])).all()
        assert (alpha_HW == np.where(ids_HW == 255, 0, 255)).all()
        invalid = 0 if row["image_id"] == "slide.tif" else OUTSIDE.sum()
        assert (ids_HW == 255).sum() == row["invalid_pixels"] == invalid


def test_gis_finds_place_and_nodata_of_the_input(run, tmp_path, run_cli):
    assert run_cli("export", run, "--format", "tiff", "--out", tmp_path)[0] == 0
    for name, (crs, transform) in PLACES.items():
        with rasterio.open(tmp_path / f"{name}.tif.tif") as file:
            assert (file.crs, file.transform, file.nodata) == (crs, transform, 255)
            assert ((file.dataset_mask() == 0) == OUTSIDE).all()
            assert (file.read(1) == open_run(str(run)).mask(f"{name}.tif")).all()
        with tifffile.TiffFile(tmp_path / f"{name}.tif.tif") as file:
            (page,) = file.pages
            assert page.tags[42113].value == "255"
            assert page.colormap.shape == (3, 256)
    with rasterio.open(tmp_path / "alpha.png.tif") as file:
        assert (file.crs, file.nodata) == (None, 255)
    with openslide.OpenSlide(tmp_path / "slide.tif.tif") as slide:
        assert slide.dimensions == (410, 330)
        mpp = [float(slide.properties[f"openslide.mpp-{axis}"]) for axis in "yx"]
        assert mpp == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize("how", ["components", "watershed"])
def test_pixels_that_are_not_valid_are_in_no_object(run, tmp_path, run_cli, how):
    arguments = ("--format", "tiff", "--out", tmp_path / how, "--objects", how)
    assert run_cli("export", run, *arguments)[0] == 0
    rows = rows_of(tmp_path / how / "objects")
    assert {row["class"] for row in rows} == {1}
    for row in open_run(str(run)).metrics.to_pylist():
        mask_HW = open_run(str(run)).mask(row["image_id"])
        wanted = find_objects(np.where(mask_HW == 255, 0, mask_HW), how == "watershed")
        with rasterio.open(tmp_path / how / f"{row['image_id']}.tif") as file:
            assert (file.read(1) == wanted.labels_HW).all()
            if row["image_id"] == "utm.tif":
                assert (file.crs, file.transform, file.nodata) == (*PLACES["utm"], None)
        mine = [found["area"] for found in rows if found["image_id"] == row["image_id"]]
        assert sum(mine) == row["class_pixels"][1]


@pytest.mark.parametrize("more", [(), ("--polygons",), ("--objects", "components")])
def test_pixels_that_are_not_valid_are_in_no_annotation(run, tmp_path, run_cli, more):
    assert run_cli("export", run, "--format", "coco", "--out", tmp_path, *more)[0] == 0
    document = json.loads((tmp_path / "annotations.json").read_text())
    assert {found["category_id"] for found in document["annotations"]} == {1}
    for image in document["images"]:
        is_found_HW = np.zeros((image["height"], image["width"]), bool)
        for found in document["annotations"]:
            if found["image_id"] == image["id"]:
                parts = found["segmentation"]
                if isinstance(parts, list):
                    parts = pycoco.merge(pycoco.frPyObjects(parts, *is_found_HW.shape))
                is_found_HW |= pycoco.decode(parts) > 0
        assert (is_found_HW == (open_run(str(run)).mask(image["file_name"]) == 1)).all()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_exported_masks_are_truth_again(run, tmp_path, run_cli, kind):
    run_cli("export", run, "--format", kind, "--out", tmp_path)
    code, text, _ = run_cli("evaluate", run, "--truth", tmp_path, "--json", "--name", kind)
    document = json.loads(text)
    assert (code, document["images"]["compared"]) == (0, 6)
    assert document["mean"]["micro"]["iou"] == 1
    assert document["ignored_pixels"] == 0  # they were no pixels before


def test_large_masks_and_labels_have_overviews_as_loops_make_them(
    tiny_model, tmp_path, run_cli, monkeypatch, small_is_large
):
    for name, value in {"LARGE_SIDE": 256, "SMALL_SIDE": 60, "BAND_ROWS": 64}.items():
        monkeypatch.setattr(f"unet_core.export.overviews.{name}", value)
    monkeypatch.setattr("unet_core.export.mask_images.TILE_SIDE", 64)
    predict(config_of(write_inputs(tmp_path / "images"), tiny_model, tmp_path / "run"))
    labelled = ("--objects", "components")
    for out, more, nodata in ((tmp_path / "a", (), 255), (tmp_path / "b", labelled, None)):
        assert run_cli("export", tmp_path / "run", "--format", "tiff", "--out", out, *more)[0] == 0
        for name, place in PLACES.items():
            with tifffile.TiffFile(out / f"{name}.tif.tif") as file:
                whole, *levels = (page.asarray() for page in file.pages)
                assert [bool(page.is_reduced) for page in file.pages] == [False, True, True, True]
            for level in levels:
                whole = halved(whole, nodata)
                np.testing.assert_array_equal(level, whole)
            with rasterio.open(out / f"{name}.tif.tif") as file:
                assert file.overviews(1) == [2, 4, 8]
                assert (file.crs, file.transform) == place
    with openslide.OpenSlide(tmp_path / "a" / "slide.tif.tif") as slide:
        assert slide.level_dimensions == ((410, 330), (205, 165), (103, 83), (52, 42))
    code, text, _ = run_cli("evaluate", tmp_path / "run", "--truth", tmp_path / "a", "--json")
    assert (code, json.loads(text)["mean"]["micro"]["iou"]) == (0, 1)  # a pyramid is one image


def test_an_export_made_before_needs_a_new_folder(run, tmp_path, run_cli):
    run_cli("export", run, "--format", "png", "--out", tmp_path)
    record = json.loads((tmp_path / "export.json").read_text())
    record["identity"]["export_version"] = "2"
    (tmp_path / "export.json").write_text(json.dumps(record))
    code, _, error = run_cli("export", run, "--format", "png", "--out", tmp_path)
    assert (code, "export_version" in error, "new folder" in error) == (2, True, True)


@pytest.mark.parametrize("command", [("status",), ("verify", "--deep")])
def test_status_and_verify_say_how_much_is_no_data(run, run_cli, command):
    name, *options = command
    code, text, _ = run_cli(name, run, *options)
    share = open_run(str(run)).totals.invalid_pixels / open_run(str(run)).totals.pixels
    assert (code, f"nodata:   {share:.2%} of all pixels are no data" in text) == (0, True)
