"""What a run does about images that fail, shards that cannot be done, and an input that changes."""

import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.predict import predict
from tests.support.data import digests, write_folder, write_tar, write_tars
from tests.support.runs import snapshot, table, write_toml
from unet_core.config.predict import ErrorsConfig
from unet_core.errors import RunMismatchError, StoreError
from unet_core.runs.compact import compact
from unet_core.runs.failures import causes
from unet_core.runs.run import METRICS, Run
from unet_core.runs.verify import verify
from unet_core.synthetic import png

PUBLISH, HAS_ALL = Run.publish_manifest, Run.has_all


@pytest.fixture
def once_listed(monkeypatch):
    """Let something happen just after the manifest of a run is there."""

    def then(happens):
        def publish(run, draft):
            PUBLISH(run, draft)
            happens()

        monkeypatch.setattr(Run, "publish_manifest", publish)

    return then


@pytest.fixture
def spoiled(tmp_path):
    """Tars of their own with 12 good images and, in two of them, 3 bad ones; to be changed."""
    (tmp_path / "tars").mkdir()
    tars = write_tars(tmp_path / "tars")
    write_tar(tars / "bad-0.tar", {"cut.png": b"\x89PNG", "none.png": b""})
    write_tar(tars / "bad-1.tar", {"text.png": b"hello"})
    return tars


@pytest.mark.parametrize(
    ("most", "failed", "seen", "at_end", "exceeded"),
    [
        (0.01, 5, 999, False, False),
        (0.01, 10, 1000, False, False),
        (0.01, 11, 1000, False, True),
        (0.01, 1, 30, True, True),
        (0.0, 0, 30, True, False),
        (1.0, 30, 30, True, False),
        (1, 2, 3, False, True),
        (0, 1, 1, False, True),
        (2, 2, 3, True, False),
    ],
)
def test_a_budget_is_a_number_or_a_share_judged_when_it_means_something(
    most, failed, seen, at_end, exceeded
):
    assert ErrorsConfig(max_failed_images=most).are_too_many(failed, seen, at_end) == exceeded


def test_a_run_over_its_budget_is_not_finished_and_tells_why(run_cli, make_config, spoiled):
    config = make_config(input={"uri": str(spoiled)})
    run = config.output.uri
    toml = write_toml(config, spoiled.parent / "job.toml")
    code, text, error = run_cli("predict", toml)
    assert code == 1
    assert "15 seen = 12 ok + 3 failed" in text
    assert "error: 3 of 15 images failed, errors.max_failed_images is 1 %; most frequent:" in error
    assert "2 x decode\n    bad-" in error
    assert "    bad-0.tar/cut: " in error
    assert "    bad-1.tar/text: not a TIFF" in error
    assert "1 x empty\n    bad-0.tar/none: the file has no bytes" in error
    assert "--retry-failed" in error
    parts = digests(run)
    assert not os.path.exists(f"{run}/_SUCCESS")
    assert run_cli("predict", toml)[0] == 1
    assert run_cli("predict", toml, "errors.max_failed_images=3")[0] == 0
    assert digests(run) == parts
    assert verify(run, deep=True).problems == []


def test_a_number_of_failures_stops_at_once_and_the_rest_is_done_later(make_config, spoiled):
    spoiled_first = {"max_failed_images": 0}
    for tar in spoiled.glob("shard-*.tar"):
        os.truncate(tar, 0)  # the smallest come last, so all tars are bad
    stopped = predict(make_config(input={"uri": str(spoiled)}, errors=spoiled_first))
    assert stopped.too_many_failed
    assert stopped.totals.shards <= 2
    assert not stopped.is_complete
    again = predict(make_config(input={"uri": str(spoiled)}, errors=spoiled_first))
    assert again.totals == stopped.totals  # nothing further was begun
    rest = predict(make_config(input={"uri": str(spoiled)}, errors={"max_failed_images": 1.0}))
    assert rest.is_complete
    assert rest.totals.shards == 8


def test_failed_shards_are_done_again_when_asked(make_config, spoiled, monkeypatch):
    config = make_config(input={"uri": str(spoiled)}, errors={"max_failed_images": 1.0})
    first = predict(config)
    run = Path(config.output.uri)
    before, parts = snapshot(run), digests(run)
    found = causes(first.run, first.totals)
    assert [(cause.code, cause.images) for cause in found] == [("decode", 2), ("empty", 1)]
    compact(first.run.store, first.run.record)
    with monkeypatch.context() as patch:  # one file tells as much as all parts
        patch.setattr("unet_core.runs.compact.read_metrics", None)
        assert causes(first.run, first.totals) == found
    (run / METRICS).unlink()
    assert predict(config).was_finished
    again = predict(config, retry_failed=True)
    after = snapshot(run)
    assert again.totals == first.totals
    redone = {path for path in before if before[path] != after[path]}
    assert len({path for path in redone if path.parent.name == "metrics"}) == 2
    assert digests(run) == parts


def test_what_is_no_longer_as_it_was_keeps_its_commit_when_failed_shards_are_done_again(
    make_config, spoiled
):
    (spoiled / "shard-0.tar").unlink()
    good = png(np.zeros((20, 30), np.uint8))
    write_tar(spoiled / "bad-0.tar", {"a.png": good, "b.png": good, "cut.png": b"\x89PNG"})
    config = make_config(input={"uri": str(spoiled)}, errors={"max_failed_images": 1.0})
    first = predict(config)
    write_tar(spoiled / "bad-0.tar", {"a.png": good, "b.png": good, "cut.png": good})
    (spoiled / "bad-1.tar").unlink()
    parts = digests(config.output.uri)
    again = predict(config, retry_failed=True)
    assert (again.was_finished, again.totals) == (True, first.totals)
    assert digests(config.output.uri) == parts


def test_a_driver_does_not_finish_a_run_to_which_another_one_has_added(
    make_config, spoiled, monkeypatch
):
    late = spoiled / "shard-0.tar"
    data = late.read_bytes()
    late.unlink()
    config = make_config(input={"uri": str(spoiled)}, errors={"max_failed_images": 1.0})
    run = Run(config.output.uri)

    def dies(*_):
        raise KeyboardInterrupt

    def has_all(self, shards):
        """Just before: another driver adds a shard, and dies."""
        late.write_bytes(data)
        monkeypatch.undo()
        monkeypatch.setattr("jobs.predict.segment", dies)
        with pytest.raises(KeyboardInterrupt):
            predict(config, refresh=True)
        monkeypatch.undo()
        return HAS_ALL(self, shards)

    monkeypatch.setattr(Run, "has_all", has_all)
    with pytest.raises(RunMismatchError, match="another driver has added shards"):
        predict(config)
    assert not run.is_finished
    assert predict(config).totals.shards == 8
    assert Run(config.output.uri).is_finished


def test_a_run_that_was_finished_too_early_is_gone_on_with(make_config, spoiled):
    config = make_config(input={"uri": str(spoiled)}, errors={"max_failed_images": 1.0})
    first = predict(config)
    success = first.run.store.read("_SUCCESS")
    one = min(first.run.committed())
    first.run.store.remove(f"metrics/{one}.parquet")
    first.run.store.publish("_SUCCESS", success.replace(b'"shards": 8', b'"shards": 7'))
    again = predict(config)
    assert (again.was_finished, again.totals) == (False, first.totals)
    assert first.run.store.read("_SUCCESS") == success


def test_a_list_whose_images_are_gone_as_a_whole_stops_the_run(make_config, tmp_path):
    (tmp_path / "in").mkdir()
    images = write_folder(tmp_path / "in") / "images"
    lines = [f"{path},{'0' * 32}" for path in sorted(images.iterdir())]
    (tmp_path / "list.csv").write_text("\n".join(["uri,etag", *lines]))
    section = {"uri": f"{tmp_path}/list.csv", "format": "list", "masks": "", "allow": [str(images)]}
    assert predict(make_config(input=section)).totals.ok == 12  # local files have no such etag
    images.rename(tmp_path / "away")
    with pytest.raises(StoreError, match="images is gone"):
        predict(make_config(input=section, out="again"))


def test_local_files_that_may_not_be_read_are_failed_rows_until_they_may(
    make_config, tmp_path, monkeypatch
):
    def denying(path, *mode, **how):
        """Root may read everything, so that no mode of a file would be of use here."""
        if str(path).endswith(denied):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open(path, *mode, **how)

    (tmp_path / "in").mkdir()
    folder = write_folder(tmp_path / "in")
    section = {"uri": str(folder / "images"), "masks": str(folder / "masks"), "shard_images": 4}
    config = make_config(input=section, errors={"max_failed_images": 1})
    monkeypatch.setattr("unet_core.storage.store.open", denying, raising=False)
    denied = ("images/cell05.png", "masks/cell06.png")
    outcome = predict(config)
    assert (outcome.totals.ok, outcome.totals.errors) == (11, {"forbidden": 1, "truth": 1})
    told = [
        row["error_message"] for row in table(tmp_path / "run", "metrics") if row["error_message"]
    ]
    assert re.search(r"cell05.png: Permission denied; let this user read it; then pre", told[0])
    assert re.search(r"^the mask cannot be used: .*masks/cell06.png: Permission denied", told[1])
    denied = ("masks/cell06.png",)
    again = predict(config, retry_failed=True)
    assert (again.totals.ok, again.totals.errors) == (12, {"truth": 1})


def test_loose_images_that_change_under_a_run_are_failed_rows(make_config, tmp_path, once_listed):
    (tmp_path / "in").mkdir()
    folder = write_folder(tmp_path / "in")
    masks = {"masks": str(folder / "masks"), "uri": str(folder / "images")}
    config = make_config(input=masks, errors={"max_failed_images": 2})
    images = folder / "images"

    def change():
        (images / "cell01.png").write_bytes((images / "cell02.png").read_bytes())
        (images / "cell03.png").unlink()
        (images / "new.png").write_bytes((images / "cell02.png").read_bytes())
        (folder / "masks" / "cell05.png").write_bytes(png(np.zeros((64, 64), np.uint8)))

    once_listed(change)
    outcome = predict(config)
    assert outcome.is_complete
    (part,) = (tmp_path / "run" / "metrics").glob("*.parquet")
    rows = {row["image_id"]: row for row in pq.read_table(part).to_pylist()}
    assert len(rows) == 12
    assert {i: r["error_code"] for i, r in rows.items() if r["error_code"]} == {
        "cell01.png": "changed",
        "cell03.png": "missing",
        "cell05.png": "truth",
    }
    assert "cell01.png was written again since the run began" in rows["cell01.png"]["error_message"]


def test_a_tar_that_changes_or_goes_is_set_aside_by_name_and_done_when_it_is_back(
    make_config, spoiled, once_listed
):
    config = make_config(input={"uri": str(spoiled)}, errors={"max_failed_images": 1.0})
    predict(config)
    undisturbed = digests(config.output.uri)
    shutil.rmtree(config.output.uri)
    kept = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in spoiled.glob("shard-[01].tar")}

    def change():
        (spoiled / "shard-0.tar").unlink()
        (spoiled / "shard-1.tar").write_bytes((spoiled / "shard-2.tar").read_bytes())

    once_listed(change)
    outcome = predict(config)
    assert not outcome.is_complete
    assert outcome.totals.shards == 6
    assert "there is no such file" in outcome.set_aside["shard-0.tar"]
    assert "shard-1.tar was written again" in outcome.set_aside["shard-1.tar"]
    assert "restore it, or begin a new run" in outcome.set_aside["shard-1.tar"]
    assert not outcome.run.is_finished
    for path, (data, mtime_ns) in kept.items():
        path.write_bytes(data)
        os.utime(path, ns=(mtime_ns, mtime_ns))
    assert predict(config).is_complete
    assert digests(config.output.uri) == undisturbed


def test_an_input_that_is_gone_as_a_whole_stops_the_run(make_config, spoiled, once_listed):
    once_listed(lambda: shutil.rmtree(spoiled))
    with pytest.raises(StoreError, match=r"is gone; was it unmounted"):
        predict(make_config(input={"uri": str(spoiled)}))


@pytest.mark.parametrize("kind", ["tars", "loose"])
def test_new_objects_enter_by_refresh_only(make_config, tmp_path, kind):
    (tmp_path / "in").mkdir()
    if kind == "tars":
        where, pattern, keys = write_tars(tmp_path / "in"), "shard-0.tar", {"masks": "mask.png"}
    else:
        where = write_folder(tmp_path / "in") / "images"
        pattern, keys = "cell*[02468].png", {"masks": "", "shard_images": 4}
    late = {path: path.read_bytes() for path in where.glob(pattern)}
    for path in late:
        path.unlink()
    config = make_config(input={"uri": str(where), **keys})
    first = predict(config)
    before = digests(config.output.uri)
    for path, data in late.items():
        path.write_bytes(data)
    assert predict(config).was_finished
    outcome = predict(config, refresh=True)
    assert (first.totals.images_seen, outcome.totals.images_seen) == (
        (10, 12) if kind == "tars" else (6, 12)
    )
    assert outcome.is_complete
    after = digests(config.output.uri)
    assert before.items() <= after.items()
    assert len(after) > len(before)
    findings = verify(config.output.uri, deep=True)
    assert findings.problems == findings.notes == []
    done = snapshot(tmp_path / "run")
    assert predict(config, refresh=True).was_finished  # nothing is new
    assert snapshot(tmp_path / "run") == done
    assert len(list((tmp_path / "run" / "manifest").iterdir())) == 2


def test_a_run_that_finds_one_class_everywhere_says_so(run_cli, make_config, tmp_path):
    config = make_config(model={"threshold": 0.9999})
    code, _, error = run_cli("predict", write_toml(config, tmp_path / "job.toml"))
    assert code == 0
    assert "warning: every pixel of all 12 images is 'background'" in error
    assert "warning: every pixel" in run_cli("status", config.output.uri)[2]
