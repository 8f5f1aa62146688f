"""The same job with its input and its run folder in an object store that checks signatures."""

import pickle
import re
import signal
import subprocess
import sys
import uuid
from collections import Counter

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from jobs.predict import predict
from tests.support.data import digests, pictures, write_parquet, write_tar
from tests.support.rgw import moto_only
from tests.support.runs import masks_by_key, write_toml
from tests.support.s3 import BUCKET, POLICY
from unet_core.config.sections import InputConfig, StorageConfig
from unet_core.errors import CheckpointError, ConfigError, ImageError, ShardError, StoreError
from unet_core.inputs.formats import list_shards, open_source, read_shard
from unet_core.networks import checkpoint
from unet_core.networks.header import checkpoint_digest, read_header, read_header_and_digest
from unet_core.runs.parts import read_metrics
from unet_core.runs.run import Run
from unet_core.runs.verify import verify
from unet_core.storage import object_stores
from unet_core.storage.spool import spooled
from unet_core.storage.store import Store
from unet_core.synthetic import png

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # clients that s3fs caches


@pytest.fixture
def prefix():
    """A place of its own in the bucket."""
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def sources(s3, prefix, folder, tars, tmp_path):
    """The same pictures in every format: format → input section."""
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet" / "a.parquet")
    loose = s3.upload(folder, f"{prefix}/loose")
    (tmp_path / "list").mkdir()
    names = [name for name, _, _ in pictures()]
    listed = {
        "uri": [f"{loose}/images/{name}.png" for name in names],
        "truth": [f"{loose}/masks/{name}.png" for name in names],
    }
    pq.write_table(pa.table(listed), tmp_path / "list" / "list.parquet")
    return {
        "folder": {"uri": f"{loose}/images", "masks": f"{loose}/masks", "shard_images": 5},
        "webdataset": {"uri": s3.upload(tars, f"{prefix}/tars"), "masks": "mask.png"},
        "parquet": {"uri": s3.upload(tmp_path / "parquet", f"{prefix}/pq"), "masks": "truth"},
        "list": {
            "uri": s3.upload(tmp_path / "list", f"{prefix}/list"),
            "format": "list",
            "masks": "truth",
            "allow": [loose],
        },
    }


def test_every_format_in_the_store_gives_the_masks_of_local_tars(
    make_config, s3, prefix, sources, tmp_path
):
    predict(make_config(out="local"))
    expected = masks_by_key(Run(str(tmp_path / "local")))
    storage = {"endpoint_url": s3.url}
    for kind, section in sources.items():
        out = f"s3://{BUCKET}/{prefix}/run-{kind}"
        config = make_config(input=section, output={"uri": out}, storage=storage)
        s3.requests.clear()
        outcome = predict(config)
        assert (outcome.totals.ok, outcome.totals.with_truth) == (12, 12), kind
        assert masks_by_key(outcome.run) == expected, kind
        reads = Counter(path for method, path in s3.requests if method == "GET")
        check_reads(kind, prefix, reads)
        findings = verify(out, deep=True, storage=StorageConfig(**storage))
        assert findings.problems == findings.notes == [], kind
        before = s3.objects(f"{prefix}/run-{kind}")
        assert predict(config).was_finished
        assert s3.objects(f"{prefix}/run-{kind}") == before


def check_reads(kind, prefix, reads):
    """Nothing is read twice, and nothing is listed for an image."""
    images = {path: n for path, n in reads.items() if re.search(r"\.png$", path)}
    tars = {path: n for path, n in reads.items() if path.endswith(".tar")}
    if kind in ("folder", "list"):
        assert len(images) == 24
        assert set(images.values()) == {1}
    if kind == "webdataset":
        assert len(tars) == 6
        assert set(tars.values()) == {1}
    if kind == "parquet":
        assert reads[f"/{BUCKET}/{prefix}/pq/a.parquet"] <= 6  # footers, and one read a range
    listings = reads[f"/{BUCKET}"] + reads[f"/{BUCKET}/"]
    assert listings <= 40, listings


@pytest.mark.parametrize("stage", ["device", "between masks and metrics", "before the manifest"])
def test_a_driver_killed_with_its_run_in_the_store_continues(
    make_config, s3, prefix, tmp_path, stage
):
    predict(make_config(out="undisturbed"))
    config = make_config(
        output={"uri": f"s3://{BUCKET}/{prefix}/run"}, storage={"endpoint_url": s3.url}
    )
    toml = write_toml(config, tmp_path / "job.toml")
    command = [sys.executable, "-m", "tests.support.dying_driver", stage, "9", toml]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    outcome = predict(config)
    assert outcome.totals.images_seen == 12
    assert s3.digests(f"{prefix}/run") == digests(tmp_path / "undisturbed")


def test_wrong_credentials_and_missing_places_stop_with_one_sentence(
    make_config, s3, prefix, monkeypatch
):
    def refusal(uri, **storage):
        S3FileSystem.clear_instance_cache()
        section = {"uri": uri, "masks": ""}
        with pytest.raises(StoreError) as caught:
            predict(make_config(input=section, storage={"endpoint_url": s3.url, **storage}))
        assert s3.secret not in str(caught.value)
        return str(caught.value)

    assert "check the bucket's name and the prefix" in refusal(f"s3://{BUCKET}/{prefix}/nothing")
    assert "check the bucket's name and the prefix" in refusal("s3://no-such-bucket/x")
    away = refusal(f"s3://{BUCKET}/x", endpoint_url="http://127.0.0.1:9", deadline_s=1)
    assert "tried for 1 s" in away
    assert "the same command continues once the store answers" in away
    assert "could not be found" in refusal(f"s3://{BUCKET}/x", profile="nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "check the credentials" in refusal(f"s3://{BUCKET}/x")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "set AWS_ACCESS_KEY_ID" in refusal(f"s3://{BUCKET}/x")
    S3FileSystem.clear_instance_cache()


@moto_only("a role of RGW needs an administrator and a policy of its own")
def test_a_role_is_assumed_with_the_credentials_at_hand(s3, prefix):
    iam = boto3.client("iam", endpoint_url=s3.url)
    iam.create_role(RoleName="segmenter", AssumeRolePolicyDocument=POLICY)
    iam.put_role_policy(RoleName="segmenter", PolicyName="all", PolicyDocument=POLICY)
    role = "arn:aws:iam::123456789012:role/segmenter"
    storage = StorageConfig(endpoint_url=s3.url, region="us-east-1", role=role, deadline_s=5)
    store = Store(f"s3://{BUCKET}/{prefix}", storage)
    store.publish("a", b"by the role")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"by the role"
    assert s3.requests[0] != ("PUT", f"/{BUCKET}/{prefix}/a")  # the role was assumed first


def test_a_checkpoint_is_read_once_by_whoever_needs_it(s3, prefix, tiny_model):
    storage = StorageConfig(endpoint_url=s3.url)
    with open(tiny_model, "rb") as file:
        s3.client().put_object(Bucket=BUCKET, Key=f"{prefix}/m.safetensors", Body=file.read())
    uri = f"s3://{BUCKET}/{prefix}/m.safetensors"
    once = [("GET", f"/{BUCKET}/{prefix}/m.safetensors")]
    s3.requests.clear()
    header, digest = read_header_and_digest(uri, storage, "")
    assert s3.requests == once
    assert (header, digest) == (read_header(tiny_model), checkpoint_digest(tiny_model))
    s3.requests.clear()
    assert checkpoint.load(uri, digest, storage)[1] == header
    assert s3.requests == once
    with pytest.raises(CheckpointError, match=r"m\.safetensors is a U-Net of presets"):
        read_header_and_digest(uri, storage, "somewhere:build")


def test_a_run_of_ten_shards_asks_the_store_no_more_than_it_must(
    make_config, s3, prefix, tiny_model, tmp_path
):
    client, names = s3.client(), [f"{number}.tar" for number in range(10)]
    for name, (key, image, _) in zip(names, pictures(), strict=False):
        write_tar(tmp_path / name, {f"{key}.png": png(image)})
        client.upload_file(str(tmp_path / name), BUCKET, f"{prefix}/in/{name}")
    client.upload_file(tiny_model, BUCKET, f"{prefix}/m.safetensors")
    place = f"s3://{BUCKET}/{prefix}"
    config = make_config(
        input={"uri": f"{place}/in", "masks": ""},
        model={"checkpoint": f"{place}/m.safetensors"},
        output={"uri": f"{place}/run"},
        storage={"endpoint_url": s3.url},
    )
    s3.requests.clear()
    assert predict(config).totals.ok == 10
    reads = Counter(path.removeprefix(f"/{BUCKET}/{prefix}/") for _, path in s3.requests)
    assert reads["m.safetensors"] == 2  # one by the driver, one by the worker; were 6
    assert [reads[f"in/{name}"] for name in names] == [1] * 10
    assert len(s3.requests) <= 80  # were 90


ODD_KEYS = ("a/b.png", "a//b.png", "/b.png", "c.png/", "d?versionId=1.png", "d\\e.png", "f::g.png")


def test_images_with_keys_that_no_file_system_has_are_segmented(make_config, s3, prefix, tmp_path):
    client, images = s3.client(), pictures()
    for key, (_, image, _) in zip(ODD_KEYS, images, strict=False):
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/in/{key}", Body=png(image))
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/in/truth/{key}", Body=png(image))
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/in/a/", Body=b"")  # marks a folder
    uris = [f"s3://{BUCKET}/{prefix}/in/{key}" for key in ODD_KEYS]
    (tmp_path / "list.csv").write_text("\n".join(["uri", *uris]))
    place = f"s3://{BUCKET}/{prefix}/in"
    listed = {"uri": f"{tmp_path}/list.csv", "format": "list", "allow": [place], "masks": ""}
    found = {"uri": place, "masks": f"{place}/truth"}
    for name, section in (("found", found), ("listed", listed)):
        config = make_config(out=name, input=section, storage={"endpoint_url": s3.url})
        outcome = predict(config)
        assert outcome.totals.ok == len(ODD_KEYS)
        rows = [
            row
            for shard_id in outcome.run.committed()
            for row in read_metrics(outcome.run.store, shard_id)[0].to_pylist()
        ]
        shapes = {row["image_id"]: (row["height"], row["width"]) for row in rows}
        pairs = zip(ODD_KEYS, images, strict=False)
        assert shapes == {key: image.shape[:2] for key, (_, image, _) in pairs}
    config = make_config(out="up", input={**listed, "masks": ""}, storage={"endpoint_url": s3.url})
    (tmp_path / "list.csv").write_text(f"uri\n{place}/a/../b.png\n")
    with pytest.raises(ConfigError, match=r"the list names .*a/\.\./b\.png"):
        predict(config)


def test_objects_that_change_under_a_run_are_never_read(s3, prefix, folder, tars):
    storage = StorageConfig(endpoint_url=s3.url)
    client = s3.client()

    def flip(key):
        """Another object of the same size."""
        data = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        data[-5] ^= 1
        client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))

    loose = InputConfig(uri=s3.upload(folder / "images", f"{prefix}/loose"))
    source = open_source(loose, storage)
    (shard,) = list_shards(source)
    flip(f"{prefix}/loose/cell01.png")
    client.delete_object(Bucket=BUCKET, Key=f"{prefix}/loose/cell02.png")
    codes = {}
    for sample in read_shard(source, shard):
        try:
            codes[sample.key] = sample.read()[:4] == b"\x89PNG"
        except ImageError as failure:
            codes[sample.key] = failure.code
    assert codes.pop("cell01") == "changed"
    assert codes.pop("cell02") == "missing"
    assert list(codes.values()) == [True] * 10

    source = open_source(InputConfig(uri=s3.upload(tars, f"{prefix}/tars")), storage)
    first, second, *_ = list_shards(source)
    flip(f"{prefix}/tars/{first.uri}")
    client.delete_object(Bucket=BUCKET, Key=f"{prefix}/tars/{second.uri}")
    with pytest.raises(ShardError, match=r"shard-0\.tar was written again since the run began"):
        list(read_shard(source, first))
    with pytest.raises(ShardError, match=r"shard-1\.tar: there is no such file"):
        list(read_shard(source, second))


@moto_only("RGW has SSE-S3 (AES256) since Ceph 17")
def test_the_options_of_storage_reach_the_store(s3, prefix):
    storage = StorageConfig(endpoint_url=s3.url, region="us-east-1", encryption="AES256")
    store = Store(f"s3://{BUCKET}/{prefix}", storage)
    store.publish("secret", b"x")
    head = s3.client().head_object(Bucket=BUCKET, Key=f"{prefix}/secret")
    assert head["ServerSideEncryption"] == "AES256"
    assert store.publish_exclusively("once", b"1")
    assert not store.publish_exclusively("once", b"2")
    assert store.read("once") == b"1"


@pytest.mark.parametrize("size", [2**20, 101 * 2**20])
def test_a_large_file_is_written_from_disk_and_once(s3, prefix, monkeypatch, size):
    storage = StorageConfig(endpoint_url=s3.url, region="us-east-1")
    store = Store(f"s3://{BUCKET}/{prefix}", storage)
    monkeypatch.setattr(object_stores, "LARGE_BYTES", 1000)
    monkeypatch.setattr(type(store.fs), "_pipe_file", None)
    first, second = (bytes([n]) * size for n in (1, 2))
    with spooled() as file:
        file.write(first)
        assert store.publish_exclusively("part", file)
    with spooled() as file:
        file.write(second)
        assert not store.publish_exclusively("part", file)
        assert store.read("part") == first
        store.publish("part", file)
    assert store.read("part") == second
