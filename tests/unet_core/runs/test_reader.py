import numpy as np
import pyarrow.compute as pc
import pytest

from jobs.predict import predict
from tests.support.runs import table
from unet_core import open_run
from unet_core.errors import NotFoundError, ParquetDamagedError
from unet_core.runs import compact
from unet_core.runs.compact import COMPACTED
from unet_core.runs.parts import masks_name
from unet_core.runs.reader import open_masks
from unet_core.runs.run import METRICS


@pytest.fixture
def run(make_config):
    return predict(make_config()).run


def test_all_rows_of_a_run_are_one_table_with_the_shard_of_each(run):
    results = open_run(run.uri)
    rows = results.metrics
    assert rows.schema.equals(COMPACTED)
    assert rows.num_rows == results.totals.images_seen == 12
    for shard in results.shards():
        ids = {r["image_id"] for r in rows.to_pylist() if r["shard_id"] == shard.shard_id}
        assert {image_id.partition("/")[0] for image_id in ids} == {shard.uri}


def test_one_file_tells_all_rows_while_the_parts_are_those_it_was_made_of(run, monkeypatch):
    before = open_run(run.uri).metrics
    compact.compact(run.store, run.record)
    made = run.store.read(METRICS)
    compact.compact(run.store, run.record)
    assert run.store.read(METRICS) == made
    with monkeypatch.context() as patch:
        patch.setattr(compact, "_tables", None)  # the parts are not read
        assert open_run(run.uri).metrics.equals(before)
    part = f"metrics/{before['shard_id'][0]}.parquet"
    run.store.publish(part, run.store.read(part))  # as large as before, and perhaps another
    compact.compact(run.store, run.record)
    assert run.store.read(METRICS) != made
    run.store.remove(part)
    assert open_run(run.uri).metrics.num_rows == 10


def test_rows_taken_back_take_the_one_file_along(run):
    compact.compact(run.store, run.record)
    run.reopen()
    assert not run.store.exists(METRICS)


def test_masks_of_a_shard_are_those_of_the_run(make_config):
    run = predict(make_config(output={"encoding": "png"})).run
    results = open_run(run.uri)
    shard = results.shards()[0]
    rows = results.metrics.filter(pc.field("shard_id") == shard.shard_id)
    with open_masks(run.store, shard.shard_id) as masks:
        for image_id in rows["image_id"].to_pylist():
            assert (results.mask(image_id) == masks.mask(image_id).whole()).all()
        assert (rows.num_rows, masks.mask("another")) == (2, None)


def test_a_run_knows_its_config_and_input_again(make_config):
    config = make_config()
    results = open_run(predict(config).run.uri)
    assert results.config == config
    assert results.source.format == "webdataset"
    assert results.source.entries()


def test_label_images_are_found_from_any_folder(make_config, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    config = make_config(input={"uri": str(folder / "images"), "masks": "masks/"})
    results = open_run(predict(config).run.uri)
    monkeypatch.chdir(tmp_path)
    assert results.source.config.masks.rstrip("/") == str(folder / "masks")


def test_a_damaged_mask_is_told_by_its_file_wherever_it_is_read(run):
    shard_id = open_run(run.uri).shards()[0].shard_id
    image_id = open_run(run.uri).metrics.filter(pc.field("shard_id") == shard_id)["image_id"][0]
    with open_masks(run.store, shard_id) as masks:
        mask = masks.mask(image_id.as_py())
        with run.store.open_parquet(masks_name(shard_id)) as file:
            names = file.schema_arrow.names
            column = file.metadata.row_group(0).column(names.index("mask"))
        data = bytearray(run.store.read(masks_name(shard_id)))
        at = column.dictionary_page_offset or column.data_page_offset
        data[at : at + column.total_compressed_size] = b"\xff" * column.total_compressed_size
        with open(run.store.uri(masks_name(shard_id)), "r+b") as part:
            part.write(data)
        with pytest.raises(ParquetDamagedError, match=masks_name(shard_id)):
            mask.whole()


def test_a_file_of_many_parts_is_made_in_groups(run, monkeypatch):
    monkeypatch.setattr(compact, "GROUP_BYTES", 1)
    compact.compact(run.store, run.record)
    with run.store.open_parquet(METRICS) as file:
        assert file.num_row_groups == 6


@pytest.mark.parametrize("kind", ["uint8", "float16"])
def test_probabilities_are_read_by_image_and_by_window(make_config, tmp_path, kind):
    run = predict(make_config(output={"probabilities": kind})).run
    results = open_run(run.uri)
    stored = {row["image_id"]: row for row in table(tmp_path / "run", "masks")}
    for image_id, row in stored.items():
        found_KHW = results.probabilities(image_id)
        assert found_KHW.dtype == np.float32
        kept = np.frombuffer(row["probabilities"], kind).reshape(1, row["height"], row["width"])
        wanted_KHW = kept.astype(np.float32) / np.float32(255 if kind == "uint8" else 1)
        assert np.array_equal(found_KHW, wanted_KHW)
        assert np.array_equal(
            results.probabilities(image_id, (3, 5, 20, 17)), wanted_KHW[:, 3:23, 5:22]
        )
    with pytest.raises(ValueError, match="leaves the image"):
        results.probabilities(image_id, (0, 0, 10**6, 1))
    with pytest.raises(NotFoundError, match="has no image another"):
        results.probabilities("another")


def test_a_run_without_probabilities_says_how_to_keep_them(run):
    results = open_run(run.uri)
    image_id = results.metrics["image_id"][0].as_py()
    with pytest.raises(
        NotFoundError, match=r'kept no probabilities.* output.probabilities = "uint8'
    ):
        results.probabilities(image_id)
