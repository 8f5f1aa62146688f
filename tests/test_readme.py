"""What the documents show works: every command parses, every config loads, every snippet runs."""

import re
import shlex
import shutil
import tomllib
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from jobs.cli import cli
from jobs.predict import predict
from tests.support.documents import README, ROOT, blocks
from tests.support.runs import config_of
from unet_core import open_run
from unet_core.config.loading import build, load
from unet_core.config.predict import PredictConfig
from unet_core.config.train import TrainConfig
from unet_core.errors import ErrorCode

FORMATS = (ROOT / "docs" / "formats.md").read_text()
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "cluster" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


COMMANDS = [
    line.partition("unet-jobs ")[2].partition("#")[0]
    for path in DOCUMENTS
    for block in blocks("sh", path.read_text())
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("unet-jobs ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_is_one_that_parses(command):
    verb, *arguments = shlex.split(command)
    assert cli.commands[verb].make_context(verb, list(arguments))


def test_the_config_shown_has_every_key_and_its_default():
    table = tomllib.loads(blocks("toml")[0])
    config = build(PredictConfig, table, [])
    for section, fields in config.model_dump(mode="json").items():
        assert set(table[section]) == set(fields) - {"low", "high"}, section
    required = {"input": {"uri": "photos"}, "output": {"uri": "runs/first"}}
    assert config == build(PredictConfig, required, [])


def test_the_training_shown_has_every_key_and_its_default():
    table = tomllib.loads(blocks("toml", (ROOT / "docs" / "training.md").read_text())[0])
    shown = build(TrainConfig, table, [])
    required = {
        "data": {"train": {"uri": "photos", "masks": "truth/"}},
        "output": {"uri": "models/mine"},
    }
    assert shown == build(TrainConfig, required, ["train.epochs=40"])
    for section, fields in shown.model_dump().items():
        if section not in ("data", "storage"):
            unsaid = {"low", "high", "mean", "std", "steps"}
            assert set(table[section]) == set(fields) - unsaid, section


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_snippet_runs_on_a_run(number, make_config, tmp_path, monkeypatch):
    predict(make_config(out="runs/first"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(blocks("python")[number], names)
    if "corner" in names:
        assert names["corner"].shape == (100, 100)
        assert not names["network"].training
    else:
        assert names["mask"].shape == (names["rows"].height[0], names["rows"].width[0])


@pytest.fixture(scope="module")
def read_runs(folder, tiny_model, tmp_path_factory):
    """A folder with ``runs/first``, of loose images with truth and one that is none, and
    ``runs/png``.
    """
    root = tmp_path_factory.mktemp("reading")
    shutil.copytree(folder / "images", root / "photos")
    (root / "photos" / "zz.png").write_bytes(b"no image")
    both = (f"input.masks={folder}/masks/", "errors.max_failed_images=1")
    for name, encoding in (("first", "raw"), ("png", "png")):
        options = (*both, f"output.encoding={encoding}")
        predict(config_of(root / "photos", tiny_model, root / "runs" / name, *options))
    return root


@pytest.mark.parametrize("snippet", blocks("python", FORMATS), ids=lambda text: text.split()[1])
def test_every_way_shown_to_read_results_does(snippet, read_runs, monkeypatch, capsys):
    monkeypatch.chdir(read_runs)
    if "datasets" in snippet:
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
        from datasets import config

        monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(read_runs / "cache"))
    names: dict[str, Any] = {}
    exec(snippet, names)
    said = capsys.readouterr().out
    if "worst" in names:
        assert "13 images, 1 of them failed" in said
        assert "zz.png" in said
        assert np.allclose(names["shares"].sum(axis=1), 1)
        assert names["worst"].is_monotonic_increasing
        with Image.open(read_runs / "worst.png") as drawn:
            assert drawn.size[::-1] == names["mask"].shape
    elif "shown" in names:
        ids = open_run("runs/png").mask(names["masks"][0]["image_id"])
        assert (np.asarray(names["shown"]) == ids).all()
    elif "areas" in names:
        assert len(names["areas"]) == 12
    elif "iou" in names:
        assert len(names["iou"]) == 12
    elif "mask" in names:
        assert names["mask"].size == names["row"]["image_height"] * names["row"]["image_width"]
    else:
        assert "images" in said


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "recipes").glob("*.toml")), ids=str)
def test_every_recipe_loads(path):
    assert load(TrainConfig, str(path), [])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_every_error_code_of_a_row_is_told():
    table = FORMATS.partition("| `error_code` | |")[2].partition("\n\n")[0]
    told = {code for row in table.splitlines() for code in re.findall(r"`(\w+)`", row[:60])}
    assert told == {*get_args(ErrorCode)} - {"labels"}


def test_make_prints_every_target_that_the_readme_names():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:.*## ", makefile, flags=re.MULTILINE)
