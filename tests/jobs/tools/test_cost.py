"""``plan --cost``: a sample is really segmented, scaled, and leaves nothing behind."""

import pytest

from jobs.predict import predict
from jobs.tools.cost import Cost, estimate
from tests.support.data import write_many_tars
from unet_core.errors import ConfigError


def test_a_sample_says_what_the_rest_takes_and_nothing_stays(make_config, tmp_path):
    tars = write_many_tars(tmp_path)
    cost = estimate(make_config(input={"uri": str(tars)}))
    assert (cost.shards, cost.images) == (6, 12)
    assert not cost.is_counted
    assert cost.images_left == pytest.approx(48, rel=0.2)
    assert cost.images_per_s > 1
    by_images = cost.images_left / cost.images_per_s / 3600
    assert by_images / 3 < cost.hours < by_images * 3  # by bytes, and tars differ
    assert cost.output_bytes > 1000
    assert cost.device.startswith("cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"tars"}


def test_the_rest_of_a_run_of_loose_images_is_counted(make_config, folder, tmp_path):
    loose = {"uri": str(folder / "images"), "masks": f"{folder}/masks/", "shard_images": 2}
    config = make_config(input=loose)
    predict(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ConfigError, match="0 shards are left: too few"):
        estimate(config)
    (tmp_path / "run" / "_SUCCESS").unlink()
    for part in sorted((tmp_path / "run" / "metrics").iterdir())[:3]:
        part.unlink()
    cost = estimate(config)
    assert (cost.images_left, cost.is_counted, cost.shards) == (6, True, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    left = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.parquet")}
    assert left.items() <= before.items()


def test_sizes_that_a_list_does_not_say_are_replaced_by_counts(make_config, folder, tmp_path):
    names = sorted(path.name for path in (folder / "images").iterdir())
    listed = tmp_path / "list.csv"
    listed.write_text("uri\n" + "\n".join(f"{folder}/images/{name}" for name in names))
    source = {"uri": str(listed), "format": "list", "masks": "", "shard_images": 2}
    cost = estimate(make_config(input={**source, "allow": [f"{folder}/images"]}))
    assert (cost.images_left, cost.shards) == (12, 6)
    assert cost.hours > 0
    assert cost.spread >= 0.1


def test_a_whole_bucket_is_no_place_beside_which_anything_could_lie(make_config, tmp_path):
    with pytest.raises(ConfigError, match="memory://bucket is a whole bucket"):
        estimate(make_config(output={"uri": "memory://bucket"}))


def test_ranges_scale_with_actors_and_their_share_of_a_gpu():
    cost = Cost(
        device="NVIDIA L4", images=100, shards=6, images_per_s=100.0, spread=0.2,
        images_left=3_600_000, is_counted=True, hours=10.0, gpus=0.5, output_bytes=1,
    )  # fmt: skip
    assert cost.hours_on(1) == pytest.approx((8.0, 12.0))
    assert cost.hours_on(64) == pytest.approx((8 / 64, 12 / 64))
    assert cost.device_hours_per_million == pytest.approx(
        (1e6 / 720_000 * 0.8, 1e6 / 720_000 * 1.2)
    )
