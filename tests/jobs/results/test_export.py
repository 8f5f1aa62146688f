"""``unet-jobs export`` over whole runs: what it writes, once, and what it refuses."""

import hashlib
import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as pycoco
from scipy import ndimage

from jobs.predict import predict
from tests.support.data import pictures, reading, write_slides
from tests.support.rasters import labels_of
from tests.support.runs import config_of
from unet_core import open_run
from unet_core.export.instances import find_objects, measure_instances
from unet_core.export.names import Names
from unet_core.export.task import Export, Options
from unet_core.images.preprocessing import to_color
from unet_core.storage.store import Store
from unet_core.synthetic import png

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools' own


@pytest.fixture(scope="module")
def run(folder, tiny_model, tmp_path_factory):
    """The 12 loose images in 3 shards."""
    out = tmp_path_factory.mktemp("exported") / "run"
    predict(config_of(folder / "images", tiny_model, out, "input.shard_images=4"))
    return out


def rows_of(folder):
    return sorted(
        ds.dataset(folder, exclude_invalid_files=False).to_table().to_pylist(),
        key=lambda row: (row["image_id"], row.get("label", 0)),
    )


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def list_shard_ids(path):
    return labels_of(path.read_bytes(), reading(2**24, ignore_index=2**16 - 1), 2**16)[0]


def annotated(out):
    """Class ids or labels of each image of a COCO document, and its annotations."""
    document = json.loads((out / "annotations.json").read_text())
    found = {}
    for image in document["images"]:
        mine = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        found[image["file_name"]] = mine
    assert [a["id"] for a in document["annotations"]] == [
        *range(1, 1 + len(document["annotations"]))
    ]
    return found


@pytest.mark.parametrize(("kind", "extension"), [("png", "png"), ("tiff", "tif")])
def test_exported_masks_are_those_of_the_run_and_named_after_its_images(
    run, tmp_path, run_cli, kind, extension
):
    out = tmp_path / "out"
    assert run_cli("export", run, "--format", kind, "--out", out)[0] == 0
    index = rows_of(out / "index")
    assert [row["file"] for row in index] == [f"cell{n:02d}.png.{extension}" for n in range(12)]
    for row in index:
        mask_HW = open_run(str(run)).mask(row["image_id"])
        assert (list_shard_ids(out / row["file"]) == mask_HW).all()
        assert mask_HW.shape == (row["height"], row["width"])


def test_coco_has_the_pixels_of_every_class(run, tmp_path, run_cli):
    assert run_cli("export", run, "--format", "coco", "--out", tmp_path / "out")[0] == 0
    found = annotated(tmp_path / "out")
    assert len(found) == 12
    for image_id, annotations in found.items():
        mask_HW = open_run(str(run)).mask(image_id)
        for a in annotations:
            assert (pycoco.decode(a["segmentation"]) == (mask_HW == a["category_id"])).all()
            assert a["bbox"] == pycoco.toBbox(a["segmentation"]).tolist()
        assert sum(a["area"] for a in annotations) == (mask_HW > 0).sum()


def test_objects_are_the_same_as_labels_as_rows_and_as_annotations(run, tmp_path, run_cli):
    for kind, more in (("png", []), ("tiff", []), ("coco", ["--polygons"])):
        arguments = ("--format", kind, "--out", tmp_path / kind, "--objects", "components", *more)
        assert run_cli("export", run, *arguments)[0] == 0
    assert run_cli("export", run, "--objects", "components")[0] == 0
    rows = rows_of(run / "objects")
    assert rows == rows_of(tmp_path / "png" / "objects") == rows_of(tmp_path / "coco" / "objects")
    found = annotated(tmp_path / "coco")
    for name, image_HW, _ in pictures():
        labels_HW = list_shard_ids(tmp_path / "png" / f"{name}.png.png")
        assert (list_shard_ids(tmp_path / "tiff" / f"{name}.png.tif") == labels_HW).all()
        mine = [row for row in rows if row["image_id"] == f"{name}.png"]
        assert len(mine) == labels_HW.max() == len(found[f"{name}.png"])
        for row, annotation in list(zip(mine, found[f"{name}.png"], strict=True))[:5]:
            is_object = labels_HW == row["label"]
            assert row["area"] == is_object.sum() == annotation["area"]
            assert row["mean_intensity"] == pytest.approx([image_HW[is_object].mean()])
            polygons = pycoco.frPyObjects(annotation["segmentation"], *labels_HW.shape)
            assert (pycoco.decode(pycoco.merge(polygons)) == is_object).all()
    assert run_cli("verify", run, "--deep")[0] == 0
    code, _, error = run_cli("export", run, "--objects", "watershed")
    assert (code, '"components", this config "watershed"' in error) == (2, True)


@pytest.mark.parametrize("kind", ["png", "coco"])
def test_the_same_command_does_what_is_missing_and_ends_with_the_same_bytes(
    run, tmp_path, run_cli, kind
):
    command = ("export", run, "--format", kind, "--out", tmp_path)
    run_cli(*command)
    whole = digests(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    gone, other, kept = sorted((tmp_path / "index").iterdir())
    gone.unlink()
    table = pq.read_table(other)  # as if the shard had been segmented again
    footer = {**table.schema.metadata, b"masks_sha256": b"another"}
    pq.write_table(table.replace_schema_metadata(footer), other)
    run_cli(*command)
    assert digests(tmp_path) == whole
    files = {row["file"] for row in pq.read_table(kept).to_pylist() if row["file"]}
    for path in (kept, *(tmp_path / name for name in files)):
        assert path.stat().st_mtime_ns == stamps[path]
    assert other.stat().st_mtime_ns != stamps[other]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run_cli(*command)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps


def test_annotations_and_images_are_of_what_the_run_has_now(run, tmp_path, run_cli):
    copied, out = shutil.copytree(run, tmp_path / "run"), tmp_path / "coco"
    run_cli("export", copied, "--format", "coco", "--out", out)
    run_cli("export", copied, "--format", "png", "--out", tmp_path / "png")
    first, second, _ = sorted((copied / "metrics").iterdir())
    first.rename(tmp_path / "away")  # as if another driver had not come to it
    run_cli("export", copied, "--format", "coco", "--out", out)
    assert len(annotated(out)) == 8
    (tmp_path / "away").rename(first)
    run_cli("export", copied, "--format", "coco", "--out", out)
    assert len(annotated(out)) == 12
    table = pq.read_table(second)
    gone = table["image_id"][0].as_py()
    status = pa.array(["failed", *table["status"].to_pylist()[1:]])
    table = table.set_column(table.schema.get_field_index("status"), "status", status)
    footer = {**table.schema.metadata, b"masks_sha256": b"another"}
    pq.write_table(table.replace_schema_metadata(footer), second)
    results, names = open_run(str(copied)), Names(".png")
    task = Export(results, Store(str(tmp_path / "png")), Options("png"), names)
    assert (tmp_path / "png" / f"{gone}.png").exists()
    for shard in results.shards():
        task.do(shard)
    assert not (tmp_path / "png" / f"{gone}.png").exists()
    assert len([*(tmp_path / "png").glob("*.png")]) >= 8


def test_a_damaged_part_sets_its_shard_aside(run, tmp_path, run_cli):
    copied = shutil.copytree(run, tmp_path / "run")
    part = min((copied / "masks").iterdir())
    number = pq.read_schema(part).names.index("mask")
    metadata = pq.read_metadata(part).row_group(0).column(number)
    data = bytearray(part.read_bytes())
    at, size = metadata.data_page_offset, metadata.total_compressed_size
    data[at : at + size] = b"\xff" * size
    part.write_bytes(data)
    code, _, error = run_cli("export", copied, "--objects", "components", "--out", tmp_path / "o")
    assert (code, part.name in error, "unet-jobs verify" in error) == (1, True, True)
    assert len({row["image_id"] for row in rows_of(tmp_path / "o" / "objects")}) == 8


def test_an_export_travels_to_another_process(run, tmp_path):
    results = open_run(str(run))
    store, names = Store(str(tmp_path)), Names(".png")
    task = pickle.loads(pickle.dumps(Export(results, store, Options("png"), names)))
    task.create_or_join()
    assert [task.do(shard) for shard in results.shards()] == [4, 4, 4]
    assert task.done() == {shard.shard_id for shard in results.shards()}


def test_a_folder_of_something_else_is_refused(run, folder, tmp_path, run_cli):
    (tmp_path / "mine.txt").write_text("mine")
    for out, said in (
        (tmp_path, "--out: "),
        (run, "and no export"),
        (folder / "images" / "masks", "must not contain each other"),
    ):
        code, _, error = run_cli("export", run, "--format", "png", "--out", out)
        assert (code, said in error) == (2, True)
    for arguments, said in (
        (["--format", "png"], "--out"),
        (["--out", "x"], "--format"),
        (["--format", "tiff", "--out", "x", "--polygons"], "does not go with"),
        (["--format", "png", "--out", "x", "tile.size=64"], "tile.size is as the run was made"),
    ):
        code, _, error = run_cli("export", run, *arguments)
        assert (code, said in error) == (2, True)


def test_images_that_have_no_room_are_told_by_row_and_exit_code(
    run, tmp_path, run_cli, monkeypatch
):
    monkeypatch.setattr("unet_core.export.task.MOST_PIXELS", 50 * 70)
    code, text, error = run_cli("export", run, "--format", "png", "--out", tmp_path)
    refused = [row for row in rows_of(tmp_path / "index") if row["status"] == "refused"]
    assert [row["image_id"] for row in refused] == [
        f"cell{n:02d}.png" for n in (0, 2, 4, 5, 6, 8, 10, 11)
    ]
    assert (code, "4 images" in text, error.count("not written")) == (1, True, 8)
    assert {row["file"] for row in refused} == {None}


def test_large_images_are_exported_by_window_and_objects_cross_windows(
    make_config, tmp_path, run_cli, monkeypatch, small_is_large
):
    monkeypatch.setattr("unet_core.export.mask_images.TILE_SIDE", 64)
    predict(make_config(input=write_slides(tmp_path / "slides", tile=(64, 64)), out="large"))
    for kind in ("tiff", "coco"):
        assert (
            run_cli("export", tmp_path / "large", "--format", kind, "--out", tmp_path / kind)[0]
            == 0
        )
    run_cli("export", tmp_path / "large", "--objects", "components")
    rows, annotations = rows_of(tmp_path / "large" / "objects"), annotated(tmp_path / "coco")
    results = open_run(str(tmp_path / "large"))
    for number in range(3):
        mask_HW = results.mask(f"{number}.tif")
        assert (list_shard_ids(tmp_path / "tiff" / f"{number}.tif.tif") == mask_HW).all()
        (annotation,) = annotations[f"{number}.tif"]
        assert (pycoco.decode(annotation["segmentation"]) == mask_HW).all()
        wanted = measure_instances(find_objects(mask_HW, splits=False), None)
        mine = [row for row in rows if row["image_id"] == f"{number}.tif"]
        assert [row["area"] for row in mine] == wanted["area"]
        with Image.open(tmp_path / "slides" / "images" / f"{number}.tif") as image:
            gray_HW = to_color(np.asarray(image).transpose(2, 0, 1), "gray")[0]
        labels_HW = find_objects(mask_HW, splits=False).labels_HW
        means = ndimage.mean(gray_HW, labels_HW, wanted["label"])
        assert [row["mean_intensity"][0] for row in mine] == pytest.approx(means.tolist())
    assert max(row["height"] for row in rows) > 128


def test_ids_from_elsewhere_stay_below_the_folder_or_are_refused(make_config, tmp_path, run_cli):
    data = png(np.arange(64, dtype=np.uint8).reshape(8, 8))
    ids = ["../x", "/etc/y.png", "a\nb", "a.png", "a.jpg", "", "x/../../z", ".h", "both.png"]
    refused = ["both.png", "both.png"]
    (tmp_path / "in").mkdir()
    for name, some in (("a", ids), ("b", ["both.png"])):
        table = pa.table({"image": [data] * len(some), "id": some})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    predict(make_config(input={"uri": str(tmp_path / "in"), "id_column": "id", "masks": ""}))
    out = tmp_path / "far" / "out"
    code, _, error = run_cli("export", tmp_path / "run", "--format", "png", "--out", out)
    assert (code, error.count("the file of another image")) == (1, 2)
    index = rows_of(out / "index")
    assert [row["image_id"] for row in index if row["status"] == "refused"] == refused
    files = [row["file"] for row in index if row["status"] == "ok"]
    assert len(set(files)) == len(ids) - 1
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == set(files)
    assert not [p for p in tmp_path.rglob("*.png") if out not in p.parents]
    assert {"a.png.png", "a.jpg.png"} < set(files)


def test_intensities_are_null_where_the_image_is_gone(make_config, tmp_path, run_cli):
    (tmp_path / "in").mkdir()
    for name, image_HW, _ in pictures()[:3]:
        (tmp_path / "in" / f"{name}.png").write_bytes(png(image_HW))
    predict(make_config(input={"uri": str(tmp_path / "in"), "masks": ""}))
    (tmp_path / "in" / "cell01.png").unlink()
    assert run_cli("export", tmp_path / "run", "--objects", "components")[0] == 0
    rows = rows_of(tmp_path / "run" / "objects")
    assert {row["image_id"] for row in rows if row["mean_intensity"] is None} == {"cell01.png"}
    assert len({row["image_id"] for row in rows}) == 3
    (tmp_path / "in").rename(tmp_path / "away")
    arguments = ("--format", "png", "--out", tmp_path / "out", "--objects", "components")
    code, text, _ = run_cli("export", tmp_path / "run", *arguments)
    assert (code, "mean_intensity is null" in text) == (0, True)
    assert list_shard_ids(tmp_path / "out" / "cell00.png.png").max() > 1
