"""Training on a pretended CUDA device: the same weights as on the CPU."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.planted import planted
from tests.support.pretended_device import DEVICE, pretended_device
from tests.support.scenes import config_of
from unet_core.errors import StoppedError
from unet_core.synthetic import nuclei, png
from unet_core.training import augment, learner, loader, losses
from unet_core.training import fit as fitting
from unet_core.training.fit import Step, fit
from unet_core.training.learner import autocast_dtype

SMALL = ("train.epochs=1", "train.crop=32", "train.crops_per_image=1", "model.width=2",
         "train.precision=float32", "loss.boundary=0")  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they bring on crops this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Six small images with masks."""
    root = tmp_path_factory.mktemp("scenes")
    for number in range(6):
        image, mask = nuclei(48, 56, np.random.default_rng(number))
        for kind, pixels in (("images", image), ("masks", mask)):
            (root / kind).mkdir(exist_ok=True)
            (root / kind / f"{number}.png").write_bytes(png(pixels))
    return root


def trained(scenes, output, device, *overrides):
    """Losses step by step, and the last weights."""
    config = config_of(scenes, output, *SMALL, *overrides)
    seen = [event.loss for event in fit(config, device=device) if isinstance(event, Step)]
    return seen, load_file(output / "last.safetensors")


def stop_after_a_step(config):
    taken = []
    for event in fit(config, device=DEVICE, wants_stop=lambda: len(taken) > 0):
        taken.extend([event] if isinstance(event, Step) else [])


@pytest.mark.parametrize(
    "overrides",
    [("augment.elastic=3", "augment.noise=0.2", "loss.boundary=10"),
     ("train.ema=0.9", "train.accumulate=3", "train.freeze_norm=true"),
     ("model.classes=['a','b','c']", "loss.bce=1", "loss.focal=1", "loss.class_weights=balanced"),
     ("train.precision=bfloat16", "train.optimizer=sgd", "augment.gamma=1.2")],
    ids=["elastic", "ema", "classes", "bfloat16"],
)  # fmt: skip
def test_a_training_gives_the_weights_it_gives_on_the_cpu(scenes, tmp_path, monkeypatch, overrides):
    # a fused step of the optimizer, which only a CPU gets, rounds otherwise
    monkeypatch.setattr(learner, "_is_dense", lambda tensor: False)
    losses_here, here = trained(scenes, tmp_path / "here", torch.device("cpu"), *overrides)
    with pretended_device():
        losses_there, there = trained(scenes, tmp_path / "there", DEVICE, *overrides)
    assert losses_there == losses_here
    assert here.keys() == there.keys()
    assert all(torch.equal(there[name], tensor) for name, tensor in here.items())


def test_a_training_goes_on_from_a_checkpoint_on_the_device(scenes, tmp_path):
    overrides = ("train.epochs=2", "train.ema=0.9")
    with pretended_device():
        _, whole = trained(scenes, tmp_path / "whole", DEVICE, *overrides)
        with pytest.raises(StoppedError):
            stop_after_a_step(config_of(scenes, tmp_path / "parts", *SMALL, *overrides))
        _, parts = trained(scenes, tmp_path / "parts", DEVICE, *overrides)
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_the_device_decides_the_precision_of_auto(scenes, tmp_path):
    config = config_of(scenes, tmp_path, "train.precision=auto").train
    with pretended_device():
        assert autocast_dtype(config, DEVICE) == torch.bfloat16


@pytest.mark.parametrize(
    ("module", "right", "wrong", "users"),
    [(augment, "_bicubic_weights(side).to(device)", "_bicubic_weights(side)",
      {"augment": loader}),
     (augment, "centre_N2 = torch.tensor([crop.centre for crop in crops], device=device)",
      "centre_N2 = torch.tensor([crop.centre for crop in crops])", {"augment": loader}),
     (losses, "torch.arange(logits, device=labels_NHW.device)", "torch.arange(logits)",
      {"one_hot": losses}),
     (learner, "network.to(device, memory_format", "network.to(memory_format",
      {"Learner": fitting})],
    ids=["weights", "centre", "classes", "network"],
)  # fmt: skip
def test_what_is_left_on_the_cpu_is_refused(
    scenes, tmp_path, monkeypatch, module, right, wrong, users
):
    made = planted(module, right, wrong)
    for name, user in users.items():
        monkeypatch.setattr(user, name, getattr(made, name))
    with pretended_device(), pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        trained(scenes, tmp_path / "there", DEVICE, "augment.elastic=3")
