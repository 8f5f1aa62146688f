import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from unet_core.errors import CommitConflictError
from unet_core.parts import ROW_GROUP_BYTES, MasksPart, commit
from unet_core.storage.store import Store


def row(number, data):
    names = ("y", "x", "height", "width", "image_height", "image_width")
    return {"image_id": str(number), **dict.fromkeys(names, 0), "encoding": "raw", "mask": data}


def test_row_groups_are_cut_by_bytes():
    part = MasksPart("raw", {"fingerprint": "f"})
    for number in range(5):
        part.add(row(number, bytes(ROW_GROUP_BYTES // 2)))
    file, _, size = part.finish()
    data = file.read() if file.seek(0) == 0 else b""
    assert size == len(data) < ROW_GROUP_BYTES
    footer = pq.ParquetFile(io.BytesIO(data)).metadata
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [2, 2, 1]
    masks = footer.row_group(0).column(footer.num_columns - 1)
    assert masks.compression == "ZSTD"
    assert masks.statistics is None
    assert not masks.has_dictionary_page
    part.close()


def test_a_part_is_the_same_bytes_every_time():
    random = np.random.default_rng(0)
    data = [random.bytes(1000) for _ in range(20)]
    digests = set()
    for _ in range(2):
        part = MasksPart("png", {"fingerprint": "f"})
        for number, mask in enumerate(data):
            part.add(row(number, mask))
        digests.add(part.finish()[1])
        part.close()
    assert len(digests) == 1


def test_a_second_commit_must_be_equal_and_changes_nothing(tmp_path):
    store = Store(str(tmp_path))
    commit(store, "s", io.BytesIO(b"masks"), b"metrics")
    commit(store, "s", io.BytesIO(b"late masks"), b"metrics")
    assert store.read("masks/s.parquet") == b"masks"
    with pytest.raises(CommitConflictError, match="shard s is committed with other bytes"):
        commit(store, "s", io.BytesIO(b"other"), b"other metrics")
    assert store.read("masks/s.parquet") == b"masks"
    assert store.read("metrics/s.parquet") == b"metrics"
