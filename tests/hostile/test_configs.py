"""Lists and configs made to do harm: refused without repeating a secret."""

import gzip
import json

import pytest

from tests.support import doors
from tests.support.confined import MIB, confined
from tests.support.hostile import NOT_UTF8, packed, parquet, squeezed
from unet_core.config.loading import build
from unet_core.config.predict import PredictConfig
from unet_core.errors import ConfigError


def inventory(**keys):
    manifest = {"sourceBucket": "b", "fileSchema": "Bucket, Key, Size"}
    return json.dumps(manifest | {"files": [{"key": "manifest.json"}]} | keys).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param(name, data, id=what)
        for what, name, data in [
            ("a line without an end", "x.csv.gz", squeezed(256 * MIB, 31)),
            ("a row without an end", "x.csv.gz", packed(b"uri\n", b'"\n",' * 10**6)),
            ("damaged gzip", "x.csv.gz", gzip.compress(b"uri\na.png\n")[:-9] + bytes(9)),
            ("no UTF-8", "x.parquet", parquet(NOT_UTF8, "uri")),
            ("inventory without keys", "manifest.json", inventory(fileSchema="Size")),
            ("credentials", "x.csv", b"uri\ns3://KEY:hunter2@b/x.png\n"),
            ("credentials with a slash", "x.csv", b"uri\ns3://KEY:hun/ter2@b/x.png\n"),
            ("chain", "x.csv", b"uri\nsimplecache::s3://b/x.png\n"),
            ("metadata service", "x.csv", b"uri\nhttp://169.254.169.254/x.png\n"),
            ("local", "x.csv", b"uri\nlocal:///etc/x.png\n"),
            ("absolute", "x.csv", b"uri\nfile:///etc/passwd\n"),
        ]
    ],
)
def test_a_list_that_leads_elsewhere_is_refused_and_repeats_no_secret(name, data):
    found = confined(doors.listed, name, data, {}, memory=512 * MIB)
    assert found.error == "ConfigError", found
    assert "hunter2" not in found.text
    assert "ter2" not in found.text
    assert found.memory < 128 * MIB


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("input.uri", "simplecache::s3://b/x", "chained"),
        ("input.uri", "s3://KEY:hunter2@b/x", "holds credentials"),
        ("input.uri", "s3://KEY:hun/ter2@b/x", "holds credentials"),
        ("input.uri", "simplecache::s3://KEY:hunter2@b/x", "holds credentials"),
        ("input.uri", "http://me:hunter2@host/x", "holds credentials"),
        ("input.uri", "s3://hunter2@b/../x", "holds credentials"),
        ("input.uri", "abfs://c:hunter2@account.dfs.core.windows.net/x", "holds credentials"),
        ("input.masks", "s3://KEY:hunter2@b/x", "holds credentials"),
        ("input.allow", ["s3://KEY:hunter2@b/x"], "holds credentials"),
        ("input.allow", ["simplecache::s3://b"], "chained"),
        ("model.checkpoint", "s3://KEY:hunter2@b/x.safetensors", "holds credentials"),
        ("output.uri", "s3://KEY:hunter2@b/x", "holds credentials"),
        ("storage.endpoint_url", "http://KEY:hunter2@minio", "holds credentials"),
        ("output.uri", "{in}/run", "must not contain each other"),
        ("output.uri", "file://{in}/run", "must not contain each other"),
        ("output.uri", "{link}/run", "must not contain each other"),
        ("output.uri", "{above}", "must not contain each other"),
    ],
)
def test_a_config_that_no_job_should_have_is_refused_and_repeats_no_secret(
    key, value, reason, tmp_path
):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    places = {"in": tmp_path / "in", "link": tmp_path / "link", "above": tmp_path}
    table = {"input": {"uri": f"{tmp_path}/in"}, "output": {"uri": f"{tmp_path}/out"}}
    section, _, name = key.partition(".")
    table.setdefault(section, {})[name] = (
        value.format(**places) if isinstance(value, str) else value
    )
    with pytest.raises(ConfigError, match=reason) as caught:
        build(PredictConfig, table, [])
    assert "hunter2" not in str(caught.value)
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://arn:aws:s3:eu-west-1:1:accesspoint/x",
        "s3://b/a@b:c/x",
        "a@b:c/x",
        "file:///a@b:c/x",
    ],
)
def test_uris_that_only_look_as_if_they_held_credentials_are_taken(uri):
    table = {"input": {"uri": uri}, "output": {"uri": "out"}}
    assert build(PredictConfig, table, []).input.uri == uri
