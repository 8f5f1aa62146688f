"""The comparison of ``tests.tools.bytes``: what may differ passes, what may not is told."""

import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tools.bytes.allowances import ALLOWED, given
from tests.tools.bytes.comparison import compare

PAGE = "<h1>{title}</h1>\n<p>Written {at} UTC by unet-jobs.</p>"
SAID = (
    "exit code {code}\nimages:   {images} seen\n--- stderr\n"
    "segmenting: 1 of 1 images, {rate} images/s\n"
)


def write(folder: Path, seconds: float, at: str, order: int, **changed: object) -> Path:
    """A folder as a run leaves it; some of it may differ, what is ``changed`` may not."""
    value = {"area": [1, 2], "title": "run", "images": 7, "code": 0, "key": 1, "weight": b"abcd"}
    value |= changed
    for name in ("timings", "said", "metrics"):
        (folder / "run" / name).mkdir(parents=True)
    rows = {"shard_id": ["a", "b"], "images": value["area"], "device_s": [seconds, 1.0]}
    timings = pa.table(rows).take([order, 1 - order])
    pq.write_table(timings, folder / f"run/timings/20260102T03040{order}abcdef-00000.parquet")
    part = pa.table({"image_id": ["x", "y"], "area": value["area"]})
    pq.write_table(part, folder / "run/metrics/a.parquet")
    pq.write_table(part.replace_schema_metadata({"parts": at}), folder / "run/metrics.parquet")
    (folder / "run/report.html").write_text(PAGE.format(at=at, **value))
    (folder / "run/said/0-predict.txt").write_text(SAID.format(rate=seconds, **value))
    (folder / "run/run.json").write_text(json.dumps({"config": {"key": value["key"]}}))
    metadata = [("p", "1"), ("q", "2")][:: 1 - 2 * order]
    header = {"__metadata__": dict(metadata), "w": {"data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(value["weight"])
    (folder / "run/best.safetensors").write_bytes(data)
    return folder


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write(tmp_path / "a", 1.5, "2026-01-02 03:04", 0)


def second(tmp_path: Path, **changed: object) -> Path:
    return write(tmp_path / "b", 2.5, "2027-05-06 07:08", 1, **changed)


def test_times_rates_and_orders_may_differ(first, tmp_path):
    found = compare(first, second(tmp_path), ALLOWED)
    assert found.is_clean
    assert (found.same, found.files) == (2, 7)
    assert sum(map(len, found.allowed.values())) == 5


@pytest.mark.parametrize(
    ("changed", "name", "said"),
    [
        ({"area": [1, 3]}, "run/metrics/a.parquet", "column area, row 1: 2 | 3"),
        ({"area": [1, 3]}, "run/metrics.parquet", "column area, row 1: 2 | 3"),
        ({"area": [1, 3]}, "run/timings/*-00000.parquet", "column"),
        ({"title": "other"}, "run/report.html", "+<h1>other</h1>"),
        ({"images": 8}, "run/said/0-predict.txt", "+images:   8 seen"),
        ({"code": 1}, "run/said/0-predict.txt", "+exit code 1"),
        ({"key": 2}, "run/run.json", "config.key: 1 | 2"),
        ({"weight": b"abce"}, "run/best.safetensors", "w.sha256"),
    ],
)
def test_anything_else_is_told_with_its_first_place(first, tmp_path, changed, name, said):
    found = compare(first, second(tmp_path, **changed), ALLOWED)
    assert not found.is_clean
    assert said in found.different[name]


def test_equal_rows_in_other_bytes_differ(first, tmp_path):
    other = second(tmp_path)
    part = other / "run/metrics/a.parquet"
    pq.write_table(pq.ParquetFile(part).read(), part, compression="zstd")
    assert [*compare(first, other, ALLOWED).different] == ["run/metrics/a.parquet"]


def test_a_file_of_one_folder_needs_an_allowance_of_this_comparison(first, tmp_path):
    other = second(tmp_path)
    (other / "run/new.json").write_text("{}")
    assert compare(first, other, ALLOWED).only_in == ([], ["run/new.json"])
    asked = given(["run/new.*=a record more", "run/run.json=a key more"])
    (other / "run/run.json").write_text("{}")
    found = compare(first, other, ALLOWED, asked)
    assert found.is_clean
    assert found.allowed["a record more"] == ["run/new.json"]


def test_an_allowance_needs_a_reason():
    with pytest.raises(ValueError, match="write GLOB=REASON"):
        given(["*.json"])
