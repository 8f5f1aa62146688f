"""What an export makes of one mask, against the libraries that read it."""

import contextlib
import io
import itertools
import json
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
import tifffile
from PIL import Image
from pycocotools import mask as pycoco
from scipy import ndimage
from skimage.measure import regionprops

from tests.support.data import reading
from tests.support.rasters import labels_of
from unet_core.errors import ImageError
from unet_core.export import coco, mask_images
from unet_core.export.instances import find_objects, measure_instances
from unet_core.export.names import Names
from unet_core.images.raster import ArrayRaster
from unet_core.networks.header import palette_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools' own

PARTS = [".", "..", "a", "a.png", "a.jpg", "A.PNG", ".a", "a\n", "a.png\n", "a\\b", "%2F", "é",
         "e\N{COMBINING ACUTE ACCENT}", "..a", "export.json", "x.Parquet"]  # fmt: skip


def names_among(extension, *shards):
    return Names.among(extension, [pa.array(ids, pa.string()) for ids in shards])


def named(names, ids):
    """Names by id, and why the others have none."""
    found, refused = {}, {}
    for image_id in ids:
        try:
            found[image_id] = names.of(image_id)
        except ImageError as error:
            refused[image_id] = str(error)
    return found, refused


def test_every_id_has_a_name_of_its_own_below_the_folder_or_is_refused():
    ids = ["/".join(parts) for n in (1, 2, 3) for parts in itertools.product(PARTS, repeat=n)]
    ids += ["", "/", "b/", "//b/c", "/etc//x"]
    found, refused = named(names_among(".png", ids), ids)
    assert len(found) + len(refused) == len(ids)
    assert {"a", "a.jpg", "a/a.jpg", "%2F/a", "a/%2F", "b/", "//b/c", "/etc//x"} <= found.keys()
    assert {"a.png", "A.PNG", "é", "", "/", "."} <= refused.keys()
    assert all("would be the file of another image" in reason for reason in refused.values())
    folded = {unicodedata.normalize("NFC", name).casefold() for name in found.values()}
    assert len(folded) == len(found)  # also where neither case nor form is minded
    folders = {name.rpartition("/")[0].casefold() for name in found.values()}
    assert not {name.rpartition("/")[0] for name in folders if "." in name} & folded
    for name in found.values():
        *within, last = name.split("/")
        assert name.isprintable()
        assert all(part and not part.startswith(".") for part in (*within, last))
        assert last.endswith(".png")
        assert not any(part.lower().endswith((".png", ".json", ".parquet")) for part in within)


@pytest.mark.parametrize(
    "image_id", ["x" * 197, "é" * 99, "x" * 300 + "/a", "/".join(["y" * 100] * 9)]
)
def test_ids_too_long_for_file_systems_are_refused(image_id):
    names = names_among(".png", [image_id, "x" * 196])
    assert len(names.of("x" * 196)) == 200
    with pytest.raises(ImageError, match="too long for the name of a file"):
        names.of(image_id)


def test_names_are_the_ids_with_the_extension_of_what_is_written():
    ids = ["a/b.tif", "a/c.png", "a/c.jpg", "t.tar/k", "f.parquet#3", "s.tif#1", "../50% of.jpeg"]
    twice = ["twice.png", "Upper.png", "é.png", "/etc"]
    names = names_among(".png", [*ids, *twice], ["twice.png", "upper.PNG", "e\u0301.png", "etc"])
    assert [names.of(image_id) for image_id in ids] == [
        "a/b.tif.png", "a/c.png.png", "a/c.jpg.png", "t.tar/k.png", "f.parquet#3.png",
        "s.tif#1.png", "_./50% of.jpeg.png",
    ]  # fmt: skip
    assert named(names, [*twice, "upper.PNG"])[1].keys() == {*twice, "upper.PNG"}
    assert names.digest != names_among(".png", ids).digest


@pytest.mark.parametrize("classes", [2, 300])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_an_image_reads_back_as_the_ids_and_shows_its_palette(classes, kind):
    random, palette = np.random.default_rng(1), palette_of(classes)
    look = mask_images.Appearance(palette)
    mask_HW = random.integers(0, classes, (300, 270)).astype(np.uint8 if classes < 257 else "<u2")
    if kind == "png":
        file = mask_images.encode_png(mask_HW, look)
    else:
        file = mask_images.encode_tiff(mask_HW.shape, [mask_HW[:256], mask_HW[256:]], look)
    with contextlib.closing(file):
        file.seek(0)
        data = file.read()
    (labels_HW,) = labels_of(data, reading(2**20, ignore_index=65535), classes)
    assert (labels_HW == mask_HW).all()
    shown = Image.open(io.BytesIO(data))
    assert shown.mode == ("P" if classes == 2 else "I;16")
    if classes == 2:
        colors_HWC = np.array(palette, np.uint8)[mask_HW]
        assert (np.asarray(shown.convert("RGB")) == colors_HWC).all()
    if kind == "tiff":
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            assert tiff.pages[0].is_tiled


def blobs(number):
    random = np.random.default_rng(number)
    noise_HW = random.random(random.integers(1, 30, 2))
    smooth_HW = ndimage.gaussian_filter(noise_HW, number % 3)
    return smooth_HW > np.quantile(smooth_HW, random.random() * 0.8)


@pytest.mark.parametrize("as_polygons", [False, True])
def test_pycocotools_gives_back_every_pixel_holes_and_corners_too(as_polygons):
    for number in range(80):
        region_HW = blobs(number)
        if not region_HW.any():
            continue
        y, x, (height, width) = number % 4, number % 3, region_HW.shape
        full_HW = np.pad(region_HW, ((y, number % 2), (x, number % 5)))
        box = slice(y, y + height), slice(x, x + width)
        row = coco.annotation(1, box, region_HW, full_HW.shape, as_polygons)
        segmentation = json.loads(row["segmentation"])
        encoded = pycoco.encode(np.asfortranarray(full_HW.astype(np.uint8)))
        if as_polygons:
            segmentation = pycoco.merge(pycoco.frPyObjects(segmentation, *full_HW.shape))
        else:
            assert segmentation["counts"].encode() == encoded["counts"]
        assert (pycoco.decode(segmentation) == full_HW).all()
        assert row["area"] == pycoco.area(encoded)


def test_objects_measure_what_regionprops_measures():
    random = np.random.default_rng(0)
    mask_HW = (ndimage.gaussian_filter(random.random((90, 80)), 3) * 40).astype(int) % 3
    pixels_CHW = random.integers(0, 2**16, (2, 90, 80)).astype(np.uint16)
    found = find_objects(mask_HW, splits=True)
    rows = measure_instances(found, ArrayRaster(pixels_CHW))
    regions = regionprops(found.labels_HW, np.moveaxis(pixels_CHW, 0, -1))
    assert len(regions) == len(rows["label"]) > 10
    for number, region in enumerate(regions):
        row = {name: values[number] for name, values in rows.items()}
        y, x, below, right = region.bbox
        assert row["label"] == region.label
        assert (row["area"], row["y"], row["x"]) == (region.area, y, x)
        assert (row["height"], row["width"]) == (below - y, right - x)
        assert (row["centroid_y"], row["centroid_x"]) == pytest.approx(region.centroid)
        assert row["mean_intensity"] == pytest.approx(list(region.intensity_mean))
        assert set(np.unique(mask_HW[found.labels_HW == region.label])) == {row["class"]}
    assert ((found.labels_HW > 0) == (mask_HW > 0)).all()


def test_components_are_those_of_four_neighbours_in_each_class():
    mask_HW = np.array([[1, 0, 2], [0, 1, 2], [0, 2, 1]])
    assert find_objects(mask_HW, splits=False).labels_HW.tolist() == [
        [1, 0, 4],
        [0, 2, 4],
        [0, 5, 3],
    ]


@pytest.mark.parametrize("radius", [4, 12, 90])
def test_watershed_cuts_what_touches_and_nothing_else_at_any_scale(radius):
    y, x = np.ogrid[: 6 * radius, : 8 * radius]
    touching = np.zeros((6 * radius, 8 * radius), bool)
    for column in (2, 3.5):  # of radii
        touching |= (y - 2 * radius) ** 2 + (x - column * radius) ** 2 <= radius**2
    oval = ((y - 4.5 * radius) / 1.4) ** 2 + (x - 6 * radius) ** 2 <= radius**2
    mask_HW = (touching | oval).astype(np.uint8)
    assert len(find_objects(mask_HW, splits=False).classes) == 2
    assert len(find_objects(mask_HW, splits=True).classes) == 3
