"""A local disk without room, one that may not be written to, and no room for temporary files."""

import contextlib
import ctypes
import os
import re
import resource
import subprocess
import tempfile
import threading

import pytest

from jobs import cli
from jobs.predict import predict
from tests.support.data import digests
from tests.support.runs import write_toml
from unet_core.errors import StoreError
from unet_core.runs.verify import verify
from unet_core.storage import spool

DISK_BYTES = 2**20


@contextlib.contextmanager
def small_disk(folder, room):
    """A file system of its own on which ``room`` bytes are free."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount; the row 'limit' says the same of smaller files")
    try:
        page = 4096
        (folder / "ballast").write_bytes(bytes(DISK_BYTES - page * -(-room // page)))
        yield (folder / "ballast").unlink
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def small_files(folder, room):
    """No file of this process may get larger than ``room`` bytes."""
    folder.mkdir(exist_ok=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift():
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield lift
    finally:
        lift()


@pytest.fixture
def stop(monkeypatch, capsys):
    """Predict by the command line, which must end as storage errors do; returns its message."""

    def run(toml):
        monkeypatch.setattr("sys.argv", ["unet-jobs", "predict", toml])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        message = capsys.readouterr().err
        assert ended.value.code == StoreError.exit_code == 3, message
        assert "Traceback" not in message
        return message

    return run


@pytest.mark.parametrize(
    ("scarce", "victims"),
    [
        (small_disk, ("masks/", "metrics/")),
        (small_files, ("run.json",)),
        (small_files, ("manifest/",)),
        (small_files, ("masks/", "metrics/")),
    ],
)
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(
    make_config, stop, tmp_path, scarce, victims
):
    whole = predict(make_config(out="undisturbed"))
    sizes = {entry.name: entry.bytes for entry in whole.run.store.list()}
    those = [size for name, size in sizes.items() if name.startswith(victims)]
    room = 40_000 if scarce is small_disk else max(those) - 100  # paths differ
    run = tmp_path / "disk" / "run"
    config = make_config(out="disk/run")
    toml = write_toml(config, tmp_path / "job.toml")
    with scarce(tmp_path / "disk", room) as make_room:
        message = stop(toml)
        assert re.search(f"error: cannot write {run}/({'|'.join(victims)})", message), message
        assert "make room there, then the same command continues" in message
        assert list(run.rglob("*.tmp")) == []
        assert digests(run).items() < digests(tmp_path / "undisturbed").items()
        make_room()
        assert predict(config).totals.images_seen == 12
        assert digests(run) == digests(tmp_path / "undisturbed")
        findings = verify(str(run), deep=True)
        assert findings.problems == findings.notes == []


def without_privileges(call):
    """What ``call`` raises on a thread that modes of files bind, even if we are root."""
    raised = []

    def work():
        if os.geteuid() == 0:
            header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.capget(header, sets) == 0
            sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert libc.capset(header, sets) == 0
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (error,) = raised
    return error


def test_a_folder_that_may_not_be_written_to_is_told_by_path(make_config, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours").chmod(0o555)
    config = make_config(out="ours/run")
    error = without_privileges(lambda: predict(config))
    assert isinstance(error, StoreError)
    assert f"cannot write {tmp_path}/ours/run/run.json: Permission denied" in str(error)
    assert "let this user write there, then the same command continues" in str(error)
    (tmp_path / "ours").chmod(0o755)
    assert predict(config).totals.images_seen == 12


@pytest.mark.parametrize("what", ["parts", "manifest"])
def test_no_room_for_temporary_files_stops_the_run_and_is_not_blamed_on_the_output(
    make_config, stop, tmp_path, monkeypatch, what
):
    config = make_config()
    toml = write_toml(config, tmp_path / "job.toml")
    predict(config)
    expected = digests(tmp_path / "run")
    kept = ("run.json", "00000.parquet") if what == "parts" else ()
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and path.name not in kept:
            path.unlink()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "small"))
    monkeypatch.setattr(spool, "IN_MEMORY_BYTES", 64)
    with small_files(tmp_path / "small", 100):
        message = stop(toml)
    assert f"local temporary space is full: {tmp_path}/small: File too large" in message
    assert "set TMPDIR to a larger folder; then the same command continues" in message
    assert predict(config).totals.images_seen == 12
    assert digests(tmp_path / "run") == expected


def test_what_waits_on_disk_for_a_large_image_needs_room_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(spool, "IN_MEMORY_BYTES", 64)
    keep = spool.reports_full_disk()(spool.Spool().keep)
    with small_files(tmp_path, 100):
        keep({"few": bytes(90)})
        keep({"many": bytes(3_000)})  # which waits in a buffer
        with pytest.raises(StoreError, match=f"is full: {tmp_path}"):
            keep({"more": bytes(90)})
        del keep
    assert capsys.readouterr().err == ""
