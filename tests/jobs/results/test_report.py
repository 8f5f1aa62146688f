import html
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.predict import predict
from jobs.results.report import NAME, ending_report, write_report
from jobs.train import train
from tests.support.scenes import config_of
from unet_core import open_run
from unet_core.config.sections import FolderConfig, StorageConfig
from unet_core.report import facts


def test_predict_writes_a_report_unless_nothing_was_to_do(make_config, run_cli, tmp_path):
    config = make_config("output.report=true")
    outcome = predict(config)
    page = tmp_path / "run" / NAME
    assert outcome.report == str(page)
    assert "finished" in page.read_text()
    page.write_text("mine")
    assert predict(config).report == str(page)
    assert page.read_text() == "mine"
    code, text, _ = run_cli("report", tmp_path / "run")
    assert (code, f"report:   {page}" in text) == (0, True)
    assert page.stat().st_size > 10_000


def test_a_report_that_cannot_be_written_loses_nothing(make_config, tmp_path, caplog):
    predict(make_config())
    (tmp_path / "run" / "_SUCCESS").unlink()
    (tmp_path / "run" / NAME / "in the way").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        outcome = predict(make_config("output.report=true"))
    assert outcome.is_complete
    assert (tmp_path / "run" / "_SUCCESS").exists()
    assert outcome.report == ""
    assert f"write it later with: unet-jobs report {tmp_path}/run" in caplog.text


def test_damage_that_nobody_thought_of_is_told_too(tmp_path, caplog):
    (tmp_path / "run.json").write_text("[]")
    output = FolderConfig(uri=str(tmp_path))
    assert ending_report(output, StorageConfig(), was_done=True) == ""
    assert "the report could not be written" in caplog.text


def test_previews_are_named_after_their_images(make_config, run_cli, tmp_path):
    predict(make_config())
    to = tmp_path / "previews"
    code, text, errors = run_cli(
        "report",
        tmp_path / "run",
        "--previews",
        to,
        "--ids",
        "shard-4.tar/cell04",
        "--ids",
        "no",
        "--ids",
        "Cell07.PNG",
    )
    assert (code, "1 images" in text) == (1, True)
    assert "not drawn: no: the run has no mask of it\n" in errors
    assert "no mask of it; did you mean shard-" in errors
    assert "/cell07?" in errors
    with Image.open(to / "shard-4.tar" / "cell04.png") as drawn:
        assert (drawn.size, drawn.mode) == ((270, 300), "RGB")
        assert (np.ptp(np.asarray(drawn), axis=2) > 0).any()
    code, text, _ = run_cli("report", tmp_path / "run", "--previews", to, "--worst", "3")
    assert (code, "3 images" in text) == (0, True)
    code, _, errors = run_cli("report", tmp_path / "run", "--worst", "3")
    assert (code, "go with --previews" in errors) == (2, True)
    inside = make_config().input.uri + "/previews"
    code, _, errors = run_cli("report", tmp_path / "run", "--previews", inside)
    assert (code, "must not contain each other" in errors) == (2, True)


def test_a_page_streams_no_more_of_the_input_than_it_may(make_config, monkeypatch):
    results = open_run(predict(make_config()).run.uri)
    sizes = {shard.shard_id: shard.bytes for shard in results.shards()}
    budget = sum(sizes.values()) - 1
    monkeypatch.setattr(facts, "MOST_BYTES", budget)
    found = facts.RunFacts(results)
    picks = [pick for sheet in found.sheets.values() for pick in sheet]
    shown = {pick.shard_id for pick in picks if pick.image_id in found.panels}
    assert 0 < sum(sizes[shard_id] for shard_id in shown) <= budget
    assert len(shown) < len(sizes)
    left_out = [pick.image_id for pick in picks if pick.shard_id not in shown]
    assert all("too much to read" in found.reasons[image_id] for image_id in left_out)


def test_a_training_explains_itself(folder, tmp_path):
    out = tmp_path / "m"
    config = config_of(folder, out, "train.epochs=2", "output.report=true")
    done = train(config)
    assert done.report == str(out / NAME)
    page = html.unescape((out / NAME).read_text())
    for text in ("Learning curves", "Validation IoU", "nucleus", "[data.train]",
                 "epochs = 2", "after step", f"--model '{out}/best.safetensors'"):  # fmt: skip
        assert text in page, text
    (out / "_SUCCESS").unlink()
    write_report(str(out))
    assert "not finished" in (out / NAME).read_text()


def test_a_report_has_all_rows_in_one_file_and_what_was_evaluated_since(make_run, run_cli, folder):
    run, other = make_run(), make_run("other")
    for arguments in (["--truth", folder / "masks"], ["--against", other]):
        assert run_cli("evaluate", run, *arguments, "--name", arguments[0].strip("-"))[0] == 0
    write_report(run)
    page = (Path(run) / NAME).read_text()
    assert "0.0000 % of all" in page
    assert f"compared with truth in {folder}/masks" in page
    assert open_run(run).metrics.num_rows == 12
    assert (Path(run) / "metrics.parquet").exists()
