"""Names that are hard to keep apart: segmented, found and verified."""

import io
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.predict import predict
from tests.support.s3 import BUCKET
from unet_core.runs.reader import open_run
from unet_core.runs.verify import verify
from unet_core.synthetic import nuclei, png

NAMES = [
    "with space", "'quotes\"", "new\nline", "tab\t", "50%25", "a#b", "a?b=c", "a*b", "a[b]c",
    "{a,b}", "😀", "\u05d0\u05d1\u202e", "back\\slash", "é", "e\u0301", "-rf", "~", "$HOME", "a:b",
    "c" * 250,
]  # fmt: skip
LONG = "/".join(["d" * 200] * 4) + "/" + "n" * 80
IMAGE = png(nuclei(32, 32, np.random.default_rng(0))[0])


def in_a_folder(root, names, _):
    for name in names:
        (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "in" / name).write_bytes(IMAGE)
    return {"uri": str(root / "in")}, {}, ""


def in_a_tar(root, names, _):
    with tarfile.open(root / "in.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(IMAGE)
            tar.addfile(info, io.BytesIO(IMAGE))
    return {"uri": str(root / "in.tar")}, {}, "in.tar/"


def in_a_store(root, names, s3):
    client = s3.client()
    names.remove("new\nline.png")  # the suite's store knows no such key
    for name in names:
        client.put_object(Bucket=BUCKET, Key=f"{root.name}/{name}", Body=IMAGE)
    return {"uri": f"s3://{BUCKET}/{root.name}"}, {"endpoint_url": s3.url}, ""


@pytest.mark.parametrize("place", [in_a_folder, in_a_tar, in_a_store])
def test_images_of_any_name_are_segmented_found_and_verified(place, make_config, tmp_path, s3):
    names = [f"{name}.png" for name in (*NAMES, LONG)]
    section, storage, before = place(tmp_path, names, s3)
    config = make_config(input={**section, "masks": ""}, storage=storage)
    predict(config)
    ids = sorted(f"{before}{name.removesuffix('.png') if before else name}" for name in names)
    run = str(tmp_path / "run")
    rows = [row for path in (tmp_path / "run" / "metrics").iterdir()
            for row in pq.read_table(path).to_pylist()]  # fmt: skip
    assert sorted(row["image_id"] for row in rows) == ids
    assert {row["status"] for row in rows} == {"ok"}
    masks = {open_run(run).mask(image_id).tobytes() for image_id in ids}
    assert len(masks) == 1
    assert verify(run, deep=True, storage=config.storage).problems == []
