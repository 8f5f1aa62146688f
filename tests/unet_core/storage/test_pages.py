"""Listings by one page of keys, by level and on disk: what they give, and what they cost."""

import random
import uuid
from pathlib import PurePosixPath

import pytest

from tests.support.s3 import BUCKET
from unet_core.config.sections import StorageConfig
from unet_core.errors import NotFoundError
from unet_core.storage import object_stores
from unet_core.storage.store import ZARR, Store

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # clients that s3fs caches

NAMES = ["a", "b.png", "ü %41+ ", ".hidden", "zarr.json", "._x", "c", "d"]
BY_LEVEL = 1
"""So few keys a page that every listing of more is cut off."""


@pytest.fixture
def store(s3):
    storage = StorageConfig(endpoint_url=s3.url, region="us-east-1")
    return Store(f"s3://{BUCKET}/test-{uuid.uuid4().hex[:8]}/root", storage)


def fill(s3, store, keys):
    prefix = store.root.removeprefix(f"{BUCKET}/")
    for key in keys:
        s3.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=key.encode())
    s3.requests.clear()


def names(store):
    return [entry.name for entry in store.list()]


def expected(keys):
    """The obvious twin: each key for itself."""
    stores = {}
    for key in sorted(keys, reverse=True):
        if PurePosixPath(key).name in ZARR:
            stores[PurePosixPath(key).parent] = key  # at last the first of them

    def is_given(key):
        folder, *above = PurePosixPath(key).parents
        if any(part.startswith(".") for part in folder.parts) or stores.keys() & {*above}:
            return False
        if folder in stores:
            return key == stores[folder]
        return not PurePosixPath(key).name.startswith(".")

    return sorted(filter(is_given, keys))


def tree(seed):
    """Files in folders, of which none has the name of a file."""
    pick = random.Random(seed)
    files = {}
    for _ in range(pick.randint(1, 25)):
        folders = [f"{name}.d" for name in pick.sample(NAMES, pick.randint(0, 3))]
        name = pick.choice(NAMES + [".zattrs"] * (seed % 2))
        files["/".join([*folders, name])] = None
    return list(files)


@pytest.mark.parametrize("seed", range(8))
def test_every_way_of_listing_gives_the_same(s3, store, tmp_path, monkeypatch, seed):
    keys = tree(seed)
    fill(s3, store, keys)
    local, memory = Store(str(tmp_path)), Store(f"memory://{uuid.uuid4().hex}")
    for key in keys:
        local.publish(key, key.encode())
        memory.publish(key, key.encode())
    entries = store.list()
    assert len(s3.requests) == 1
    monkeypatch.setattr(object_stores, "PAGE_KEYS", BY_LEVEL)
    assert store.list() == entries
    assert [entry.name for entry in entries] == names(local) == names(memory) == expected(keys)
    assert entries == [store.entry(name) for name in expected(keys)]  # sizes and etags


@pytest.mark.parametrize("seed", range(8))
def test_keys_that_no_file_system_has_are_listed_and_read_as_they_are(s3, store, monkeypatch, seed):
    pick = random.Random(seed)
    parts = ["a", "a", "b", ".h", "c?versionId=d"] + [""] * (seed % 3)
    keys = {"/".join(pick.choices(parts, k=pick.randint(1, 4))) for _ in range(10)}
    keys |= {"a", "a/", "a/b", "a//b"}
    fill(s3, store, keys := keys - {""})
    s3.client().put_object(Bucket=BUCKET, Key=f"{store.root.partition('/')[2]}/b/", Body=b"")
    seen = [key for key in keys - {"b/"} if not any(p.startswith(".") for p in key.split("/"))]
    by_page = store.list()
    assert [entry.name for entry in by_page] == sorted(seen)
    assert [store.read(entry.name, etag=entry.etag) for entry in by_page] == [
        entry.name.encode() for entry in by_page
    ]
    monkeypatch.setattr(object_stores, "PAGE_KEYS", BY_LEVEL)
    assert store.list() == by_page


def test_a_level_of_many_pages_is_listed_whole(s3, store):
    fill(s3, store, keys := [f"a//{number:04}" for number in range(1005)])
    assert names(store) == keys


def test_a_bucket_is_listed_from_its_top(s3, monkeypatch):
    bucket, client = f"top-{uuid.uuid4().hex[:8]}", s3.client()
    client.create_bucket(Bucket=bucket)
    store = Store(f"s3://{bucket}", StorageConfig(endpoint_url=s3.url, region="us-east-1"))
    assert (store.list(), store.first()) == ([], None)
    client.put_object(Bucket=bucket, Key="b/c/", Body=b"")
    for key in ("a", "b/c/d", "b/c.e/f"):
        client.put_object(Bucket=bucket, Key=key, Body=b"x")
    for size in (object_stores.PAGE_KEYS, BY_LEVEL):
        monkeypatch.setattr(object_stores, "PAGE_KEYS", size)
        assert names(store) == ["a", "b/c.e/f", "b/c/d"]
        assert [entry.name for entry in store.list("b/c/")] == ["d"]
    client.put_object(Bucket=bucket, Key="/e", Body=b"x")
    for size in (1000, BY_LEVEL):
        monkeypatch.setattr(object_stores, "PAGE_KEYS", size)
        assert names(store) == ["/e", "a", "b/c.e/f", "b/c/d"]


def test_folders_cost_no_request_while_a_page_holds_all(s3, store):
    fill(s3, store, [f"{folder:02}/{name}.png" for folder in range(60) for name in range(3)])
    assert len(store.list()) == 180
    assert s3.requests == [("GET", f"/{BUCKET}")]
    assert store.first() is not None
    assert len(s3.requests) == 2


def test_a_page_that_is_cut_off_is_followed_by_its_levels_but_not_those_of_a_zarr_store(
    s3, store, monkeypatch
):
    chunks = [f"cells.zarr/c/{row}/{column}" for row in range(50) for column in range(10)]
    fill(s3, store, [*chunks, "cells.zarr/zarr.json", "a/1.png", "a/2.png", "b.png"])
    monkeypatch.setattr(object_stores, "PAGE_KEYS", 100)
    assert names(store) == ["a/1.png", "a/2.png", "b.png", "cells.zarr/zarr.json"]
    assert len(s3.requests) == 4  # the page, the root, a, and cells.zarr


@pytest.mark.parametrize("size", [1000, BY_LEVEL])
def test_what_is_missing_is_told_whichever_way_it_is_listed(s3, store, monkeypatch, size):
    monkeypatch.setattr(object_stores, "PAGE_KEYS", size)
    assert store.list() == []
    assert len(s3.requests) == 1
    for uri in (store.uri(), "s3://no-such-bucket/x", "s3://no-such-bucket"):
        missing = Store(uri, store.storage)
        assert missing.list() == []
        with pytest.raises(NotFoundError, match=f"cannot list {uri}: there is no such file, fold"):
            missing.first()
    fill(s3, store, [".hidden"])
    s3.client().put_object(Bucket=BUCKET, Key=f"{store.root.partition('/')[2]}/folder/", Body=b"")
    assert (store.list(), store.first()) == ([], None)
