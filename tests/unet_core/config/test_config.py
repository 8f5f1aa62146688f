import math

import pytest

from unet_core.config.import_weights import ForeignConfig
from unet_core.config.loading import build, load
from unet_core.config.predict import PredictConfig
from unet_core.config.train import NetworkConfig, TrainConfig
from unet_core.errors import ConfigError
from unet_core.images.preprocessing import Preprocessing

GOOD = {"input": {"uri": "in"}, "output": {"uri": "out"}}


def problems(table, *overrides, kind=PredictConfig):
    with pytest.raises(ConfigError) as caught:
        build(kind, table, list(overrides), source="job.toml")
    return str(caught.value).splitlines()


def test_every_problem_is_told_at_once_with_what_is_allowed():
    lines = problems(
        {
            "input": {"uri": "in", "formatt": "x", "shard_images": 0},
            "model": {"threshold": 2},
            "tile": {"size": "big", "batch": "x"},
            "output": {"encoding": "jpg"},
            "workers": {"count": "all", "gpus": -1},
            "nonsense": {},
        }
    )
    assert lines == [
        "job.toml: input.shard_images: got 0, allowed: a number of 1 or more",
        "job.toml: input.formatt: unknown key; did you mean format?",
        "job.toml: model.threshold: got 2, allowed: a number below 1.0",
        "job.toml: tile.size: got 'big', allowed: \"auto\" or a whole number",
        "job.toml: tile.batch: got 'x', allowed: \"auto\" or a whole number",
        "job.toml: output.uri: is required",
        'job.toml: output.encoding: got \'jpg\', allowed: "raw" or "png"',
        'job.toml: workers.gpus: got -1, allowed: "auto" or a number of 0.0 or more',
        'job.toml: workers.count: got \'all\', allowed: "auto" or "inline" or a whole number',
        "job.toml: nonsense: unknown key; "
        "allowed here: input, model, tile, output, workers, errors, storage",
    ]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("input.uri", "http://169.254.169.254/latest", "http:// is not one of"),
        ("input.uri", "dir::file:///etc", "chained URIs"),
        ("input.uri", "file:///data/../etc", "'..' is not allowed"),
        ("input.uri", "", "is empty"),
        ("output.uri", "in/masks", "must not contain each other"),
        ("output.uri", ".", "must not contain each other"),
        ("output.uri", "local://in/masks", "must not contain each other"),
        ("model.checkpoint", "http://x/y.safetensors", "http:// is not one of"),
    ],
)
def test_places_that_no_job_should_touch_are_refused(key, value, reason):
    (line,) = problems(GOOD, f'{key}="{value}"')
    assert reason in line
    assert key in line


def test_overrides_are_toml_and_else_plain_text():
    config = build(
        PredictConfig,
        GOOD,
        ["tile.size=512", "input.label_map={255=1}", "workers.count=inline", "workers.gpus=0.5"],
    )
    assert config.tile.size == 512
    assert config.input.label_map == {255: 1}
    assert config.workers.count == "inline"
    assert config.workers.gpus == 0.5


@pytest.mark.parametrize("override", ["size=3", "tile.size", "=3", "input.uri.deep=3"])
def test_a_malformed_override_is_named(override):
    (line,) = problems({"input": {"uri": "x"}}, override)
    assert override in line


def test_a_broken_file_is_named_with_the_line(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("[input\n")
    with pytest.raises(ConfigError, match=r"job\.toml: not valid TOML.*line 1"):
        load(PredictConfig, str(path), [])
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load(PredictConfig, str(tmp_path / "none.toml"), [])


def test_training_without_truth_and_crops_that_do_not_fit_are_refused():
    table = {"data": {"train": {"uri": "in"}}, "train": {"crop": 100}, "output": {"uri": "out"}}
    (line,) = problems(table, kind=TrainConfig)
    assert "train.masks is empty" in line
    table["data"]["train"]["masks"] = "masks/"
    (line,) = problems(table, kind=TrainConfig)
    assert "train.crop is 100" in line
    assert "96 and 112 are possible" in line


TRAINING = {
    "data": {"train": {"uri": "in", "masks": "truth/"}},
    "output": {"uri": "out"},
}


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("workers.count=all", 'workers.count: got \'all\', allowed: "auto" or "inline" or a whole'),
        ("workers.count=[8, 2]", "workers.count: got [8, 2], but the fewest ranks come first"),
        ("train.optimizr=sgd", "train.optimizr: unknown key; did you mean optimizer?"),
        (
            "train.optimizer=lamb",
            'train.optimizer: got \'lamb\', allowed: "adamw", "adam" or "sgd"',
        ),
        ("train.accumulate=9", "train.accumulate is 9, but a batch has only 8 crops"),
        ("train.ema=1", "train.ema: got 1, allowed: a number below 1.0"),
        ("augment.rotation=270", "augment.rotation: got 270, allowed: a number of 180.0 or less"),
        ("augment.scale=0.5", "augment.scale: got 0.5, allowed: a number of 1.0 or more"),
        ("loss.class_weights=some", 'loss.class_weights: got \'some\', allowed: "none" or "balan'),
        ("model.arguments.a=1", "model: arguments belong to a factory; give model.factory too"),
        ("data.train.masks=''", "data: train.masks is empty, but training needs the truth"),
        ("output.uri=in/model", "output.uri (in/model) and data.train.uri (in) must not contain"),
    ],
)
def test_mistakes_in_a_training_are_told_with_what_is_allowed(override, reason):
    (line,) = problems(TRAINING, override, kind=TrainConfig)
    assert reason in line


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (
            {"low": 50, "high": 20},
            "low is 50 and high 20, but percentile needs numbers from 0 to 100",
        ),
        ({"high": 150}, "low is 1 and high 150, but percentile needs numbers from 0"),
        ({"low": 99.9}, "low is 99.9 and high 99.8, but"),
        ({"low": math.nan}, "low is nan"),
        ({"normalization": "range", "high": 0}, "low is 0 and high 0, but range needs finite"),
        ({"normalization": "range", "high": math.inf}, "high inf"),
        ({"normalization": "range", "low": 3, "high": 3}, "low is 3 and high 3"),
        (
            {"normalization": "zscore", "low": 1},
            "mean and std to standard, which needs both; got low with zscore",
        ),
    ],
)
@pytest.mark.parametrize("kind", [ForeignConfig, NetworkConfig, Preprocessing])
def test_low_and_high_have_something_between_them(keys, reason, kind):
    table = {"color": "gray", "normalization": "percentile"}
    (line,) = problems(table | keys, kind=kind)
    assert reason in line
    kind(**table | {"normalization": "range", "low": 1000})
    kind(**table | {"low": 0, "high": 100})


def test_a_training_needs_one_length_one_loss_and_one_kind_of_object():
    steps = ("train.epochs=3", "train.steps=5")
    assert "epochs and steps exclude each other" in problems(TRAINING, *steps, kind=TrainConfig)[0]
    nothing = ("loss.cross_entropy=0", "loss.dice=0")
    assert "every loss has weight 0" in problems(TRAINING, *nothing, kind=TrainConfig)[0]
    objects = ("data.train.instances=true", "model.classes=['a', 'b', 'c']")
    assert "one class of objects" in problems(TRAINING, *objects, kind=TrainConfig)[0]


def test_old_names_are_read_and_the_arguments_of_a_factory_are_left_alone():
    table = {
        **TRAINING,
        "model": {"normalisation": "range", "factory": "a:b", "arguments": {"optimiser": "mine"}},
        "train": {"optimiser": "sgd"},
    }
    config = build(TrainConfig, table, [])
    assert (config.model.normalization, config.train.optimizer) == ("range", "sgd")
    assert config.model.arguments == {"optimiser": "mine"}
    assert build(TrainConfig, table, ["train.optimizer=adam"]).train.optimizer == "adam"
    assert build(TrainConfig, table, ["train.optimiser=adam"]).train.optimizer == "adam"
    given = build(TrainConfig, table, ["model.arguments.normalisation=none"])
    assert given.model.arguments == {"optimiser": "mine", "normalisation": "none"}
    twice = {**TRAINING, "train": {"optimiser": "sgd", "optimizer": "sgd"}}
    with pytest.raises(ConfigError, match="optimiser is the old name of optimizer; give one"):
        build(TrainConfig, twice, [])
