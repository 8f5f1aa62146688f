"""Secrets that a run is given appear nowhere in what it writes, logs or says."""

import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from jobs.submission.package import pack
from tests.support.runs import write_toml
from tests.support.s3 import BUCKET
from unet_core.config.loading import load as load_config
from unet_core.config.predict import PredictConfig

PASSWORD = "hunter2hunter2"
TOKEN = "token-that-nobody-may-see"


def contents(folder: Path) -> str:
    """All bytes of all files, and the cells of Parquet files as they were before compression."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.append(path.read_bytes().decode("latin-1"))
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            found += [str(table.schema.metadata), *map(str, table.to_pylist())]
    return "\n".join(found)


@pytest.fixture
def say(run_cli, caplog, monkeypatch):
    """Run a command; returns its exit code and everything that it says and logs."""
    for name in ("jobs", "unet_core"):
        caplog.set_level(logging.DEBUG, logger=name)

    def run(*arguments):
        S3FileSystem.clear_instance_cache()
        code, out, err = run_cli("-v", *arguments)
        S3FileSystem.clear_instance_cache()
        logged = [r for r in caplog.records if r.name.partition(".")[0] in ("jobs", "unet_core")]
        return code, "\n".join([out, err, *(f"{r.getMessage()} {r.exc_info}" for r in logged)])

    return run


def test_no_secret_is_in_a_run_folder_a_log_an_error_or_a_job(
    make_config, tars, tmp_path, s3, say, monkeypatch
):
    s3.upload(tars, tmp_path.name)
    uri = f"s3://{BUCKET}/{tmp_path.name}"
    config = make_config(input={"uri": uri}, storage={"endpoint_url": s3.url})
    toml = write_toml(config, tmp_path / "job.toml")
    said = []

    def expect(code, *overrides):
        found, text = say("predict", toml, *overrides)
        assert found == code, text
        said.append(text)

    expect(0)
    expect(3, f"input.uri=s3://no-such-bucket/{tmp_path.name}", f"output.uri={tmp_path}/b")
    for place in (f"s3://{s3.key}:{PASSWORD}@{BUCKET}/x", f"http://me:{PASSWORD}@host/x"):
        expect(2, f"input.uri={place}")
    expect(2, f"storage.endpoint_url=http://me:{PASSWORD}@127.0.0.1")
    (tmp_path / "list.csv").write_text(f"uri\ns3://{s3.key}:{PASSWORD}@{BUCKET}/x.png\n")
    expect(2, f"input.uri={tmp_path}/list.csv", "input.format=list", "input.masks=",
           f"output.uri={tmp_path}/c")  # fmt: skip
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAXXXXXXXXXXXXXXXX")
    expect(3, f"output.uri={tmp_path}/d")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)  # of nobody
    expect(3, f"output.uri={tmp_path}/e")
    remote = {"input": {"uri": uri}, "output": {"uri": f"{uri}-run"}}
    there = write_toml(make_config(**remote, storage={"endpoint_url": s3.url}), tmp_path / "r.toml")
    package = pack("predict", there, [], load_config(PredictConfig, there, []))
    (tmp_path / "job").mkdir()
    package.write(tmp_path / "job")
    written = [contents(tmp_path / name) for name in ("run", "job")]
    assert all(written), "nothing was looked at"
    for text in (*said, *written, package.entrypoint):
        for secret in (s3.secret, TOKEN, PASSWORD):
            assert secret not in text
