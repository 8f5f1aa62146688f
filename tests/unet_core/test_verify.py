import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.predict import predict
from tests.data import write_tar, write_tars
from unet_core.errors import StoreError
from unet_core.runs.verify import verify
from unet_core.synthetic import nuclei, png


@pytest.fixture
def run(make_config, tmp_path):
    """A finished run over tars of its own."""
    tars = write_tars(tmp_path / "tars" if (tmp_path / "tars").mkdir() is None else tmp_path)
    predict(make_config(input={"uri": str(tars)}))
    return tmp_path / "run"


def part(run, kind):
    return sorted((run / kind).glob("*.parquet"))[0]


def rewrite_rows(path, change):
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def test_a_finished_run_is_verified_even_deeply(run):
    findings = verify(str(run), deep=True)
    assert findings.problems == []
    assert findings.notes == []
    assert findings.totals.images_seen == 12


def test_what_is_hidden_in_a_tar_is_not_missed(make_config, tmp_path):
    image = png(nuclei(64, 64, np.random.default_rng(0))[0])
    names = ("a.png", "./b/../c.png", ".d.png", "e/.ipynb_checkpoints/f.png", ".../g.png")
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "t.tar", dict.fromkeys(names, image))
    totals = predict(make_config(input={"uri": f"{tmp_path}/in", "masks": ""})).totals
    assert totals.images_seen == 2
    assert verify(str(tmp_path / "run"), deep=True).problems == []


def drop_row(run):
    rewrite_rows(part(run, "metrics"), lambda rows: rows.pop())


def change_count(run):
    def shift(rows):
        rows[0]["class_pixels"][0] -= 1
        rows[0]["class_pixels"][1] += 1

    rewrite_rows(part(run, "metrics"), shift)


def lose_pixels(run):
    rewrite_rows(part(run, "metrics"), lambda rows: rows[0].update(class_pixels=[1, 1]))


def rename_image(run):
    rewrite_rows(part(run, "metrics"), lambda rows: rows[0].update(image_id="x", status="failed"))


def change_masks(run):
    rewrite_rows(part(run, "masks"), lambda rows: rows[0].update(mask=bytes(len(rows[0]["mask"]))))


def lose_masks(run):
    part(run, "masks").unlink()


def damage_metrics(run):
    part(run, "metrics").write_bytes(b"PAR1 damaged")


def flip_metrics(run):
    data = bytearray(part(run, "metrics").read_bytes())
    data[30] ^= 255
    part(run, "metrics").write_bytes(bytes(data))


def lose_commit(run):
    part(run, "metrics").unlink()


def add_orphan(run):
    shutil.copy(part(run, "metrics"), run / "metrics" / "0123456789ab.parquet")
    shutil.copy(part(run, "masks"), run / "masks" / "0123456789ab.parquet")


def swap_parts(run):
    first, second = sorted((run / "metrics").glob("*.parquet"))[:2]
    shutil.copy(second, first)


def change_totals(run):
    totals = json.loads((run / "_SUCCESS").read_text())
    (run / "_SUCCESS").write_text(json.dumps(totals | {"ok": totals["ok"] + 1}))


def change_fingerprint(run):
    record = json.loads((run / "run.json").read_text())
    record["identity"]["model.threshold"] = 0.4
    (run / "run.json").write_text(json.dumps(record))


def lose_tar(run):
    sorted((run.parent / "tars").glob("*.tar"))[0].unlink()


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (drop_row, "images seen, but"),
        (change_count, "class_pixels are not those of its mask"),
        (lose_pixels, "class_pixels do not sum"),
        (rename_image, "has a row but is not in the input"),
        (change_masks, "another SHA-256"),
        (lose_masks, "cannot read"),
        (damage_metrics, "not a whole Parquet file"),
        (flip_metrics, "not a whole Parquet file"),
        (lose_commit, "is not committed"),
        (add_orphan, "belongs to no shard of the manifest"),
        (swap_parts, "ok rows in two shards"),
        (change_totals, "not the sums"),
        (change_fingerprint, "fingerprint of another run"),
        (lose_tar, "has a row but is not in the input"),
    ],
)
def test_whatever_is_off_is_found(run, spoil, found):
    spoil(run)
    problems = verify(str(run), deep=True).problems
    assert any(found in problem for problem in problems), problems


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"not a run folder: it has no run\.json"):
        verify(str(tmp_path))
