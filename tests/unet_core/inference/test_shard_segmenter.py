"""Whole shards against the obvious twin, and everything a shard can meet."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.predict import predict
from tests.reference.whole_image import logits_of
from tests.support.data import digests, pictures, write_tar
from tests.support.rasters import measured
from tests.support.runs import masks_by_key, masks_of, table
from unet_core.images.decoder import DecodedImage
from unet_core.images.raster import ArrayRaster
from unet_core.images.sample import Sample
from unet_core.inference.engine import Engine, choose_device
from unet_core.inference.mask_assembler import MaskAssembler
from unet_core.inference.postprocessing import Postprocessing
from unet_core.inference.tile_queue import PENDING_IMAGES, TileQueue, stack_tiles
from unet_core.networks import checkpoint
from unet_core.runs.compute import Compute
from unet_core.runs.run import Run
from unet_core.synthetic import nuclei, png
from unet_core.tiling.tile_grid import TileGrid, tile_grid_for


def test_masks_and_counts_are_those_of_one_pass_over_the_whole_image(make_config, tmp_path):
    config = make_config()
    predict(config)
    network, header = checkpoint.load(config.model.checkpoint)
    masks = masks_of(tmp_path / "run")
    rows = {row["key"]: row for row in table(tmp_path / "run", "metrics")}
    for name, image, truth in pictures():
        logits_HW = logits_of(network, header, png(image))[0]
        row = rows[name]
        mask = masks[row["image_id"]]
        assert mask.shape == image.shape == (row["height"], row["width"])
        clear = np.abs(logits_HW) > 1e-4
        assert ((logits_HW > 0) == mask)[clear].all()
        assert row["class_pixels"] == [int((mask == 0).sum()), int((mask == 1).sum())]
        assert row["tp"][1] == int(((mask == 1) & (truth == 1)).sum())
        assert row["fp"][1] == int(((mask == 1) & (truth == 0)).sum())
        assert row["fn"][1] == int(((mask == 0) & (truth == 1)).sum())
        assert row["confusion"] == [row["tp"][0], row["fp"][1], row["fn"][1], row["tp"][1]]
        p = 1 / (1 + np.exp(-logits_HW.astype(np.float64)))
        confidence = np.where(mask == 1, p, 1 - p).mean()
        assert row["confidence_sum"] / mask.size / 65535 == pytest.approx(confidence, abs=1e-4)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 420), st.integers(1, 420), st.sampled_from([240, 256, 320]), st.integers(1, 3)
)
def test_a_mask_does_not_depend_on_tile_size_or_batch(tiny_model, height, width, size, batch):
    network, header = checkpoint.load(tiny_model)
    image = nuclei(height, width, np.random.default_rng(height * 1000 + width))[0]
    expected = logits_of(network, header, png(image))[0]
    engine = Engine(network, header, choose_device("cpu"), Postprocessing(1))
    compute = Compute(
        device="", precision="", backend="", batch_pixels=batch * size**2, versions={}
    )
    offset, scale = measured(ArrayRaster(image[None]), header.preprocessing)
    decoded = DecodedImage(Sample("", "", "", bytes), ArrayRaster(image[None]), offset, scale)
    windows = tile_grid_for(header.tiling, size=size)
    assembler, queue = MaskAssembler(0, decoded, windows, Postprocessing(1)), TileQueue(compute)
    windows = []
    for pieces in [*queue.add(assembler), *queue.rest()]:
        for (_, tile), result in zip(pieces, engine.run(stack_tiles(pieces)), strict=True):
            windows += assembler.paste(tile, result)
    assert assembler.is_complete
    clear = np.abs(expected) > 1e-4
    assert ((expected > 0) == windows[0].mask_HW)[clear].all()


def test_every_image_has_its_row_whatever_is_wrong_with_it(make_config, tmp_path):
    image, truth = nuclei(40, 50, np.random.default_rng(0))
    good = png(image)
    write_tar(
        tmp_path / "odd" / "t.tar",
        {
            "fine.png": good,
            "fine.mask.png": png(truth),
            "empty.png": b"",
            "text.png": b"hello",
            "cut.png": good[:-60],
            "fine.jpg": good,
            "fine.jpeg": good,
            "strange.png": good,
            "strange.mask.png": png(truth + 7),
            "small.png": good,
            "small.mask.png": png(truth[:10]),
            "one.png": png(image[:1, :1]),
            "line.png": png(np.tile(image[:1], (1, 100))),
        },
    )
    outcome = predict(make_config(input={"uri": str(tmp_path / "odd")}))
    rows = {row["image_id"]: row for row in table(tmp_path / "run", "metrics")}
    codes = [
        (r["image_id"], r["status"], r["error_code"]) for r in table(tmp_path / "run", "metrics")
    ]
    assert sorted(codes, key=str) == sorted(
        [
            ("t.tar/fine", "ok", None),
            ("t.tar/fine", "failed", "duplicate_id"),
            ("t.tar/fine", "failed", "duplicate_id"),
            ("t.tar/empty", "failed", "empty"),
            ("t.tar/text", "failed", "decode"),
            ("t.tar/cut", "failed", "decode"),
            ("t.tar/strange", "ok", "truth"),
            ("t.tar/small", "ok", "truth"),
            ("t.tar/one", "ok", None),
            ("t.tar/line", "ok", None),
        ],
        key=str,
    )
    assert "holds 7, 8" in rows["t.tar/strange"]["error_message"]
    assert "shape" in rows["t.tar/small"]["error_message"]
    assert rows["t.tar/strange"]["tp"] is None
    assert rows["t.tar/one"]["class_pixels"] in ([1, 0], [0, 1])
    masks = masks_of(tmp_path / "run")
    assert masks["t.tar/line"].shape == (1, 5000)
    assert len(masks) == 5
    totals = outcome.totals
    assert (totals.images_seen, totals.ok, totals.failed) == (10, 5, 5)
    assert totals.errors == {"decode": 2, "duplicate_id": 2, "empty": 1, "truth": 2}


def test_an_image_that_vanished_is_a_failed_row(make_config, folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    (images / "dangling.png").symlink_to("nowhere.png")
    outcome = predict(make_config(input={"uri": str(images), "masks": ""}))
    assert (outcome.totals.ok, outcome.totals.errors) == (12, {"missing": 1})


@pytest.mark.parametrize("pixels", [3e38, 1e-41])
def test_numbers_that_a_network_cannot_hold_fail_their_image(make_config, tmp_path, pixels):
    (tmp_path / "in").mkdir()
    wide = np.linspace(-pixels, pixels, 32 * 32, dtype=np.float32).reshape(32, 32)
    tifffile.imwrite(tmp_path / "in" / "wide.tif", wide)
    outcome = predict(make_config(input={"uri": str(tmp_path / "in"), "masks": ""}))
    assert outcome.totals.errors == {"not_finite": 1}


def test_one_odd_shape_holds_back_only_so_many_images(tiny_model):
    _, header = checkpoint.load(tiny_model)
    compute = Compute(device="", precision="", backend="", batch_pixels=64 * 64 * 4, versions={})
    queue, waiting, most = TileQueue(compute), {0}, 0
    for index in range(500):
        side = 48 if index == 0 else 16
        pixels = np.zeros((1, side, side), np.uint8)
        decoded = DecodedImage(
            Sample("", "", "", bytes), ArrayRaster(pixels), np.zeros(1), np.ones(1)
        )
        waiting.add(index)
        for pieces in queue.add(
            MaskAssembler(index, decoded, TileGrid(240, header.tiling), Postprocessing(1))
        ):
            waiting -= {done.index for done, _ in pieces}
        most = max(most, index - min(waiting, default=index))
    assert most <= PENDING_IMAGES + 1


def test_an_image_lost_on_the_way_is_never_a_silent_gap(make_config, tmp_path, monkeypatch):
    rest = TileQueue.rest
    monkeypatch.setattr(TileQueue, "rest", lambda queue: list(rest(queue))[:-1])
    with pytest.raises(AssertionError, match="is missing"):
        predict(make_config())
    assert not (tmp_path / "run" / "_SUCCESS").exists()


def test_png_masks_are_the_raw_ones(make_config, tmp_path):
    predict(make_config(out="raw"))
    predict(make_config("output.encoding=png", out="png"))
    raw, as_png = masks_of(tmp_path / "raw"), masks_of(tmp_path / "png")
    assert raw.keys() == as_png.keys()
    assert all((raw[key] == as_png[key]).all() for key in raw)


def test_tars_and_loose_images_give_the_same_masks_by_key(make_config, folder, tmp_path):
    predict(make_config(out="tars"))
    loose = {"uri": str(folder / "images"), "masks": str(folder / "masks"), "shard_images": 5}
    predict(make_config(out="loose", input=loose))
    tars, loose = (masks_by_key(Run(str(tmp_path / name))) for name in ("tars", "loose"))
    assert tars == loose
    assert len(tars) == 12


def test_threads_and_prefetch_change_no_byte(make_config, tmp_path):
    for name, cpus in (("one", 1), ("three", 3)):
        predict(make_config(f"workers.cpus={cpus}", out=name))
    assert digests(tmp_path / "one") == digests(tmp_path / "three")


def test_the_footer_says_what_the_part_is(make_config, tmp_path):
    predict(make_config())
    for kind in ("masks", "metrics"):
        metadata = pq.read_schema(next((tmp_path / "run" / kind).glob("*"))).metadata
        assert metadata[b"class_names"] == b'["background", "nucleus"]'
        assert {b"schema_version", b"fingerprint", b"model_sha256", b"palette"} <= metadata.keys()
    assert {b"images_seen", b"masks_sha256", b"masks_bytes"} <= metadata.keys()
