"""``input.on_missing_mask`` means the same in predict and in evaluate."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.commands.arguments import run_config
from jobs.commands.results import TRUTH
from jobs.predict import predict
from jobs.results.evaluate import evaluate
from tests.support.data import write_tar
from tests.support.runs import table
from unet_core import open_run
from unet_core.errors import ConfigError, RunMismatchError
from unet_core.metrics import RATIOS
from unet_core.report.facts import RunFacts
from unet_core.report.page import render
from unet_core.runs.run_folder import NEUTRAL

LONELY = ("cell03", "cell07")
NAMES = ("class_pixels", "tp", "fp", "fn", "confusion", "ignored_pixels", "error_code")


@pytest.fixture(params=["folder", "tar", "list"])
def source(request, folder, tmp_path):
    """The images of ``folder``, of which two have no mask."""
    shutil.copytree(folder / "masks", tmp_path / "masks")
    for key in LONELY:
        (tmp_path / "masks" / f"{key}.png").unlink()
    names = [path.name for path in sorted((folder / "images").iterdir())]
    if request.param == "folder":
        return {"uri": f"{folder}/images", "masks": f"{tmp_path}/masks/"}
    if request.param == "list":
        lines = ["uri,id,truth"]
        for name in names:
            mask = tmp_path / "masks" / name
            lines.append(f"{folder}/images/{name},{name},{mask if mask.exists() else ''}")
        (tmp_path / "list.csv").write_text("\n".join(lines))
        allow = [str(folder), str(tmp_path)]
        return {"uri": f"{tmp_path}/list.csv", "format": "list", "masks": "truth", "allow": allow}
    members = {}
    for name in names:
        key = name.removesuffix(".png")
        members[name] = (folder / "images" / name).read_bytes()
        if key not in LONELY:
            members[f"{key}.mask.png"] = (tmp_path / "masks" / name).read_bytes()
    write_tar(tmp_path / "all.tar", members)
    return {"uri": f"{tmp_path}/all.tar", "masks": "mask.png"}


def rows_of(run):
    return {row["key"]: row for row in table(Path(run), "metrics")}


def evaluated(run, source, *overrides):
    results = open_run(str(run))
    given = (*overrides, f"input.masks={json.dumps(source['masks'])}")
    config = run_config(results, given, ("workers.", *TRUTH))
    return evaluate(results, config).document


def test_an_image_without_a_mask_is_left_out_or_compared_with_background(
    make_config, source, tmp_path
):
    skipped = predict(make_config(input=source, out="skipped"))
    assert skipped.totals.with_truth == 10
    as_background = {**source, "on_missing_mask": "background"}
    compared = predict(make_config(input=as_background, out="compared"))
    assert compared.totals.with_truth == 12
    rows = rows_of(tmp_path / "compared")
    for key in LONELY:
        background, foreground = rows[key]["class_pixels"]
        assert (rows[key]["tp"], rows[key]["fp"]) == ([background, 0], [0, foreground])
        assert rows[key]["confusion"] == [background, foreground, 0, 0]
    others = {key: row for key, row in rows_of(tmp_path / "skipped").items() if key not in LONELY}
    assert {key: rows[key] for key in others} == others
    later = evaluated(tmp_path / "skipped", source, "input.on_missing_mask=background")
    assert later["images"] == {
        "seen": 12, "ok": 12, "failed": 0, "compared": 12, "without_truth": 0,
        "unusable_truth": 0, "as_background": 2,
    }  # fmt: skip
    again = rows_of(later["evaluation"])
    for key, row in rows.items():
        assert [again[key][name] for name in NAMES] == [row[name] for name in NAMES]
    page = render(RunFacts(open_run(compared.run.uri))).decode()
    assert "cannot be shown" not in page.lower()
    usual = evaluated(tmp_path / "skipped", source)
    assert (usual["images"]["compared"], usual["images"]["without_truth"]) == (10, 2)
    assert "as_background" not in usual["images"]
    assert "input.on_missing_mask" not in usual["of"]


def test_a_missing_mask_is_refused_where_that_is_asked_for(make_config, source, tmp_path):
    refusing = make_config(input={**source, "on_missing_mask": "refuse"})
    if source["masks"] == "mask.png":  # only reading tells
        outcome = predict(refusing)
        assert (outcome.totals.failed, outcome.totals.errors) == (2, {"truth": 2})
        assert not outcome.is_complete
        row = rows_of(tmp_path / "run")["cell03"]
        assert (row["status"], row["tp"]) == ("failed", None)
        assert row["error_message"].startswith("it has no mask, which input.on_missing_mask")
    else:
        with pytest.raises(ConfigError, match=r"2 of 12 images have no mask in .*: cell03.png, ce"):
            predict(refusing)
        assert not (tmp_path / "run").exists()
    predict(make_config(input=source, out="skipped"))
    with pytest.raises(ConfigError, match=r"--truth: 2 of 12 images .* have no truth in .*cell07"):
        evaluated(tmp_path / "skipped", source, "input.on_missing_mask=refuse")


def test_truth_that_fits_no_image_is_refused_and_not_taken_for_background(
    make_run, tmp_path, folder
):
    shutil.copytree(folder / "masks", tmp_path / "truth" / "deeper")
    where = {"masks": f"{tmp_path}/truth/"}
    with pytest.raises(ConfigError, match=r"none of 12 images .* images: .*cell"):
        evaluated(make_run(), where, "input.on_missing_mask=background")


def test_a_run_from_before_the_key_is_joined_unless_the_key_is_used(make_config):
    config = make_config()
    run = predict(config).run
    document = json.loads(run.store.read("run.json"))
    assert document["identity"].pop("input.on_missing_mask") == NEUTRAL["input.on_missing_mask"]
    del document["config"]["input"]["on_missing_mask"], document["background"]
    run.store.publish("run.json", json.dumps(document).encode())
    assert predict(config).was_finished
    assert open_run(run.uri).record.first_foreground == 1
    with pytest.raises(RunMismatchError, match=r"input\.on_missing_mask"):
        predict(make_config(input={"on_missing_mask": "background"}))


def test_an_image_without_foreground_in_truth_and_mask_is_none_of_the_worst(
    make_config, folder, tmp_path, run_cli
):
    """All is class 0 in masks and truth but for one image: the others have no score."""
    shutil.copytree(folder / "masks", tmp_path / "masks")
    for path in (tmp_path / "masks").iterdir():
        if path.stem != "cell05":
            path.unlink()
    source = {
        "uri": f"{folder}/images", "masks": f"{tmp_path}/masks/", "on_missing_mask": "background",
    }  # fmt: skip
    out = predict(make_config(input=source, model={"threshold": 0.999999})).run.uri
    assert sum(row["class_pixels"][1] for row in table(tmp_path / "run", "metrics")) == 0
    document = evaluated(out, source)
    assert [image["image_id"] for image in document["worst"]] == ["cell05.png"]
    assert "IoU – (no truth, or no foreground)" in render(RunFacts(open_run(out))).decode()


def test_a_class_in_no_truth_and_no_mask_has_a_dash_and_the_reason(make_config, run_cli, folder):
    source = {
        "uri": f"{folder}/images",
        "masks": f"{folder}/masks",
        "label_map": {"1": 0, "255": 0},
    }
    run = predict(make_config(input=source, model={"threshold": 0.999999})).run.uri
    code, text, _ = run_cli("status", run)
    assert code == 0
    assert "nucleus: – (in no truth and no mask)" in text
    assert "0.0000" not in text
    code, text, _ = run_cli("evaluate", run, "--truth", f"{folder}/masks/", "input.label_map={1=0}")
    assert "worst:    – (no image has foreground in its truth or mask)" in text
    assert "–: the class is in no truth (recall), in no mask (precision), or in neither" in text
    assert "0.0000" not in text
    scores = open_run(run).totals.scores
    assert [getattr(scores[1], name) for name in RATIOS] == [None] * 4
