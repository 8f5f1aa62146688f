import logging

import numpy as np
import pytest

from jobs.predict import predict
from tests.support.data import write_tar
from unet_core.errors import StoreError
from unet_core.synthetic import nuclei, png

IMAGE = png(nuclei(64, 64, np.random.default_rng(0))[0])


def test_tars_without_any_image_end_in_an_error_however_often_they_are_tried(make_config, tmp_path):
    for name in "ab":
        write_tar(tmp_path / "in" / f"{name}.tar", {"readme.txt": b"hello", "x.json": b"{}"})
    config = make_config(input={"uri": f"{tmp_path}/in", "masks": ""})
    for _ in range(2):
        with pytest.raises(StoreError, match=r"no image in any tar at .* \(2 read\); a\.tar holds "
                                             r"readme\.txt, x\.json$"):  # fmt: skip
            predict(config)
        assert not (tmp_path / "run" / "_SUCCESS").exists()
    assert StoreError.exit_code == 3


def test_one_empty_tar_among_others_is_only_warned_of(make_config, tmp_path, caplog):
    write_tar(tmp_path / "in" / "a.tar", {"readme.txt": b"hello"})
    write_tar(tmp_path / "in" / "b.tar", {"x.png": IMAGE})
    with caplog.at_level(logging.WARNING):
        outcome = predict(make_config(input={"uri": f"{tmp_path}/in", "masks": ""}))
    assert outcome.is_complete
    assert outcome.run.is_finished
    assert "shards without images: a.tar" in caplog.text


def test_what_is_passed_over_is_told_by_plan_and_predict_and_by_what_continues_a_run(
    run_cli, tiny_model, tmp_path
):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.txt", "c.txt", "d.json"):
        (tmp_path / "in" / name).write_bytes(IMAGE)
    run = tmp_path / "run"
    command = (tmp_path / "in", "--model", tiny_model, "--out", run, "workers.count=inline")
    for verb in ("plan", "predict", "predict", "plan"):
        code, text, _ = run_cli(verb, *command)
        assert code == 0
        assert "passed over: 2 .txt, 1 .json" in text
    (tmp_path / "in" / "e.png").write_bytes(png(nuclei(64, 70, np.random.default_rng(1))[0]))
    (tmp_path / "in" / "f.xml").write_bytes(b"<a/>")
    for more in (["--refresh"], []):
        _, text, _ = run_cli("predict", *command, *more)
        assert "passed over: 2 .txt, 1 .json, 1 .xml" in text


def test_kinds_that_are_not_read_end_a_run_with_their_names(run_cli, tiny_model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(IMAGE)
    for name in ("slide.ndpi", "scan.dcm", "stack.czi", "volume.nii.gz"):
        (tmp_path / "in" / name).write_bytes(bytes(64))
    run = tmp_path / "run"
    code, text, errors = run_cli("predict", tmp_path / "in", "--model", tiny_model, "--out", run,
                                 "workers.count=inline")  # fmt: skip
    assert code == 1
    assert "4 x unsupported" in text
    assert "scan.dcm: this is a DICOM image, which is not read; " in errors
    code, text, _ = run_cli("verify", run, "--deep")
    assert "problem" not in text
