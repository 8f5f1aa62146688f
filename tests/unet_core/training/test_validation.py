import io
import json

import numpy as np
import pytest
from rich.console import Console

from jobs.predict import predict
from jobs.progress import TrainProgress
from tests.support.scenes import config_of
from unet_core import open_run
from unet_core.config.train import NetworkConfig
from unet_core.errors import RunMismatchError
from unet_core.networks.header import read_header
from unet_core.report.facts import RunFacts
from unet_core.report.page import render
from unet_core.report.scores import LARGEST, LOWEST_IOU, RunScores
from unet_core.runs.run_folder import NEUTRAL
from unet_core.training.fit import Epoch, Started, fit
from unet_core.training.learner import new_network
from unet_core.training.training_run import identity, open_training
from unet_core.training.validation import Validation


def test_the_compared_value_is_the_mean_over_defined_foreground_classes():
    confusion = np.array([[8, 2, 0], [0, 6, 0], [0, 0, 0]])
    assert Validation(confusion).of("iou") == pytest.approx(6 / 8)
    assert Validation(confusion, first_foreground=0).of("iou") == pytest.approx((0.8 + 0.75) / 2)
    assert Validation(confusion).of("accuracy") == pytest.approx(14 / 16)


def test_a_value_that_is_undefined_is_none_and_not_zero():
    only_background = np.array([[9, 0], [0, 0]])
    assert [Validation(only_background).of(name) for name in ("iou", "dice")] == [None, None]
    assert Validation(only_background).of("accuracy") == 1
    assert Validation(np.zeros((2, 2), int)).of("accuracy") is None
    assert Validation(only_background, first_foreground=0).of("iou") == 1


def test_progress_says_that_a_value_is_undefined_and_what_is_kept(folder, tmp_path):
    progress = TrainProgress(config_of(folder, tmp_path / "out"))
    progress.console = Console(file=io.StringIO(), width=200)
    progress.on_event(Started(("background", "nucleus"), 8, 4, 3, 3, 0))
    progress.on_event(Epoch(0, 3, 0.5, Validation(np.array([[9, 0], [0, 0]])), True, 1.0))
    text = progress.console.file.getvalue()
    assert "nucleus –" in text
    assert "val iou is undefined: no validation image has foreground" in text
    assert progress._value == ", val iou –"


def test_an_undefined_value_is_never_better_than_a_defined_one(folder, tmp_path, monkeypatch):
    values = iter([None, None, 0.25, None, 0.2, 0.3])
    monkeypatch.setattr(Validation, "of", lambda *_: next(values))
    config = config_of(folder, tmp_path / "out", "train.epochs=6", "train.crop=32")
    epochs = [event for event in fit(config) if isinstance(event, Epoch)]
    assert [epoch.is_best for epoch in epochs] == [True, True, True, False, False, True]
    position = open_training(config).position()
    assert (position.best, position.best_step) == (0.3, epochs[-1].step)


def test_a_training_without_a_defined_value_publishes_its_last_weights(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(Validation, "of", lambda *_: None)
    out = tmp_path / "out"
    list(fit(config_of(folder, out, "train.epochs=2", "train.crop=32")))
    best, last = ((out / f"{name}.safetensors").read_bytes() for name in ("best", "last"))
    assert len(best) == len(last)
    assert b'"iou\\": null' in best[:20000]


@pytest.mark.parametrize("network", ["one logit", "three logits"])
def test_a_network_without_a_background_class_is_trained_and_judged_by_all_classes(
    folder, tmp_path, make_config, network
):
    names = ["meadow", "wood"] + ["water"] * (network == "three logits")
    config = config_of(
        folder,
        tmp_path / "out",
        "train.epochs=1",
        "model.background=none",
        f"model.classes={names}",
    )
    validation = [event for event in fit(config) if isinstance(event, Epoch)][-1].validation
    known = [score.iou for score in validation.scores if score.iou is not None]
    assert validation.of("iou") == pytest.approx(np.mean(known))
    best = str(tmp_path / "out" / "best.safetensors")
    assert read_header(best).background == "none"
    loose = {"uri": f"{folder}/images", "masks": f"{folder}/masks"}
    run = predict(make_config(input=loose, model={"checkpoint": best})).run
    results = open_run(run.uri)
    assert results.record.background == "none"
    scores = RunScores([results.metrics], len(names), first_foreground=0)
    assert np.isfinite(scores.values["iou"]).all()
    assert not scores.picks[LARGEST]
    facts = RunFacts(results)
    assert [pick.image_id for pick in facts.sheets["worst"]] == [
        pick.image_id for pick in scores.picks[LOWEST_IOU]
    ]
    assert "largest" not in facts.sheets
    assert "foreground nan" not in render(facts).decode()
    config = config_of(folder, tmp_path / "more")
    again = config.model_copy(update={"model": NetworkConfig(checkpoint=best)})
    assert new_network(again)[1].background == "none"
    assert identity(again)["model.background"] == "none"


def test_a_training_from_before_the_key_goes_on(folder, tmp_path):
    config = config_of(folder, tmp_path / "out", "train.epochs=1")
    list(fit(config))
    run = tmp_path / "out" / "run.json"
    document = json.loads(run.read_text())
    assert document["identity"].pop("model.background") == NEUTRAL["model.background"]
    run.write_text(json.dumps(document))
    assert open_training(config).is_finished
    with pytest.raises(RunMismatchError, match=r"model\.background"):
        open_training(
            config_of(folder, tmp_path / "out", "train.epochs=1", "model.background=none")
        )
