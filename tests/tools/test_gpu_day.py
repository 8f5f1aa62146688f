"""The pass over everything that a GPU has to tell, tried without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.gpu_day.__main__ import SECTIONS
from tests.tools.gpu_day.day import Day, SkippedError

ROOT = Path(__file__).parents[2]
NEED_CUDA = {"memory"}
MISSING = """
import runpy, sys
sys.modules |= dict.fromkeys(("boto3", "moto", "pytest", "ray"))
sys.argv[1:] = {words!r}
runpy.run_module("tests.tools.gpu_day", run_name="__main__", alter_sys=True)
"""


def dry_run(out, *words, **environment):
    """What a dry run records; without Ray and what else only tests need, unless a cluster is
    named.
    """
    given = ["--device", "cpu", "--tiny", "--out", str(out), *words]
    is_bare = "RAY_ADDRESS" not in environment
    start = (
        ["-c", MISSING.format(words=given)] if is_bare else ["-m", "tests.tools.gpu_day", *given]
    )
    done = subprocess.run(
        [sys.executable, *start], cwd=ROOT, env=os.environ | environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "gpu_day.json").read_text())


@pytest.mark.slow
def test_a_dry_run_measures_in_every_section_without_what_only_tests_need(tmp_path):
    record = dry_run(tmp_path)
    assert record.keys() == SECTIONS.keys()
    assert not {name: kept["failed"] for name, kept in record.items() if kept["failed"]}
    assert {name for name, kept in record.items() if not kept["figures"]} == {*NEED_CUDA, "ray"}
    assert set(record["memory"]["skipped"].values()) == {"no CUDA device"}
    assert set(record["ray"]["skipped"].values()) == {"no ray"}


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_dry_run_compares_actors_with_one_process(ray_session, tmp_path):
    record = dry_run(tmp_path, "ray", RAY_ADDRESS=ray_session.address)
    assert not record["ray"]["failed"]
    assert record["ray"]["figures"]["1 actors"]["same masks"]


def refused():
    raise SkippedError("not here")


def broken():
    yield "sound", lambda: 1
    yield "unsound", lambda: 1 / 0
    yield "skipped", refused
    yield "sound again", lambda: 2
    raise OSError("the section itself")


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    day = Day(tmp_path / "out", 60)
    day.measure("broken", broken())
    day.measure("next", iter([("one", lambda: 3)]))
    record = json.loads((tmp_path / "out" / "gpu_day.json").read_text())
    assert record["broken"]["figures"] == {"sound": 1, "sound again": 2}
    assert record["broken"]["skipped"] == {"skipped": "not here"}
    assert "ZeroDivisionError" in record["broken"]["failed"]["unsound"]
    assert "the section itself" in record["broken"]["failed"]["section"]
    assert record["next"]["figures"] == {"one": 3}
    assert day.failures == ["broken: unsound", "broken: section"]


def test_nothing_begins_once_the_time_is_spent(tmp_path):
    day = Day(tmp_path, 0)
    day.measure("late", iter([("one", lambda: 1)]))
    assert day.record["late"]["skipped"] == {"one": "no time left"}
