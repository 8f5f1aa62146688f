import pytest

from jobs.tools.bench import bench
from tests.support.data import pictures
from unet_core.errors import ConfigError

pytestmark = pytest.mark.slow


def test_a_bench_tells_of_the_whole_sample_and_keeps_nothing(make_config, tmp_path):
    measured = bench(make_config(), rounds=1)
    assert (measured.images, measured.shards) == (12, 6)
    assert measured.megapixels == pytest.approx(sum(mask.size for *_, mask in pictures()) / 1e6)
    assert measured.job_over_model > 0
    assert measured.model_over_limit > 0
    assert not (tmp_path / "run").exists()


def test_a_bench_goes_by_the_precision_of_the_model(make_config):
    measured = bench(make_config(model={"precision": "bfloat16"}), rounds=1)
    assert measured.images == 12


def test_a_bench_of_nothing_says_so(make_config, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"none")
    with pytest.raises(ConfigError, match=r"no image of .* can be segmented"):
        bench(make_config(input={"uri": str(tmp_path / "images"), "masks": ""}), rounds=1)
