import gzip
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet_core.config.sections import InputConfig
from unet_core.errors import ConfigError, ImageError
from unet_core.inputs.formats import list_shards, open_source, read_shard
from unet_core.inputs.listing import _lines
from unet_core.inputs.shards import Source
from unet_core.runs.manifest import draft, names, with_members
from unet_core.storage.store import Store


@pytest.fixture
def images(tmp_path):
    """Four objects in two folders."""
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/m3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def read_all(path, **keys):
    source = open_source(InputConfig(uri=str(path), format="list", **keys))
    shards = list(list_shards(source))
    return shards, [sample for shard in shards for sample in read_shard(source, shard)]


def test_csv_and_parquet_lists_read_what_they_name(images):
    rows = {
        "uri": ["a/1.png", f"{images}/a/2.png", f"file://{images}/b/3.png"],
        "id": [None, "second", None],
        "truth": [None, None, "b/m3.png"],
        "bytes": [7, None, 7],
    }
    pq.write_table(pa.table(rows), images / "list.parquet")
    lines = [",".join("" if v is None else str(v) for v in row) for row in zip(*rows.values())]  # noqa: B905
    text = "\n".join([",".join(rows), *lines])
    (images / "list.csv").write_text(text)
    (images / "list.csv.gz").write_bytes(gzip.compress(text.encode()))
    seen = []
    for name in ("list.parquet", "list.csv", "list.csv.gz"):
        shards, samples = read_all(images / name, shard_images=2, masks="truth")
        assert [shard.count for shard in shards] == [2, 1]
        assert [s.image_id for s in samples] == ["a/1.png", "second", "b/3.png"]
        assert [s.read() for s in samples] == [b"a/1.png", b"a/2.png", b"b/3.png"]
        assert samples[2].read_mask() == b"b/m3.png"
        seen.append([shard.shard_id for shard in shards])
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    "uri",
    ["/etc/passwd", "../x.png", "http://169.254.169.254/x", "dir::file:///etc/x", "s3://other/x.png",
     "file:///etc/passwd", "{root}/a/../../x.png", "{root}x/1.png"],
)  # fmt: skip
def test_nothing_outside_the_allowed_prefixes_is_opened(images, uri):
    (images / "list.csv").write_text("uri\n" + uri.format(root=images) + "\n")
    with pytest.raises(ConfigError, match=r"input\.allow: the list names"):
        read_all(images / "list.csv", allow=[f"{images}/a", "s3://bucket/prefix"])


@pytest.mark.parametrize("prefix", ["a", "../{name}/a", "~/a", "local://{root}/a/"])
def test_an_allowed_prefix_may_be_written_as_any_other_path(images, prefix, monkeypatch):
    monkeypatch.chdir(images)
    monkeypatch.setenv("HOME", str(images))
    (images / "list.CSV").write_text(f"uri\na/1.png\n{images}/a/2.png\nlocal://{images}/a/3.png\n")
    allow = prefix.format(name=images.name, root=images)
    _, samples = read_all(images / "list.CSV", allow=[allow])
    assert [sample.image_id for sample in samples] == ["1.png", "2.png", "3.png"]


def test_paths_alike_below_several_prefixes_are_images_of_their_own(images):
    (images / "b" / "1.png").write_bytes(b"b/1.png")
    uris = [f"{images}/{name}" for name in ("a/1.png", "a/2.png", "b/1.png")]
    allow = [f"{images}/a", f"{images}/b/", f"{images}/a/"]
    (images / "list.csv").write_text("\n".join(["uri", *uris]))
    _, samples = read_all(images / "list.csv", allow=allow)
    assert [sample.image_id for sample in samples] == uris
    _, samples = read_all(images / "list.csv", allow=[str(images)])
    assert [sample.image_id for sample in samples] == ["a/1.png", "a/2.png", "b/1.png"]


@pytest.mark.parametrize(
    ("had", "listed", "new"),
    [
        ("uri\n{a}/1.png\n", "uri\n{a}/1.png\n{b}/1.png\n", ["{b}/1.png"]),
        ("uri,id\n{a}/1.png,1.png\n", "uri\n{a}/1.png\n{b}/1.png\n", ["{b}/1.png"]),
        ("uri,id\n{a}/1.png,x\n", "uri,id\n{a}/1.png,x\n{b}/1.png,x\n{a}/1.png,y\n", ["x", "y"]),
    ],
)
def test_what_a_run_has_is_known_by_where_it_lies_and_its_own_id(images, had, listed, new):
    places = {"a": f"{images}/a", "b": f"{images}/b"}
    config = InputConfig(uri=f"{images}/list.csv", format="list", allow=list(places.values()))
    (images / "list.csv").write_text(had.format(**places))
    source, store = open_source(config), Store(f"{images}/run")
    with draft(list_shards(source)) as made:
        store.publish("manifest/00000.parquet", made.file)
        known = names(store, made.heads)
    assert list(list_shards(source, known)) == []
    (images / "list.csv").write_text(listed.format(**places))
    members = [member for shard in list_shards(source, known) for member in shard.members]
    assert [member.key for member in members] == [key.format(**places) for key in new]


def test_a_list_without_uris_or_masks_is_refused_with_its_columns(images):
    (images / "list.csv").write_text("path,mask\na/1.png,b\n")
    with pytest.raises(ConfigError, match="needs a column 'uri'; it has: path, mask"):
        read_all(images / "list.csv")
    (images / "list.csv").write_text("uri\na/1.png\n")
    with pytest.raises(ConfigError, match="has no column 'truth'"):
        read_all(images / "list.csv", masks="truth")


def test_an_inventory_names_its_files_and_their_columns(images):
    (images / "data").mkdir()
    rows = '"pictures","a/x+y%201.png","10","e1"\n"pictures","a/notes.txt","1","e2"\n'
    (images / "data" / "1.csv.gz").write_bytes(gzip.compress(rows.encode()))
    table = pa.table({"key": ["b/2.png"], "size": [5], "e_tag": ["e3"]})
    pq.write_table(table, images / "data" / "2.parquet")
    manifest = {
        "sourceBucket": "pictures",
        "fileSchema": "Bucket, Key, Size, ETag",
        "files": [{"key": "data/1.csv.gz"}, {"key": "data/2.parquet"}],
    }
    (images / "manifest.json").write_text(json.dumps(manifest))
    source = Source(InputConfig(uri=str(images), format="list"), "list", Store(str(images)),
                    ("manifest.json",))  # fmt: skip
    found = [(line.uri, line.bytes, line.etag) for line in _lines(source)]
    assert found == [("s3://pictures/a/x y 1.png", 10, "e1"), ("s3://pictures/b/2.png", 5, "e3")]
    with_masks = replace(source, config=source.config.model_copy(update={"masks": "truth"}))
    with pytest.raises(ConfigError, match=r"input\.masks: got 'truth', but the S3 Inventory"):
        list(_lines(with_masks))
    (images / "manifest.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"not the manifest\.json of an S3 Inventory"):
        list(_lines(source))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"uri,id\n,one\n", "line 2 has no uri"),
        (b"uri,bytes\na/1.png,12.0\n", "line 2 cannot be read"),
        (b"uri\na/\xe9.png\n", "cannot be read"),
        (b"uri\na/\n", "the list names"),
        (b"uri\na/\0.png\n", "the list names"),
    ],
)
def test_a_broken_list_is_told_by_line(images, text, reason):
    (images / "list.csv").write_bytes(text)
    with pytest.raises(ConfigError, match=reason):
        read_all(images / "list.csv")


def test_marks_and_empty_lines_of_a_csv_count_nothing(images):
    (images / "list.csv").write_bytes(b"\xef\xbb\xbfuri\n\na/1.png\n\n")
    _, samples = read_all(images / "list.csv")
    assert [s.image_id for s in samples] == ["a/1.png"]


def test_numbers_are_ids_too_and_a_row_without_uri_is_refused(images):
    pq.write_table(pa.table({"uri": ["a/1.png"], "id": [7]}), images / "list.parquet")
    assert read_all(images / "list.parquet")[1][0].image_id == "7"
    pq.write_table(pa.table({"uri": ["a/1.png", None]}), images / "list.parquet")
    with pytest.raises(ConfigError, match="a row has no uri"):
        read_all(images / "list.parquet")


def test_other_objects_are_other_shards_and_the_same_ones_twice_are_refused(images):
    (images / "list.csv").write_text("uri,id\na/1.png,x\na/2.png,x\n")
    shards, _ = read_all(images / "list.csv", shard_images=1)
    assert len({shard.shard_id for shard in shards}) == 2
    (images / "list.csv").write_text("uri\na/1.png\na/1.png\n")
    shards, _ = read_all(images / "list.csv", shard_images=1)
    with pytest.raises(ConfigError, match="comes twice"), draft(shards):
        pass


def test_older_versions_and_deletions_of_an_inventory_are_left_out(images):
    rows = (
        '"p","a/1.png","true","true"\n"p","a/2.png","false","false"\n"p","b/3.png","true","false"\n'
    )
    (images / "1.csv").write_text(rows)
    manifest = {"sourceBucket": "p", "fileSchema": "Bucket, Key, IsLatest, IsDeleteMarker",
                "files": [{"key": "1.csv"}]}  # fmt: skip
    (images / "manifest.json").write_text(json.dumps(manifest))
    config = InputConfig(uri=str(images), format="list")
    source = Source(config, "list", Store(str(images)), ("manifest.json",))
    assert [line.uri for line in _lines(source)] == ["s3://p/b/3.png"]
    (images / "manifest.json").write_text(json.dumps({**manifest, "fileFormat": "ORC"}))
    with pytest.raises(ConfigError, match="the inventory is ORC"):
        list(_lines(source))


def test_the_driver_holds_heads_and_members_come_from_the_manifest(images):
    (images / "list.csv").write_text("uri,bytes\n" + "".join(f"a/{n}.png,3\n" for n in range(100)))
    source = open_source(InputConfig(uri=str(images / "list.csv"), format="list", shard_images=3))
    whole = list(list_shards(source))
    store = Store(str(images / "run"))
    with draft(whole) as made:
        store.publish("manifest/00000.parquet", made.file)
        assert all(head.members == () for head in made.heads)
        for shard, head in zip(whole, made.heads, strict=True):
            again = with_members(store, head)
            assert (again.members, again.shard_id) == (shard.members, shard.shard_id)


def test_a_row_that_names_no_file_fails_alone(images):
    (images / "folder").mkdir()
    (images / "a.png").write_bytes(b"image")
    named = ["a.png", "folder", "a.png/b.png", "x" * 300, "list.csv"]
    (images / "list.csv").write_text("\n".join(["uri", *named]))
    source = open_source(InputConfig(uri=str(images / "list.csv"), format="list"))
    (shard,) = list_shards(source)
    codes = {}
    for sample in read_shard(source, shard):
        try:
            codes[sample.image_id] = bool(sample.read())
        except ImageError as failure:
            codes[sample.image_id] = failure.code
    assert list(codes.values()) == [True, "missing", "missing", "missing", True]
