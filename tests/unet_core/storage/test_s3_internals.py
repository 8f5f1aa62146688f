"""Calls of ``object_stores`` that its libraries do not promise: a new version must still have them.

A test that fails here names the call to look at; nothing else has to break first.
"""

import asyncio
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import fsspec.asyn
import pytest
from aiobotocore import credentials
from aiobotocore.session import AioSession
from s3fs import S3FileSystem

import jobs
import unet_core
from tests.support.s3 import BUCKET
from unet_core.config.sections import StorageConfig
from unet_core.storage import object_stores

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # clients that s3fs caches

PRIVATE = re.compile(r"\bfs\._\w+|\bfsspec\.asyn\b|\bsession\._\w+|\bcall_s3\b")


@pytest.fixture
def fs(s3):
    """A filesystem as runs have it."""
    storage = StorageConfig(endpoint_url=s3.url, region="us-east-1")
    return object_stores.connect(f"s3://{BUCKET}/internals", storage)[0]


def require(owner, name, *parameters, is_coroutine=True):
    """Hold a function to what it is called with."""
    has = f"s3fs {version('s3fs')}, fsspec {version('fsspec')}: {owner.__name__}.{name}"
    function = getattr(owner, name, None)
    assert function is not None, f"{has} is gone; see what object_stores calls it for"
    there = inspect.signature(function).parameters
    missing = [parameter for parameter in parameters if parameter not in there]
    assert not missing, f"{has}{inspect.signature(function)} lacks {missing}, which are given"
    assert inspect.iscoroutinefunction(function) == is_coroutine, f"{has}: is it a coroutine?"


def test_only_object_stores_calls_what_is_private():
    files = [
        path for room in (jobs, unet_core) for path in Path(room.__file__).parent.rglob("*.py")
    ]
    users = {path.name for path in files if PRIVATE.search(path.read_text())}
    assert users == {"object_stores.py"}


def test_sync_gives_results_and_errors_and_has_a_time_limit(fs):
    async def echo(given, told):
        return given, told

    require(fsspec.asyn, "sync", "loop", "func", "args", "timeout", "kwargs", is_coroutine=False)
    assert fsspec.asyn.sync(fs.loop, echo, 1, timeout=5, told=2) == (1, 2)
    with pytest.raises(fsspec.FSTimeoutError):
        fsspec.asyn.sync(fs.loop, asyncio.sleep, 5, timeout=0.01)


def test_paths_are_split_into_bucket_and_key(fs):
    require(S3FileSystem, "split_path", "path", is_coroutine=False)
    assert fs.split_path(f"{BUCKET}/a/b") == (BUCKET, "a/b", None)
    assert fs.split_path(BUCKET)[:2] == (BUCKET, "")
    for key in ("a//b", "/a", "a/", "a?versionId=b", f"{BUCKET}/a"):
        assert fs.split_path(f"{BUCKET}/{key}") == fs.split_path(f"s3://{BUCKET}/{key}")
        assert fs.split_path(f"{BUCKET}/{key}")[:2] == (BUCKET, key)
    assert fs.req_kw == {}, f"s3fs {version('s3fs')}: req_kw is given with every request"
    payer = object_stores.connect(f"s3://{BUCKET}", StorageConfig(requester_pays=True))[0]
    assert payer.req_kw == {"RequestPayer": "requester"}


def test_call_s3_passes_arguments_on_and_gives_a_body_to_be_read_in_the_loop(fs, s3):
    require(S3FileSystem, "_call_s3", "method", "kwargs")
    etag = s3.client().put_object(Bucket=BUCKET, Key="internals/a", Body=b"0123456789")["ETag"]

    async def read(**how):
        found = await fs._call_s3("get_object", Bucket=BUCKET, Key="internals/a", **how)
        data = await found["Body"].read()
        found["Body"].close()
        return data

    assert fsspec.asyn.sync(fs.loop, read, IfMatch=etag, Range="bytes=2-4") == b"234"
    s3.requests.clear()
    with pytest.raises(OSError, match=r".") as refused:
        fsspec.asyn.sync(fs.loop, read, IfMatch='"another"')
    assert object_stores._code(refused.value) in ("412", "PreconditionFailed"), refused.value
    assert len(s3.requests) == 1, "fs.retries = 1 no longer means one try"


def test_the_public_call_s3_gives_an_answer_of_boto(fs, s3):
    assert hasattr(S3FileSystem, "call_s3"), f"s3fs {version('s3fs')}: call_s3 is gone"
    s3.client().put_object(Bucket=BUCKET, Key="internals/call/ü/a", Body=b"12345")
    kwargs = {"Bucket": BUCKET, "Prefix": "internals/call/", "MaxKeys": 1}
    answer = fs.call_s3("list_objects_v2", **kwargs)
    (found,) = answer["Contents"]
    assert (found["Key"], found["Size"]) == ("internals/call/ü/a", 5)
    assert re.fullmatch(r'"\w+"', found["ETag"])
    assert not answer["IsTruncated"]
    s3.client().put_object(Bucket=BUCKET, Key="internals/call/z", Body=b"")
    assert fs.call_s3("list_objects_v2", **kwargs)["IsTruncated"]


@pytest.mark.parametrize("name", ["_put_file", "_pipe_file"])
def test_uploads_are_whole_and_can_be_exclusive(fs, s3, tmp_path, name):
    given = ("lpath", "rpath") if name == "_put_file" else ("path", "data")
    require(S3FileSystem, name, *given, "mode")
    path = f"{BUCKET}/internals/{name}"
    (tmp_path / "x").write_bytes(b"first")

    def upload(**how):
        pair = (str(tmp_path / "x"), path) if name == "_put_file" else (path, b"first")
        fsspec.asyn.sync(fs.loop, getattr(fs, name), *pair, timeout=30, **how)

    s3.client().delete_object(Bucket=BUCKET, Key=f"internals/{name}")
    upload(mode="create")
    assert fs.cat_file(path) == b"first"
    with pytest.raises(OSError, match=r".") as refused:
        upload(mode="create")
    assert isinstance(refused.value, FileExistsError) or refused.value.errno == 22
    upload()


def test_a_session_takes_credentials_that_are_renewed():
    require(credentials, "create_assume_role_refresher", "client", "params", is_coroutine=False)
    session = AioSession()
    session._credentials = credentials.AioDeferredRefreshableCredentials(None, "assume-role")
    found = asyncio.run(session.get_credentials())
    assert found is session._credentials, "aiobotocore no longer keeps them in _credentials"
