"""``--json``: one document, whose keys others build on."""

import json

from jobs.commands.show import document
from jobs.predict import predict
from unet_core.metrics import Totals

TOTALS = {
    "shards", "images_seen", "ok", "failed", "pixels", "valid_pixels", "invalid_pixels",
    "extrapolated", "with_truth", "ignored_pixels", "confidence_sum", "class_pixels", "tp", "fp",
    "fn", "errors", "is_reconciled", "scores",
}  # fmt: skip
PLAN = {
    "uri", "input", "format", "shards", "shards_left", "images", "bytes", "bytes_left",
    "is_finished", "passed_over", "workers", "cost",
}  # fmt: skip
COST = {
    "device", "images", "shards", "images_per_s", "spread", "images_left", "is_counted", "hours",
    "gpus", "output_bytes", "price", "device_hours_per_million", "price_per_million",
}  # fmt: skip


def test_a_run_is_told_by_status_and_verify(run_cli, make_config, tmp_path):
    predict(make_config())
    code, out, _ = run_cli("status", tmp_path / "run", "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found) == {
        "uri", "shards", "committed", "is_finished", "totals", "class_names", "seconds"
    }  # fmt: skip
    assert set(found["totals"]) == TOTALS
    assert set(found["totals"]["scores"][1]) == {
        "tp", "fp", "fn", "iou", "dice", "precision", "recall"
    }  # fmt: skip
    assert (found["shards"], found["totals"]["images_seen"]) == (6, 12)
    next((tmp_path / "run" / "masks").glob("*")).unlink()
    code, out, _ = run_cli("verify", tmp_path / "run", "--json")
    found = json.loads(out)
    assert code == 1
    assert set(found) == {
        "shards", "committed", "totals", "class_names", "problems", "notes", "uri", "is_deep"
    }  # fmt: skip
    assert "there is no such file" in found["problems"][0]


def test_what_others_print_meanwhile_goes_to_standard_error(
    run_cli, tars, tiny_model, tmp_path, monkeypatch
):
    arguments = ("plan", tars, "--model", tiny_model, "--out", tmp_path / "run", "--json",
                 "workers.count=inline", "tile.size=256")  # fmt: skip
    code, out, _ = run_cli(*arguments)
    assert (code, set(json.loads(out)), json.loads(out)["cost"]) == (0, PLAN, None)
    from jobs.tools import scratch

    measure = scratch.segment
    monkeypatch.setattr(scratch, "segment", lambda *job: print("an actor speaks") or measure(*job))
    code, out, errors = run_cli(*arguments, "--cost", "--price", 2)
    assert set(json.loads(out)["cost"]) == COST
    assert "an actor speaks" in errors


def test_a_run_of_one_class_is_warned_of_beside_the_document(run_cli, make_config, tmp_path):
    predict(make_config("model.threshold=0.999999"))
    code, out, errors = run_cli("status", tmp_path / "run", "--json")
    assert (code, json.loads(out)["totals"]["class_pixels"][1]) == (0, 0)
    assert "every pixel of all 12 images is 'background'" in errors


def test_numbers_that_are_none_are_null_and_names_stay_texts(capsys):
    document({"value": float("nan"), "totals": Totals(ok=1)}, name="\udce4\n")
    found = json.loads(capsys.readouterr().out)
    assert (found["value"], found["totals"]["ok"], found["name"]) == (None, 1, "\udce4\n")
