import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from unet_core.losses import cross_entropy, dice

from jobs.predict import predict
from tests.data import write_tar
from unet_core import checkpoint
from unet_core.config import build
from unet_core.errors import ConfigError
from unet_core.fit import fit
from unet_core.synthetic import nuclei, png
from unet_core.train_config import TrainConfig


def config_of(folder, tmp_path, *overrides):
    table = {
        "data": {"train": {"uri": str(folder / "images"), "masks": str(folder / "masks")},
                 "val_fraction": 0.3},
        "model": {"width": 4, "depth": 2, "classes": ["background", "nucleus"]},
        "train": {"epochs": 6, "crop": 64, "batch": 3, "crops_per_image": 3, "learning_rate": 1e-2},
        "output": {"uri": str(tmp_path / "model")},
    }  # fmt: skip
    return build(TrainConfig, table, list(overrides))


def test_training_learns_and_keeps_the_best(folder, tmp_path):
    epochs = list(fit(config_of(folder, tmp_path)))
    assert epochs[-1].loss < 0.8 * epochs[0].loss
    best = max(epoch.foreground_iou for epoch in epochs)
    assert best > 0.5
    _, header = checkpoint.load(str(tmp_path / "model" / "best.safetensors"))
    assert header.training["val_iou"]["nucleus"] == best
    assert header.class_names == ("background", "nucleus")
    history = pq.read_table(tmp_path / "model" / "history").to_pylist()
    losses = [row["value"] for row in history if row["name"] == "loss"]
    assert losses == [epoch.loss for epoch in epochs]


@pytest.mark.parametrize(
    "overrides",
    [("model.preset=paper", "train.crop=36", "model.width=4", "model.depth=2"),
     ("model.preset=dilated", "train.crop=140", "model.width=4", "model.depth=3"),
     ("model.factory=tests.foreign:small", "model.arguments.classes=2"),
     ("model.factory=monai.networks.nets:BasicUNet", "model.arguments.spatial_dims=2",
      "model.arguments.in_channels=1", "model.arguments.out_channels=2",
      "model.arguments.features=[8,8,8,8,8,8]")],
    ids=lambda overrides: overrides[0],
)  # fmt: skip
def test_every_kind_of_network_trains_and_predicts(folder, tmp_path, make_config, overrides):
    config = config_of(folder, tmp_path, "train.epochs=3", *overrides)
    epochs = list(fit(config))
    assert epochs[-1].loss < epochs[0].loss
    model = {"checkpoint": str(tmp_path / "model" / "best.safetensors"),
             "factory": config.model.factory}  # fmt: skip
    outcome = predict(make_config(model=model, tile={"size": "auto"}))
    assert outcome.totals.ok == 12


def test_a_crop_that_the_network_cannot_give_is_refused_with_its_neighbours(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"crop is 64, but paper .* 52 and 68 are possible"):
        config_of(folder, tmp_path, "model.preset=paper", "model.depth=4")
    with pytest.raises(ConfigError, match=r"train\.crop is 70, but padded .* 68 and 72 are"):
        config_of(folder, tmp_path, "train.crop=70")
    overrides = ("model.factory=tests.foreign:small", "model.arguments.classes=5")
    with pytest.raises(ConfigError, match=r"names 2, but tests\.foreign:small gives 5 logits"):
        list(fit(config_of(folder, tmp_path, *overrides)))


def test_the_same_seed_gives_the_same_losses(folder, tmp_path):
    runs = [
        [e.loss for e in fit(config_of(folder, tmp_path, "train.epochs=2", f"output.uri={out}"))]
        for out in (tmp_path / "a", tmp_path / "b")
    ]
    assert runs[0] == runs[1]


def test_truth_that_cannot_be_used_stops_training_by_name(tmp_path):
    image, mask = nuclei(40, 40, np.random.default_rng(0))
    write_tar(tmp_path / "t.tar", {"a.png": png(image), "a.mask.png": png(mask * 255)})
    table = {
        "data": {"train": {"uri": str(tmp_path / "t.tar"), "masks": "mask.png", "ignore_index": 9}},
        "output": {"uri": str(tmp_path / "model")},
    }
    with pytest.raises(ConfigError, match=r"t\.tar/a: the mask cannot be used: .*holds 255"):
        list(fit(build(TrainConfig, table, [])))


@pytest.mark.parametrize("logits", [1, 3])
def test_losses_are_those_of_their_definitions(logits):
    torch.manual_seed(0)
    x, ignore = torch.randn(2, logits, 5, 6), 255
    labels = torch.randint(0, max(2, logits), (2, 5, 6))
    labels[0, 0] = ignore
    counted = labels != ignore
    p = torch.sigmoid(x[:, 0]) if logits == 1 else torch.softmax(x, 1)
    if logits == 1:
        chosen = torch.where(labels == 1, p, 1 - p)[counted]
        classes = [(p[counted], (labels == 1)[counted])]
    else:
        chosen = p.gather(1, labels.clamp(max=2)[:, None])[:, 0][counted]
        classes = [(p[:, k][counted], (labels == k)[counted]) for k in (1, 2)]
    assert cross_entropy(x, labels, ignore).item() == pytest.approx(-chosen.log().mean().item())
    scores = [(2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1) for p, t in classes]
    expected = 1 - sum(s.item() for s in scores) / len(scores)
    assert dice(x, labels, ignore).item() == pytest.approx(expected, abs=1e-6)
    everything = torch.full_like(labels, ignore)
    assert cross_entropy(x, everything, ignore).item() == 0
    assert math.isfinite(dice(x, everything, ignore).item())
