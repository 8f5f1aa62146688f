import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.data import read_all, write_tar
from tests.support.s3 import BUCKET
from unet_core.config.sections import InputConfig, StorageConfig
from unet_core.errors import StoreError
from unet_core.inputs.formats import list_shards, open_source
from unet_core.inputs.shards import described, ending_of
from unet_core.storage.store import Store, is_hidden

JUNK = (
    "._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", "@eaDir/b.png", "$RECYCLE.BIN/c.png",
    "System Volume Information/d.png", "__MACOSX/e.png", "lost+found/f.png", "#recycle/h.png",
    "sub/.ipynb_checkpoints/g.png", "sub/THUMBS.DB",
)  # fmt: skip


def write(root, *names, data=b"image"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_what_systems_leave_behind_is_hidden_and_counted_nowhere(tmp_path):
    write(tmp_path / "in", "a.PNG", "sub/lost.png", *JUNK)
    write_tar(tmp_path / "t.tar", dict.fromkeys(("a.PNG", "sub/lost.png", *JUNK), b"image"))
    source = open_source(InputConfig(uri=str(tmp_path / "in")))
    (shard,) = list_shards(source)
    assert [member.key for member in shard.members] == ["a.PNG", "sub/lost.png"]
    assert not source.passed_over
    _, (samples,) = read_all(uri=tmp_path / "t.tar")
    assert [sample.key for sample in samples] == ["a", "lost"]
    assert not any(map(is_hidden, ("a.png", "thumbs.db.png", "lost", "eaDir")))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # clients that s3fs caches
def test_it_is_hidden_in_object_stores_too(s3):
    for name in ("a.png", *JUNK):
        s3.client().put_object(Bucket=BUCKET, Key=f"hidden-things/{name}", Body=b"image")
    found = Store(
        f"s3://{BUCKET}/hidden-things", StorageConfig(endpoint_url=s3.url, region="us-east-1")
    ).list()
    assert [entry.name for entry in found] == ["a.png"]


def test_files_of_other_kinds_are_counted_by_their_endings(tmp_path):
    write(tmp_path, "a.png", "b.jpg", "notes.TXT", "x/more.txt", "t.csv.gz", "README", "v1/.x.json")
    source = open_source(InputConfig(uri=str(tmp_path)))
    list(list_shards(source))
    assert source.passed_over == {".txt": 2, ".csv.gz": 1, "without ending": 1}
    write_tar(tmp_path / "t.tar", {"b.png": b"image"})
    source = open_source(InputConfig(uri=str(tmp_path), format="webdataset"))
    list(list_shards(source))
    assert source.passed_over[".png"] == 1


def test_endings_are_described_by_how_many_there_are():
    assert described({}) == ""
    assert described({".b": 2, ".a": 2, ".c": 3000}) == "3,000 .c, 2 .a, 2 .b"
    many = {f".{letter}": 1 for letter in "abcdefghij"}
    assert described(many).endswith("1 .h, 2 others")
    names = {"a/b.TXT": ".txt", "x.nii.gz": ".nii.gz", "x.gz": ".gz"}
    names |= dict.fromkeys(("a.b/c", ".png", "a.not an ending", "a.longending"), "without ending")
    assert {name: ending_of(name) for name in names} == names


def inventory(root, *keys):
    rows = "".join(f'"p","{key}","9"\n' for key in keys)
    (root / "1.csv.gz").write_bytes(gzip.compress(rows.encode()))
    manifest = {"sourceBucket": "p", "fileSchema": "Bucket, Key, Size",
                "files": [{"key": "1.csv.gz"}]}  # fmt: skip
    (root / "manifest.json").write_text(json.dumps(manifest))
    return open_source(
        InputConfig(uri=str(root / "manifest.json"), format="list", allow=["s3://p"])
    )


def test_an_inventory_is_a_listing_whose_other_files_are_counted(tmp_path):
    source = inventory(tmp_path, "a/1.png", "a/notes.txt", "a/%40eaDir/1.png", "a/._1.png", "a/")
    (shard,) = list_shards(source)
    assert [member.key for member in shard.members] == ["a/1.png"]
    assert source.passed_over == {".txt": 1}


def test_a_list_that_names_a_hidden_file_means_it(tmp_path):
    (tmp_path / "list.csv").write_text("uri\n@eaDir/1.png\n")
    shards, _ = read_all(uri=tmp_path / "list.csv", format="list")
    assert shards[0].count == 1


def test_nothing_inside_is_the_same_error_for_every_container(tmp_path):
    empty = pa.table({"image": pa.array([], pa.binary()), "uri": pa.array([], pa.string())})
    for name in ("folder/x", "parquet/x", "list/x", "inventory/x"):
        write(tmp_path, f"{name}.txt")
    pq.write_table(empty, tmp_path / "parquet" / "0.parquet")
    (tmp_path / "list" / "l.csv").write_text("uri\n")
    (tmp_path / "nothing").mkdir()
    inputs = [
        {"uri": tmp_path / "nothing"},
        {"uri": tmp_path / "folder"},
        {"uri": tmp_path / "folder", "format": "folder"},
        {"uri": tmp_path / "parquet"},
        {"uri": tmp_path / "list", "format": "list"},
        {"uri": tmp_path / "list" / "l.csv", "format": "list"},
    ]
    for keys in inputs:
        with pytest.raises(StoreError, match=r"^input\.uri: no") as caught:
            read_all(**keys)
        is_folder_with_text = not str(keys["uri"]).endswith(("nothing", ".csv"))
        assert ("; it holds 1 .txt" in str(caught.value)) == is_folder_with_text
    with pytest.raises(StoreError, match=r"nothing of format 'list'.*; it holds 2 \.txt, 1 \.json"):
        list(list_shards(inventory(tmp_path / "inventory", "a.txt", "b.txt", "c.json")))
