import hashlib
import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from unet_core.errors import CommitConflictError
from unet_core.runs.parts import ROW_GROUP_BYTES, MasksPart, commit, metrics_part
from unet_core.storage.store import Store


def row(number, data):
    names = ("y", "x", "height", "width", "image_height", "image_width")
    return {"image_id": str(number), **dict.fromkeys(names, 0), "encoding": "raw", "mask": data}


def test_row_groups_are_cut_by_bytes():
    part = MasksPart("raw", {"fingerprint": "f"})
    for number in range(5):
        part.add(row(number, bytes(ROW_GROUP_BYTES // 2)))
    file, _, size = part.finish()
    file.seek(0)
    data = file.read()
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


def parts(failed=(), masks=b"masks", other=0):
    """Masks, and a metrics part of two images that belongs to them."""
    rows = [
        {"image_id": name, "status": "failed" if name in failed else "ok", "height": other,
         "error_code": "timeout" if name in failed else None}
        for name in "ab"
    ]  # fmt: skip
    footer = {"masks_sha256": hashlib.sha256(masks).hexdigest(), "images_seen": "2"}
    return io.BytesIO(masks), metrics_part(rows, footer)


def commit_all(store, **made):
    masks, metrics = parts(**made)
    commit(store, "s", masks, metrics)
    return store.read("masks/s.parquet"), store.read("metrics/s.parquet")


def test_a_second_commit_must_be_equal_and_changes_nothing(tmp_path):
    store = Store(str(tmp_path))
    first = commit_all(store)
    assert commit_all(store) == first
    with pytest.raises(CommitConflictError, match="shard s is committed with other bytes"):
        commit_all(store, masks=b"others", other=1)
    assert store.read("masks/s.parquet") == b"masks"
    assert commit_all(store, failed="a", masks=b"less") == first  # it failed there, and not here


def test_masks_without_a_commit_are_replaced(tmp_path):
    store = Store(str(tmp_path))
    store.publish("masks/s.parquet", b"of an attempt that was killed")
    assert commit_all(store)[0] == b"masks"


class Raced(Store):
    """Another attempt works on the shard just before a name is written here."""

    def before(self, name, happens):
        self.when, self.happens = name, happens
        return self

    def publish_exclusively(self, name, source):
        if name.startswith(self.when):
            self.when = "never"
            self.happens()
        return super().publish_exclusively(name, source)


def test_an_attempt_that_loses_a_race_leaves_the_masks_of_the_winner(tmp_path):
    store = Store(str(tmp_path))
    raced = Raced(str(tmp_path)).before("masks/", lambda: commit_all(store))
    assert commit_all(raced, failed="a", masks=b"less")[0] == b"masks"


def test_a_commit_whose_masks_were_replaced_just_before_is_taken_back(tmp_path):
    store = Store(str(tmp_path))

    def other_commits():  # its masks were there, and ours took their place
        store.publish_exclusively("metrics/s.parquet", parts()[1])

    store.publish("masks/s.parquet", b"masks")
    raced = Raced(str(tmp_path)).before("metrics/", other_commits)
    with pytest.raises(CommitConflictError, match="taken back; run the same command again"):
        commit_all(raced, failed="a", masks=b"less")
    assert not store.exists("metrics/s.parquet")
