"""Parquet files made to do harm: refused, or told in rows."""

import pyarrow as pa
import pytest

from tests.support import doors
from tests.support.confined import MIB, confined
from tests.support.hostile import NOT_UTF8, parquet


def structs(**fields):
    return pa.array([fields])


REPEATED = pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), [bytes(24 * MIB)])
PLAIN = parquet([b"a"] * 99, use_dictionary=False)
EMPTY = [("t.parquet#0", "empty"), ("t.parquet#1", "empty")]


@pytest.mark.parametrize(
    ("data", "keys", "expected"),
    [
        pytest.param(data, keys, expected, id=name)
        for name, keys, expected, data in [
            ("one image for every row", {}, [(f"t.parquet#{n}", str(24 * MIB)) for n in range(20)],
             parquet(REPEATED, dictionary_pagesize_limit=2**30, store_schema=False)),
            ("no row groups", {}, "StoreError", parquet(pa.array([], pa.binary()))),
            ("no bytes", {}, EMPTY, parquet(pa.array([None, {"bytes": None}],
                                                     pa.struct({"bytes": pa.binary()})))),
            ("a list", {}, "ConfigError", parquet([[b"a"], []])),
            ("path is a number", {}, [("t.parquet#0", "1")], parquet(structs(bytes=b"a", path=7))),
            ("path is a struct", {}, [("t.parquet#0", "1")],
             parquet(structs(bytes=b"a", path={"x": 1}))),
            ("bytes in bytes", {}, [("t.parquet#0", "1")], parquet(structs(bytes={"bytes": b"a"}))),
            ("path is no UTF-8", {}, [("t.parquet#0", "1"), ("t.parquet#1", "1")],
             parquet(pa.StructArray.from_arrays([pa.array([b"a", b"b"]), NOT_UTF8],
                                                ["bytes", "path"]))),
            ("id is no UTF-8", {"id_column": "id"}, [("\\xff", "1"), ("\\xfe", "1")],
             parquet([b"a", b"b"], ids=NOT_UTF8)),
            ("ids repeated, null and huge", {"id_column": "id"},
             [("x", "1"), ("x", "1"), ("t.parquet#2", "1"), ("y" * 10**6, "1")],
             parquet([b"a"] * 4, ids=["x", "x", None, "y" * 10**6])),
            ("ids are lists", {"id_column": "id"}, "ConfigError", parquet([b"a"], ids=[["x"]])),
            ("ids are times", {"id_column": "id"}, "ConfigError",
             parquet([b"a"], ids=pa.array([2**62], pa.timestamp("ns")))),
            ("footer of 2 GiB", {}, "ParquetDamagedError", PLAIN[:-8] + b"\xff\xff\xff\x7fPAR1"),
            ("half", {}, "ParquetDamagedError", PLAIN[: len(PLAIN) // 2]),
        ]
    ],
)  # fmt: skip
def test_a_parquet_file_that_lies_is_refused_or_told_in_rows(data, keys, expected):
    found = confined(doors.rows, "t.parquet", data, keys, memory=1024 * MIB)
    assert (found.error or found.value) == expected, found.text
    assert found.memory < 640 * MIB
