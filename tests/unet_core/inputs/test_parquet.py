from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from jobs.predict import predict
from tests.support.data import pictures, read_all, write_parquet
from tests.support.runs import masks_by_key
from unet_core.config.sections import InputConfig
from unet_core.errors import ConfigError, ShardError, StoreError
from unet_core.inputs.formats import list_shards, open_source, read_shard
from unet_core.runs.run import Run
from unet_core.synthetic import png


def test_shards_are_runs_of_whole_row_groups(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    shards, samples = read_all(tmp_path, shard_images=5)
    assert [(s.uri, s.first, s.count) for s in shards] == [
        ("a.parquet", 0, 6),
        ("a.parquet", 6, 6),
    ]
    assert [[s.image_id for s in group] for group in samples] == [
        [f"a.parquet#{row}" for row in range(first, first + 6)] for first in (0, 6)
    ]
    assert [s.key for s in samples[0]] == [name for name, _, _ in pictures()[:6]]
    assert len({shard.shard_id for shard in shards}) == 2


def test_ids_and_masks_come_from_their_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=[png(i) for _, i, _ in pictures()])
    _, (samples,) = read_all(tmp_path, id_column="name", masks="truth")
    assert [s.image_id for s in samples] == [name for name, _, _ in pictures()]
    assert samples[0].read_mask() == png(pictures()[0][2])


def test_a_row_without_bytes_is_a_failure_and_its_path_is_not_followed(tmp_path):
    images = [{"bytes": b"image", "path": None}] + [{"bytes": None, "path": "/etc/passwd"}] * 11
    write_parquet(tmp_path / "a.parquet", image=images)
    _, (samples,) = read_all(tmp_path)
    assert samples[0].failure is None
    assert {s.failure.code for s in samples[1:]} == {"empty"}


@pytest.mark.parametrize(
    ("keys", "error", "reason"),
    [
        ({"image_column": "img"}, ConfigError, r"input\.image_column: .*no column 'img'; it has:"),
        ({"masks": "mask"}, ConfigError, r"input\.masks: .* no column 'mask'"),
        ({"image_column": "name"}, ConfigError, "'name' in .* is string, allowed: binary"),
    ],
)
def test_columns_that_are_not_there_are_refused(tmp_path, keys, error, reason):
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(error, match=reason):
        read_all(tmp_path, **keys)


def test_files_that_are_none_and_row_groups_too_large_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(StoreError, match=r"a\.parquet is not a whole Parquet file"):
        read_all(tmp_path)
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr("unet_core.inputs.parquet.MAX_ROW_GROUP_BYTES", 1000)
    with pytest.raises(StoreError, match="row group 0 holds"):
        read_all(tmp_path)


def test_damage_inside_fails_the_rows_that_are_left(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(3)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    start = group.column(0).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(bytes(data))
    ((shard,), (samples,)) = read_all(tmp_path)
    assert len(samples) == shard.count
    assert samples[-1].failure.code == "parquet"


@pytest.mark.parametrize("change", [{"rows": 4}, {"row_group_size": 5}])
def test_a_file_written_again_loses_nothing_even_where_no_etag_tells(tmp_path, change):
    write_parquet(tmp_path / "a.parquet")
    source = open_source(InputConfig(uri=str(tmp_path), shard_images=4))
    shards = list(list_shards(source))
    write_parquet(tmp_path / "a.parquet", **change)
    for shard in shards[1:]:
        with pytest.raises(ShardError, match=r"a\.parquet was written again since the run began"):
            list(read_shard(source, shard))
        samples = list(read_shard(source, replace(shard, etag=None)))
        assert len(samples) == shard.count
        assert {s.failure.code for s in samples} == {"parquet"}


def test_parquet_gives_the_masks_that_tars_give(make_config, tmp_path):
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "a.parquet")
    predict(make_config(out="tars"))
    predict(make_config(out="parquet", input={"uri": str(tmp_path / "in"), "masks": "truth"}))
    tars, parquet = (masks_by_key(Run(str(tmp_path / name))) for name in ("tars", "parquet"))
    assert tars == parquet
