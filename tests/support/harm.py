"""What can be wrong with a finished run: harm to its folder, and who calls it what."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq


def part(run, kind):
    return sorted((run / kind).glob("*.parquet"))[0]


def rewrite_rows(path, change):
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def drop_row(run):
    rewrite_rows(part(run, "metrics"), lambda rows: rows.pop())


def repeat_row(run):
    rewrite_rows(part(run, "metrics"), lambda rows: rows.append(rows[0]))


def change_key(run):
    rewrite_rows(part(run, "metrics"), lambda rows: rows[0].update(key="other"))


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


def lose_window(run):
    rewrite_rows(part(run, "masks"), lambda rows: rows.pop(0))


def lose_masks(run):
    part(run, "masks").unlink()


def leave_file(run):
    (run / "manifest" / "_00000.parquet.1.tmp").touch()


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
    record["fingerprint"] = 64 * "0"
    (run / "run.json").write_text(json.dumps(record))


def lose_tar(run):
    sorted((run.parent / "tars").glob("*.tar"))[0].unlink()


HARM = [
    (drop_row, "lost", "images seen, but"),
    (repeat_row, "duplicated", "ok rows in two shards"),
    (change_key, "differing", None),
    (change_count, "uncovered", "class_pixels are not those of its mask"),
    (lose_pixels, "uncovered", "class_pixels do not sum"),
    (rename_image, "lost", "has a row but is not in the input"),
    (change_masks, "differing", "another SHA-256"),
    (lose_window, "uncovered", "another SHA-256"),
    (lose_masks, "orphaned", "cannot read"),
    (leave_file, "orphaned", None),
    (damage_metrics, "orphaned", "not a whole Parquet file"),
    (flip_metrics, "orphaned", "not a whole Parquet file"),
    (lose_commit, "lost", "is not committed"),
    (add_orphan, "orphaned", "belongs to no shard of the manifest"),
    (swap_parts, "duplicated", "ok rows in two shards"),
    (change_totals, "unaccounted", "not the sums"),
    (change_fingerprint, "differing", "fingerprint of another run"),
    (lose_tar, None, "has a row but is not in the input"),
]
"""What it is called by the oracle of the chaos harness and by verify; None: not their business."""
