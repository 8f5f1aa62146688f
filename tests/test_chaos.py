"""The chaos harness, in short: faults are survived, and its oracle sees what it must see."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.predict import predict
from tests.chaos.oracle import KINDS, examine
from tests.data import pictures

CELLS = "driver/inside,driver/before-masks,late/inside-metrics,late/before-success,two/inside"


def test_whatever_dies_each_image_is_accounted_for_once_with_the_same_bytes():
    command = [sys.executable, "-m", "tests.chaos", "--runs", "1", "--cells", CELLS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with findings" in done.stdout


@pytest.fixture(scope="session")
def expected():
    return [(f"shard-{n % 6}.tar/{name}", "") for n, (name, *_) in enumerate(pictures())]


def rewrite(part: Path, change) -> None:
    table = pq.read_table(part)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), part)


def some(run: Path, folder: str) -> Path:
    return sorted((run / folder).glob("*.parquet"))[0]


def lose_a_row(run):
    rewrite(some(run, "metrics"), lambda table: table.slice(1))


def repeat_a_row(run):
    rewrite(some(run, "metrics"), lambda table: table.take([0, *range(len(table))]))


def change_a_number(run):
    rewrite(
        some(run, "metrics"),
        lambda table: table.set_column(
            table.schema.get_field_index("key"), "key", [["other"] * len(table)]
        ),
    )


def claim_one_more(run):
    table = json.loads((run / "_SUCCESS").read_text())
    (run / "_SUCCESS").write_text(json.dumps(table | {"ok": table["ok"] + 1}))


def drop_masks(run):
    some(run, "masks").unlink()


def leave_a_file(run):
    (run / "manifest" / "_00000.parquet.1.tmp").touch()


def drop_a_commit(run):
    some(run, "metrics").unlink()


def lose_a_window(run):
    rewrite(some(run, "masks"), lambda table: table.slice(1))


HARM = {
    lose_a_row: "lost",
    drop_a_commit: "lost",
    repeat_a_row: "duplicated",
    change_a_number: "differing",
    claim_one_more: "unaccounted",
    drop_masks: "orphaned",
    leave_a_file: "orphaned",
    lose_a_window: "uncovered",
}


def test_the_oracle_sees_every_kind_of_harm(make_config, tmp_path, expected):
    predict(make_config())
    seen = set()
    assert not any(examine(tmp_path / "run", tmp_path / "run", expected, {}).values())
    for harm, kind in HARM.items():
        harmed = tmp_path / harm.__name__
        shutil.copytree(tmp_path / "run", harmed)
        harm(harmed)
        assert examine(harmed, tmp_path / "run", expected, {})[kind], harm.__name__
        seen.add(kind)
    assert seen == set(KINDS)
