import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from jobs.predict import predict
from tests.support.scenes import config_of
from unet_core.config.loading import build
from unet_core.config.train import TrainConfig
from unet_core.errors import ConfigError, DivergedError, RunMismatchError, StoppedError
from unet_core.networks import checkpoint
from unet_core.synthetic import png
from unet_core.training.fit import Epoch, Started, Step, fit
from unet_core.training.learner import Learner, learning_rate_at, new_network
from unet_core.training.training_run import identity


def epochs(config):
    return [event for event in fit(config) if isinstance(event, Epoch)]


def nucleus(epoch):
    return epoch.validation.scores[1].iou


def files(folder):
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


def stop_after(config, steps):
    """Train, with a request to stop after this number of steps of the session."""
    taken = []
    for event in fit(config, wants_stop=lambda: len(taken) >= steps):
        if isinstance(event, Step):
            taken.append(event)


def test_training_learns_and_keeps_the_best_and_the_last(folder, tmp_path):
    out = tmp_path / "model"
    seen = epochs(config_of(folder, out))
    assert seen[-1].loss < 0.9 * seen[0].loss
    best = max(seen, key=nucleus)
    assert nucleus(best) > 0.5
    _, header = checkpoint.load(str(out / "best.safetensors"))
    assert header.training["best"] == {"iou": nucleus(best), "step": best.step}
    assert header.class_names == ("background", "nucleus")
    assert json.loads((out / "_SUCCESS").read_text())["step"] == seen[-1].step == 42
    history = pq.read_table(out / "history").to_pylist()
    losses = [row["value"] for row in history if row["name"] == "loss"]
    assert losses == [epoch.loss for epoch in seen]
    assert [r["value"] for r in history if (r["name"], r["class"]) == ("iou", "nucleus")] == [
        nucleus(epoch) for epoch in seen
    ]
    checkpoints = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert checkpoints == ["000000042"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [("model.preset=paper", "train.crop=36", "model.width=4", "model.depth=2"),
     ("model.preset=dilated", "train.crop=140", "model.width=4", "model.depth=3"),
     ("model.factory=tests.support.foreign:small", "model.arguments.classes=2"),
     ("model.factory=monai.networks.nets:BasicUNet", "model.arguments.spatial_dims=2",
      "model.arguments.in_channels=1", "model.arguments.out_channels=2",
      "model.arguments.features=[8,8,8,8,8,8]")],
    ids=lambda overrides: overrides[0],
)  # fmt: skip
def test_every_kind_of_network_trains_and_predicts(folder, tmp_path, make_config, overrides):
    config = config_of(folder, tmp_path / "model", "train.epochs=3", *overrides)
    seen = epochs(config)
    assert seen[-1].loss < seen[0].loss
    model = {"checkpoint": str(tmp_path / "model" / "best.safetensors"),
             "factory": config.model.factory}  # fmt: skip
    outcome = predict(make_config(model=model, tile={"size": "auto"}))
    assert outcome.totals.ok == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [("train.optimizer=sgd", "train.learning_rate=0.05"), ("train.optimizer=adam",),
     ("train.ema=0.8",), ("train.freeze_norm=true",), ("train.precision=bfloat16",),
     ("loss.focal=1", "loss.tversky=1", "loss.jaccard=1", "loss.bce=1"),
     ("loss.class_weights=balanced", "loss.boundary=10", "loss.dice=0"),
     ("train.accumulate=2", "train.schedule=linear"), ("augment.elastic=5", "augment.color=0.1")],
    ids=lambda overrides: overrides[0],
)  # fmt: skip
def test_every_option_learns(folder, tmp_path, overrides):
    seen = epochs(config_of(folder, tmp_path / "model", "train.epochs=3", *overrides))
    assert seen[-1].loss < 0.95 * seen[0].loss


def test_more_classes_train_with_a_logit_each(folder, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(6):
        labels = np.zeros((48, 48), np.uint8)
        labels[:20, : 20 + number], labels[25:, 10:] = 1, 2
        (tmp_path / "masks" / f"{number}.png").write_bytes(png(labels))
        (tmp_path / "images" / f"{number}.png").write_bytes(png(labels * 80 + 20))
    config = config_of(tmp_path, tmp_path / "m", "model.classes=['sky', 'sea', 'land']",
                       "train.crop=32", "train.epochs=12", "augment.gamma=1")  # fmt: skip
    assert min(score.iou for score in epochs(config)[-1].validation.scores) > 0.9


def test_a_crop_that_the_network_cannot_give_is_refused_with_its_neighbours(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"crop is 64, but paper .* 52 and 68 are possible"):
        config_of(folder, tmp_path / "m", "model.preset=paper", "model.depth=4")
    with pytest.raises(ConfigError, match=r"train\.crop is 70, but padded .* 68 and 72 are"):
        config_of(folder, tmp_path / "m", "train.crop=70")
    overrides = ("model.factory=tests.support.foreign:small", "model.arguments.classes=5")
    with pytest.raises(ConfigError, match=r"model\.classes: got 2 names, but the network has 5"):
        epochs(config_of(folder, tmp_path / "m", *overrides))


def test_the_same_seed_gives_the_same_weights_to_the_bit(folder, tmp_path):
    for out in ("a", "b"):
        epochs(config_of(folder, tmp_path / out, "train.epochs=2", "model.preset=bilinear"))
    a, b = (load_file(tmp_path / out / "last.safetensors") for out in ("a", "b"))
    assert all((a[name] == b[name]).all() for name in a)


def test_a_finished_training_is_left_alone_and_another_config_refused_by_key(folder, tmp_path):
    out = tmp_path / "m"
    config = config_of(folder, out, "train.epochs=1")
    epochs(config)
    before = files(out)
    assert epochs(config) == []
    assert files(out) == before
    with pytest.raises(
        RunMismatchError, match=r"train\.learning_rate: the training has 0\.01, this co"
    ):
        epochs(config_of(folder, out, "train.epochs=1", "train.learning_rate=0.1"))
    with pytest.raises(RunMismatchError, match=r"augment\.elastic"):
        epochs(config_of(folder, out, "train.epochs=1", "augment.elastic=3"))
    epochs(config_of(folder, out, "train.epochs=1", "workers.max_failures=0"))


def test_a_training_that_is_asked_to_stop_goes_on_as_if_nothing_had_happened(folder, tmp_path):
    epochs(config_of(folder, tmp_path / "whole", "train.epochs=2"))
    config = config_of(folder, tmp_path / "stopped", "train.epochs=2")
    for after in (3, 5, 2):
        with pytest.raises(StoppedError, match="stopped after step"):
            stop_after(config, after)
    assert len(epochs(config)) == 1
    a, b = (load_file(tmp_path / out / "last.safetensors") for out in ("whole", "stopped"))
    assert all((a[name] == b[name]).all() for name in a)
    whole, stopped = (pq.read_table(tmp_path / out / "history") for out in ("whole", "stopped"))
    assert whole.equals(stopped)


def test_a_training_stopped_after_its_last_step_still_evaluates_it(folder, tmp_path):
    config = config_of(folder, tmp_path / "m", "train.epochs=1")
    with pytest.raises(StoppedError, match="after step 7"):
        stop_after(config, 7)
    (epoch,) = epochs(config)
    assert (epoch.step, epoch.is_best) == (7, True)


def test_checkpoints_come_by_the_clock_too(folder, tmp_path):
    config = config_of(folder, tmp_path / "m", "train.epochs=1", "train.checkpoint_minutes=1e-9")
    for event in fit(config):
        if isinstance(event, Step) and event.number == 5:
            break  # as if killed here
    started, *_ = [event for event in fit(config) if not isinstance(event, Step)]
    assert isinstance(started, Started)
    assert started.step == 4


def test_images_that_change_between_two_sessions_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    config = config_of(tmp_path / "data", tmp_path / "m", "train.epochs=2")
    next(event for event in fit(config) if isinstance(event, Epoch))
    shutil.copy(tmp_path / "data/images/cell03.png", tmp_path / "data/images/new.png")
    shutil.copy(tmp_path / "data/masks/cell03.png", tmp_path / "data/masks/new.png")
    with pytest.raises(RunMismatchError, match=r"1 are new \(new\.png\)"):
        epochs(config)


def test_a_loss_that_is_no_number_names_its_images_and_keeps_the_last_good_weights(
    folder, tmp_path, monkeypatch
):
    out = tmp_path / "m"
    step = Learner.step
    taken = []

    def poisoned(self, micro_batches, *arguments):
        taken.append([micro_batch.image_ids for micro_batch in micro_batches])
        if len(taken) == 9:
            micro_batches[0].images_NCHW.fill_(float("nan"))
        return step(self, micro_batches, *arguments)

    monkeypatch.setattr(Learner, "step", poisoned)
    halves = ("train.accumulate=2", "train.batch=8", "train.crops_per_image=8")
    with pytest.raises(DivergedError) as caught:
        epochs(config_of(folder, out, *halves))
    named = re.search(r"no number at step 9; images: (.*); the last", str(caught.value))[1]
    guilty, others = map(set, taken[8])
    assert others - guilty
    assert set(named.split(", ")) == guilty
    tensors = load_file(out / "checkpoints" / "000000007" / "state.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    checkpoint.load(str(out / "best.safetensors"))


def test_a_gradient_that_is_no_number_never_reaches_the_weights(folder, tmp_path, monkeypatch):
    out = tmp_path / "m"
    backward, steps = Learner._backward, []

    def explodes(self, *arguments):
        part = backward(self, *arguments)
        steps.append(part)
        if len(steps) == 14:  # the last step of an epoch: a checkpoint follows
            next(self.network.parameters()).grad.fill_(float("inf"))
        return part

    monkeypatch.setattr(Learner, "_backward", explodes)
    with pytest.raises(DivergedError, match="at step 14; images: cell"):
        epochs(config_of(folder, out))
    (checkpoint_path,) = (out / "checkpoints").iterdir()
    assert checkpoint_path.name == "000000007"
    monkeypatch.undo()
    assert epochs(config_of(folder, out))[-1].step == 42  # as if that had not happened


def test_a_micro_batch_without_images_leaves_the_statistics_alone(folder, tmp_path):
    network, _ = new_network(config_of(folder, tmp_path / "m"))
    before = {name: t.clone() for name, t in network.state_dict().items() if "running" in name}
    images_N1HW = torch.zeros(0, 1, 64, 64)
    (network.train()(images_N1HW).sum() * 0).backward()
    for name, tensor in before.items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert not any(p.grad.any() for p in network.parameters())


def test_who_stops_before_the_first_step_has_no_best_weights(folder, tmp_path):
    config = config_of(folder, tmp_path / "m", "train.epochs=1")
    with pytest.raises(StoppedError, match="looking at the images"):
        stop_after(config, 0)
    answers = iter([False] * 12)  # for the images
    with pytest.raises(StoppedError, match="after step 0"):
        list(fit(config, wants_stop=lambda: next(answers, True)))
    iterator = fit(config)
    assert next(iterator).step == 0
    assert not (tmp_path / "m" / "best.safetensors").exists()
    (epoch,) = [event for event in iterator if isinstance(event, Epoch)]
    assert epoch.is_best


def test_a_network_that_predicts_one_class_is_told(folder, tmp_path):
    lazy = ("train.epochs=2", "train.learning_rate=1e-30", "train.freeze_norm=true")
    first, second = epochs(config_of(folder, tmp_path / "m", *lazy))
    assert first.validation.only_class in (0, 1)
    assert (first.is_best, second.is_best) == (True, False)  # the weights have not moved
    assert epochs(config_of(folder, tmp_path / "n"))[-1].validation.only_class is None


def test_a_checkpoint_is_trained_further_with_its_own_network_and_new_classes(
    folder, tmp_path, tiny_model
):
    table = {
        "data": {"train": {"uri": str(folder / "images"), "masks": str(folder / "masks")}},
        "output": {"uri": str(tmp_path / "m")},
        "train": {"epochs": 1, "crop": 64},
    }
    config = build(TrainConfig, table, [f"model.checkpoint={tiny_model}"])
    network, header = new_network(config)
    theirs, _ = checkpoint.load(tiny_model)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert header.class_names == ("background", "nucleus")
    epochs(config)
    _, header = checkpoint.load(str(tmp_path / "m" / "best.safetensors"))
    assert header.network.width == 4
    three = build(
        TrainConfig, table, [f"model.checkpoint={tiny_model}", "model.classes=['a', 'b', 'c']"]
    )
    network, header = new_network(three)
    assert header.network.classes == 3
    assert torch.equal(network.state_dict()["encoder.0.conv1.weight"],
                       theirs.state_dict()["encoder.0.conv1.weight"])  # fmt: skip
    three_out = [f"output.uri={tmp_path}/three", f"model.checkpoint={tiny_model}"]
    epochs(build(TrainConfig, table, [*three_out, "model.classes=['a', 'b', 'c']"]))
    best = tmp_path / "three" / "best.safetensors"
    weights = ("loss.class_weights=balanced", "loss.class_weights=[1, 2, 3]")
    for number, option in enumerate(weights):  # the classes are those of the checkpoint
        out = f"output.uri={tmp_path}/further-{number}"
        (epoch,) = epochs(build(TrainConfig, table, [f"model.checkpoint={best}", out, option]))
        assert len(epoch.validation.scores) == 3
    with pytest.raises(ConfigError, match="holds 2 numbers, but the classes are a, b, c"):
        new_network(
            build(TrainConfig, table, [f"model.checkpoint={best}", "loss.class_weights=[1, 2]"])
        )
    with pytest.raises(ConfigError, match="width and checkpoint exclude each other"):
        build(TrainConfig, table, [f"model.checkpoint={tiny_model}", "model.width=8"])
    with pytest.raises(RunMismatchError, match=r"model\.checkpoint"):
        epochs(build(TrainConfig, table, ["model.checkpoint=builtin:nuclei"]))


def test_a_key_that_counts_by_being_written_makes_another_training(folder, tmp_path, tiny_model):
    model = [f"model.checkpoint={tiny_model}", "model.classes=['background', 'foreground']"]
    ignored = "data.train.ignore_index=255"
    base = {
        "data": {"train": {"uri": str(folder / "images"), "masks": str(folder / "masks")}},
        "output": {"uri": str(tmp_path / "m")},
    }
    for before, written, key in (
        ([], ignored, None),
        ([], model[1], None),
        ([model[0]], "model.classes=['background', 'nucleus']", None),  # those of the checkpoint
        (["data.train.instances=true"], ignored, "data.train.ignore_index"),
        ([model[0]], model[1], "model.classes"),
    ):
        config = build(TrainConfig, base, [*before, written])
        usual = identity(build(TrainConfig, base, before))
        differing = [k for k, value in identity(config).items() if value != usual.get(k)]
        assert differing == ([key] if key else [])


def test_the_learning_rate_warms_up_and_falls(folder, tmp_path):
    train = config_of(folder, tmp_path / "y", "train.warmup=0.1").train
    rates = [learning_rate_at(step, 100, train) for step in range(100)]
    assert rates[0] < rates[5] < max(rates) == pytest.approx(train.learning_rate)
    assert rates.index(max(rates)) == 10
    assert 0 < rates[-1] < 0.01 * train.learning_rate
    flat = config_of(folder, tmp_path / "y", "train.warmup=0", "train.schedule=constant").train
    assert {learning_rate_at(step, 100, flat) for step in range(100)} == {flat.learning_rate}
