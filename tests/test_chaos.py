"""The chaos harness, in short: faults are survived, and its oracle sees what it must see."""

import shutil
import subprocess
import sys

import pytest

from jobs.predict import predict
from tests.chaos.oracle import KINDS, examine
from tests.support.data import pictures
from tests.support.harm import HARM

CELLS = "driver/inside,driver/before-masks,late/inside-metrics,late/before-success,two/inside"


@pytest.mark.slow
def test_whatever_dies_each_image_is_accounted_for_once_with_the_same_bytes():
    command = [sys.executable, "-m", "tests.chaos", "--runs", "1", "--cells", CELLS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with findings" in done.stdout


@pytest.fixture(scope="session")
def expected():
    return [(f"shard-{n % 6}.tar/{name}", "") for n, (name, *_) in enumerate(pictures())]


def test_the_oracle_sees_every_kind_of_harm(make_config, tmp_path, expected):
    predict(make_config())
    assert not any(examine(tmp_path / "run", tmp_path / "run", expected, {}).values())
    kinds = {harm: kind for harm, kind, _ in HARM if kind}
    for harm, kind in kinds.items():
        harmed = tmp_path / harm.__name__
        shutil.copytree(tmp_path / "run", harmed)
        harm(harmed)
        assert examine(harmed, tmp_path / "run", expected, {})[kind], harm.__name__
    assert set(kinds.values()) == set(KINDS)
