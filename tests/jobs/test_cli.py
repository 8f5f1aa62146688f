import re
import warnings

import onnx
import pytest
import torch
from click.testing import CliRunner

from jobs import cli
from jobs.predict import predict
from tests.support.foreign import small
from unet_core.synthetic import nuclei, png


@pytest.mark.parametrize("verb", ["", *cli.cli.commands])
def test_help_tells_every_verb(verb):
    result = CliRunner().invoke(cli.cli, [*verb.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_plain_paths_work_from_images_to_verified_masks(run_cli, folder, tiny_model, tmp_path):
    out = tmp_path / "run"
    images = ("predict", folder / "images", "--model", tiny_model, "--out", out)
    more = ("tile.size=256", "workers.count=inline")
    code, text, _ = run_cli("plan", *images[1:], *more)
    assert code == 0
    assert "images:   12" in text
    assert not out.exists()
    code, text, _ = run_cli(*images, *more)
    assert code == 0
    assert "12 seen = 12 ok + 0 failed" in text
    code, text, _ = run_cli(*images, *more)
    assert code == 0
    assert "finished already; nothing was written" in text
    code, text, _ = run_cli("status", out)
    assert "1 of 1 committed" in text
    code, text, _ = run_cli("verify", out, "--deep")
    assert code == 0
    assert "nothing is off; every mask was counted again" in text
    next((out / "masks").glob("*")).unlink()
    code, text, _ = run_cli("verify", out)
    assert code == 1
    assert "problem: shard" in text


def test_a_long_name_is_apart_from_its_text(run_cli, folder, tmp_path):
    packed = tmp_path / "packed"
    code, text, _ = run_cli("pack", folder / "images", packed, "--format", "webdataset")
    assert code == 0
    assert f"packed into: {packed}" in text


def test_mistakes_cost_one_message_and_an_exit_code(run_cli, tmp_path):
    code, _, errors = run_cli("predict", tmp_path / "images")
    assert code == 2
    assert "--out RUN" in errors
    code, _, errors = run_cli("predict", tmp_path / "nothing", "--out", tmp_path / "run")
    assert code == 3
    assert "there is nothing at" in errors
    code, _, errors = run_cli("predict", tmp_path, "tile.sise=3", "--out", tmp_path / "run")
    assert code == 2
    assert "did you mean size?" in errors
    code, _, errors = run_cli("status", tmp_path)
    assert code == 3
    assert "not a run folder" in errors
    code, _, errors = run_cli("segment")
    assert code == 2
    assert "No such command" in errors


def test_two_folders_train_a_network_that_predicts(run_cli, tmp_path):
    import numpy as np

    for number in range(6):
        image, mask = nuclei(48, 48, np.random.default_rng(number))
        for kind, pixels in (("images", image), ("masks", mask)):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{number}.png").write_bytes(png(pixels))
    model = tmp_path / "model"
    options = ("train.epochs=8", "train.crop=48", "model.width=4", "model.depth=2",
               "train.batch=2", "train.crops_per_image=4", "data.val_fraction=0.4")  # fmt: skip
    pair = (tmp_path / "images", tmp_path / "masks")
    code, text, errors = run_cli("train", *pair, "--out", model, *options)
    assert code == 0, errors
    assert "epoch 8/8" in errors
    assert f"best:     {model}/best.safetensors (val iou 0." in text
    code, text, _ = run_cli("train", *pair, "--out", model, *options)
    assert code == 0
    assert "finished already; nothing was written" in text
    code, text, _ = run_cli("status", model)
    assert code == 0
    assert "64 of 64 steps" in text
    code, _, errors = run_cli("train", *pair, "--out", model, *options, "train.seed=3")
    assert code == 2
    assert "train.seed: the training has 0, this config 3" in errors
    code, text, errors = run_cli(
        "predict", tmp_path / "images", f"input.masks={tmp_path}/masks",
        "--model", model / "best.safetensors", "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, errors
    assert "6 seen = 6 ok + 0 failed" in text


def test_a_shipped_recipe_is_found_by_its_name(run_cli, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = (f"data.train.uri={folder}/images", f"data.train.masks={folder}/masks")
    small = ("model.width=4", "model.depth=2", "train.crop=36", "train.epochs=1", "output.uri=m")
    code, text, errors = run_cli("train", "paper.toml", *data, *small, "data.val_fraction=0.3")
    assert code == 0, errors
    assert "best:     m/best.safetensors" in text
    code, _, errors = run_cli("train", "nowhere.toml")
    assert (code, "cannot be read" in errors) == (2, True)


@pytest.mark.slow
def test_presets_and_networks_are_described(run_cli, tiny_model):
    code, text, _ = run_cli("model")
    assert code == 0
    assert re.search(r"paper .* 31,030,658 .* 188,.* 204 .* 0\n", text)
    assert re.search(r"dilated .* 31,031,810 .* 233 .* blended\n", text)
    assert re.search(r"concat-same .* 31,044,106 ", text)
    code, text, _ = run_cli("model", "paper", "side=572")
    assert "31,030,658 parameters" in text
    assert "300.9 GFLOP for 572² pixels in, 388² out" in text  # as published
    code, text, _ = run_cli("model", tiny_model)
    assert "windows from 208, starts at multiples of 16" in text
    for words, reason in (
        (("paper", "side=310"), "300 and 316 are possible"),
        (("paper", "width=big"), "width: got 'big', allowed: like 64"),
        (("paper", "wide=3"), "wide is no option"),
        (("unet",), "there is no such file"),
    ):
        code, _, error = run_cli("model", *words)
        assert (code, reason in error) == (2, True), error


def test_weights_from_elsewhere_become_a_checkpoint_that_predicts(run_cli, tmp_path, folder):
    torch.manual_seed(0)
    torch.save({"state_dict": small(1, 2).state_dict()}, tmp_path / "theirs.pth")
    made = tmp_path / "made.safetensors"
    factory = "tests.support.foreign:small"
    imported = ("import-weights", tmp_path / "theirs.pth", made, "--factory", factory)
    code, text, _ = run_cli(*imported, "model.color=gray", "model.arguments.classes=2")
    assert code == 0
    assert "exact tiles, halo 2, sides multiples of 2" in text
    out = ("predict", folder / "images", "--model", made, "--out", tmp_path / "run")
    code, _, error = run_cli(*out, "workers.count=inline")
    assert code == 2
    assert f"model.factory = '{factory}'" in error
    code, text, _ = run_cli(*out, "workers.count=inline", f"model.factory={factory}")
    assert code == 0
    assert "12 seen = 12 ok" in text
    code, _, error = run_cli("import-weights", tmp_path / "no.pth", tmp_path / "x.safetensors")
    assert code == 3


@pytest.mark.slow
def test_a_runs_network_is_exported(run_cli, make_config, tmp_path):
    predict(make_config())
    out = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        code, text, _ = run_cli("export", tmp_path / "run", "--format", "onnx", "--out", out)
    assert code == 0
    assert "the same logits under onnxruntime" in text
    assert onnx.load(out).graph.input[0].name == "image"
    code, _, error = run_cli("export", tmp_path / "run", "--format", "onnx", "--out", out)
    assert (code, "choose another name" in error) == (2, True)
