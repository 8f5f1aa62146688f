import gzip
import io
import logging
import shutil
import tarfile
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.data import read_all, write_tar
from unet_core.config.sections import InputConfig
from unet_core.errors import ConfigError, StoreError
from unet_core.images.sample import Sample
from unet_core.inputs.container import Container
from unet_core.inputs.formats import FORMATS
from unet_core.inputs.shards import make_shard
from unet_core.runs.run_folder import require_empty
from unet_core.storage.store import Store
from unet_core.synthetic import nuclei, png

IMAGE, MASK = b"image", b"mask"


def write(root, *names, data=IMAGE):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_loose_images_are_grouped_by_name_at_any_depth(tmp_path):
    write(tmp_path, "b/2.png", "a/1.JPG", "c.tiff", "notes.txt", "deep/er/3.png", ".hidden.png")
    shards, samples = read_all(uri=tmp_path, shard_images=3)
    assert [(shard.first, shard.count) for shard in shards] == [(0, 3), (3, 1)]
    ids = [(s.image_id, s.key) for group in samples for s in group]
    assert ids == [("a/1.JPG", "1"), ("b/2.png", "2"), ("c.tiff", "c"), ("deep/er/3.png", "3")]
    assert samples[0][0].read() == IMAGE


def test_a_group_of_loose_images_ends_before_it_has_too_many_bytes(tmp_path):
    for name, size in (("a", 400_000), ("b", 500_000), ("c", 200_000), ("d", 3_000_000), ("e", 1)):
        write(tmp_path, f"{name}.png", data=bytes(size))
    shards, _ = read_all(uri=tmp_path, shard_mb=1.0)
    assert [(shard.first, shard.count, shard.bytes) for shard in shards] == [
        (0, 2, 900_000), (2, 1, 200_000), (3, 1, 3_000_000), (4, 1, 1)
    ]  # fmt: skip
    by_both, _ = read_all(uri=tmp_path, shard_mb=1.0, shard_images=1)
    assert len(by_both) == 5
    alone, _ = read_all(uri=tmp_path, shard_images=2)
    same, _ = read_all(uri=tmp_path, shard_images=2, shard_mb=0.95)
    assert same[0].shard_id == alone[0].shard_id  # an id follows from the members alone


def test_a_shard_id_changes_with_its_content_and_with_nothing_else(tmp_path):
    write(tmp_path, "1.png", "2.png")
    (before,), _ = read_all(uri=tmp_path)
    (same,), _ = read_all(uri=f"{tmp_path}/")
    assert before == same
    write(tmp_path, "2.png", data=b"other bytes")
    (after,), _ = read_all(uri=tmp_path)
    assert after.shard_id != before.shard_id


def test_masks_are_found_by_exactly_equal_stems(tmp_path, caplog):
    write(tmp_path, "im/a1.png", "im/a10.png", "im/sub/b.jpg", "im/lonely.png")
    write(tmp_path, "truth/a1.tif", "truth/a10.png", "truth/sub/b.png", data=MASK)
    with caplog.at_level(logging.WARNING):
        _, (samples,) = read_all(uri=tmp_path / "im", masks=f"{tmp_path}/truth")
    assert "1 of 4 images have no mask" in caplog.text
    assert "lonely.png" in caplog.text
    found = {s.key: s.read_mask and s.read_mask() for s in samples}
    assert found == {"a1": MASK, "a10": MASK, "b": MASK, "lonely": None}


def test_masks_may_be_named_after_whole_images_as_exports_are(tmp_path):
    write(tmp_path, "im/a.tif", "im/sub/b.jpg")
    write(tmp_path, "truth/a.tif.png", "truth/sub/b.jpg.png", data=MASK)
    _, (samples,) = read_all(uri=tmp_path / "im", masks=f"{tmp_path}/truth")
    assert [sample.read_mask() for sample in samples] == [MASK, MASK]


def test_masks_below_the_input_or_with_a_suffix_are_not_images(tmp_path):
    write(tmp_path / "x", "a.png", "b.png", "masks/a.png", "masks/b.png")
    _, (samples,) = read_all(uri=tmp_path / "x", masks=f"{tmp_path}/x/masks/")
    assert [s.image_id for s in samples] == ["a.png", "b.png"]
    write(tmp_path / "y", "a.png", "a_mask.png", "b.png", "b_mask.tif")
    _, (samples,) = read_all(uri=tmp_path / "y", masks="_mask")
    assert [(s.image_id, s.read_mask is not None) for s in samples] == [
        ("a.png", True),
        ("b.png", True),
    ]


def test_masks_that_fit_no_image_are_refused_with_examples(tmp_path):
    write(tmp_path, "im/a.png", "truth/z.png")
    with pytest.raises(ConfigError, match=r"none of 1 images.*images: a\.png; masks: z\.png"):
        read_all(uri=tmp_path / "im", masks=f"{tmp_path}/truth")
    write(tmp_path, "truth/a.png", "truth/a.tif")
    with pytest.raises(ConfigError, match="two masks of one name"):
        read_all(uri=tmp_path / "im", masks=f"{tmp_path}/truth")


def test_what_the_input_is_must_be_clear(tmp_path):
    with pytest.raises(StoreError, match="there is nothing at"):
        read_all(uri=tmp_path / "nowhere")
    write(tmp_path, "readme.txt")
    with pytest.raises(StoreError, match=r"no images, tars or Parquet files"):
        read_all(uri=tmp_path)
    write(tmp_path, "list.csv")
    with pytest.raises(StoreError, match=r"to read a list .*, set input\.format = 'list'"):
        read_all(uri=tmp_path / "list.csv")
    write(tmp_path, "a.png")
    write_tar(tmp_path / "a.tar", {"b.png": IMAGE})
    with pytest.raises(ConfigError, match=r"1 for .webdataset. .*1 for .folder.*say which"):
        read_all(uri=tmp_path)
    assert len(read_all(uri=tmp_path, format="webdataset")[0]) == 1
    _, ((sample,),) = read_all(uri=tmp_path / "a.png")
    assert sample.image_id == "a.png"
    _, ((sample,),) = read_all(uri=tmp_path / "a.tar")
    assert sample.image_id == "a.tar/b"


def test_tar_masks_are_never_images_and_order_within_a_key_is_free(tmp_path):
    write_tar(
        tmp_path / "t.tar",
        {
            "d/a.mask.png": MASK,
            "d/a.png": IMAGE,
            "b.png": IMAGE,
            "b.json": b"{}",
            "b.mask.png": MASK,
            "c.d.1.jpg": IMAGE,
            "e.seg.png": MASK,
        },
    )
    _, (samples,) = read_all(uri=tmp_path, masks="mask.png")
    found = [(s.image_id, s.key, s.read_mask is not None) for s in samples]
    assert found == [
        ("t.tar/d/a", "a", True),
        ("t.tar/b", "b", True),
        ("t.tar/c.d.1", "c.d.1", False),
    ]
    _, (samples,) = read_all(uri=tmp_path)
    assert [s.key for s in samples] == ["a", "b", "c.d.1"]


@pytest.mark.parametrize("keep", [600, 512 * 5, -1024 * 9])
def test_a_tar_cut_short_adds_a_failure_and_keeps_what_came_before(tmp_path, keep):
    image = png(nuclei(40, 40, np.random.default_rng(0))[0])
    write_tar(tmp_path / "t.tar", {"a.png": image, "b.png": image, "c.png": image})
    whole = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(whole[:keep])
    _, (samples,) = read_all(uri=tmp_path)
    *images, last = samples
    assert last.failure.code == "tar"
    assert last.image_id == "t.tar"
    assert all(sample.read() == image for sample in images)
    assert len(images) < 3 or keep < 0


def tar_bytes(tmp_path, *names):
    write_tar(tmp_path / "scratch.tar_", dict.fromkeys(names, IMAGE))
    return (tmp_path / "scratch.tar_").read_bytes()


def test_whatever_a_tar_is_made_of_its_images_are_read_or_told(tmp_path):
    whole = tar_bytes(tmp_path, "a.png", "b.png", "c.png")
    zeroed = whole[:1024] + bytes(512) + whole[1536:]
    packed = gzip.compress(whole)
    broken = bytearray(gzip.compress(whole, compresslevel=0))
    broken[600] ^= 1
    cases = {
        "whole": (whole, ["a", "b", "c"]),
        "joined": (whole + tar_bytes(tmp_path, "d.png"), ["a", "b", "c", "d"]),
        "zeroed": (zeroed, ["a", "c", ""]),
        "packed": (packed, ["a", "b", "c"]),
        "packed in two": (
            gzip.compress(whole[:1000]) + gzip.compress(whole[1000:]),
            ["a", "b", "c"],
        ),
        "packed without its end": (packed[:-8], ["a", "b", "c", ""]),
        "packed and broken": (bytes(broken), None),
        "empty": (b"", [""]),
        "no tar": (b"hello" * 500, [""]),
    }
    for number, (name, (data, keys)) in enumerate(cases.items()):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "t.tar").write_bytes(data)
        _, (samples,) = read_all(uri=tmp_path / f"{number}")
        if keys is None:
            assert samples[-1].failure.code == "tar", name
        else:
            assert [sample.key for sample in samples] == keys, name
            assert [sample.failure is not None for sample in samples] == [not k for k in keys], name


@pytest.mark.parametrize(
    "headers",
    [{"GNU.sparse.map": "x,y"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}],
)
def test_a_hostile_header_is_a_failure_of_its_tar(tmp_path, headers):
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = len(IMAGE), headers
        tar.addfile(info, io.BytesIO(IMAGE))
    _, (samples,) = read_all(uri=tmp_path)
    assert samples[-1].failure.code == "tar"


def test_resource_forks_are_no_images_and_part_no_mask_from_its_image(tmp_path):
    write_tar(
        tmp_path / "t.tar",
        {"._a.png": b"fork", "a.png": IMAGE, "._a.mask.png": b"fork", "a.mask.png": MASK,
         ".ipynb_checkpoints/b.png": b"copy", "./c/.d/e.png": b"copy", "./c/../f.png": IMAGE},
    )  # fmt: skip
    _, ((sample, above),) = read_all(uri=tmp_path, masks="mask.png")
    assert sample.key == "a"
    assert sample.read_mask() == MASK
    assert above.image_id == "t.tar/c/../f"


@pytest.mark.parametrize(("first", "second"), [("a.tar", "B.TAR"), ("a.parquet", "B.Parquet")])
def test_the_case_of_an_ending_does_not_matter(tmp_path, first, second):
    write_tar(tmp_path / "a.tar", {"a.png": IMAGE})
    pq.write_table(pa.table({"image": [IMAGE]}), tmp_path / "a.parquet")
    for name in (first, second):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(tmp_path / first, tmp_path / "in" / name)
    assert [shard.uri for shard in read_all(uri=tmp_path / "in")[0]] == [second, first]


def test_names_of_any_kind_become_text(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a\udce9.png", "b c'd\"\n😀%.png"):
            tar.addfile(tarfile.TarInfo(name))
    _, (samples,) = read_all(uri=tmp_path)
    ids = [sample.image_id for sample in samples]
    assert ids == ["t.tar/a\\xe9", "t.tar/b c'd\"\n😀%"]


@pytest.mark.parametrize("masks", ["png", "_mask", "masks/"])
def test_a_mask_suffix_that_cannot_be_one_is_refused_for_tars(tmp_path, masks):
    write_tar(tmp_path / "t.tar", {"a.png": IMAGE})
    with pytest.raises(ConfigError, match="a member suffix such as"):
        read_all(uri=tmp_path, masks=masks)


def test_an_image_that_only_looks_like_a_mask_is_an_image(tmp_path):
    write(tmp_path, "a.png", "a_mask.png", "gas_mask.png")
    _, (samples,) = read_all(uri=tmp_path, masks="_mask")
    assert [sample.image_id for sample in samples] == ["a.png", "gas_mask.png"]


def test_every_format_may_be_asked_for():
    asked = get_args(InputConfig.model_fields["format"].annotation)
    assert set(asked) == {"auto", *FORMATS}


def test_a_container_is_one_object_and_one_row(tmp_path, monkeypatch):
    def list_shards(source, known):
        for entry in source.entries():
            if entry.name.endswith(".toy") and entry.name not in known:
                yield make_shard(entry.name, entry.bytes, entry.etag)

    def read(source, shard):
        yield Sample(shard.uri, "", "", lambda: source.root.read(shard.uri))

    monkeypatch.setitem(FORMATS, "toy", Container(list_shards, read, (".toy",)))
    write(tmp_path, "a.toy", "b.toy", "readme.txt")
    _, ((first,), (second,)) = read_all(uri=tmp_path)
    assert (first.image_id, second.image_id, second.read()) == ("a.toy", "b.toy", IMAGE)


def test_an_input_without_anything_of_its_format_is_refused(tmp_path):
    write(tmp_path, "notes.txt")
    for kind in FORMATS:
        with pytest.raises(StoreError, match=f"nothing of format '{kind}'"):
            read_all(uri=tmp_path, format=kind)


def test_links_in_a_tar_are_failures_and_never_followed(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        link = tarfile.TarInfo("passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    _, ((sample,),) = read_all(uri=tmp_path)
    assert sample.failure.code == "not_a_file"


def test_a_zarr_store_among_images_is_passed_over_with_a_word_and_is_no_empty_output(
    tmp_path, caplog
):
    write(tmp_path, "a.png", "plate.zarr/zarr.json", "plate.zarr/c/0/0.png", "odd/.zattrs")
    _, (samples,) = read_all(uri=tmp_path)
    assert [sample.image_id for sample in samples] == ["a.png"]
    (told,) = caplog.messages
    assert "2 folders with a file of Zarr (odd/.zattrs) are passed over" in told
    with pytest.raises(ConfigError, match=r"holds other files \(zarr\.json\) and no run"):
        require_empty(Store(str(tmp_path / "plate.zarr")))
