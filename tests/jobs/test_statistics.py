"""What normalization is measured on, from the config to the rows."""

import shutil

import numpy as np
import pytest

from jobs.job import prepare
from jobs.predict import predict
from tests.support.data import tiff, write_checkpoint
from tests.support.runs import config_of, table
from unet_core.config.presets import preset
from unet_core.errors import ConfigError, RunMismatchError
from unet_core.networks import checkpoint
from unet_core.runs.reader import open_run
from unet_core.synthetic import nuclei, png

EMPTY = (20 + np.random.default_rng(0).normal(0, 3, (160, 160))).astype(np.uint8)


@pytest.fixture
def plates(tmp_path):
    """Two plates of five wells, the second at half the exposure; a sixth well is empty."""
    for number, plate in enumerate(("a", "b")):
        folder = tmp_path / "plates" / plate
        folder.mkdir(parents=True)
        for well in range(5):
            pixels, _ = nuclei(160, 160, np.random.default_rng([7, well]))
            (folder / f"{well}.png").write_bytes(png(pixels // (1 + number)))
    (tmp_path / "plates" / "a" / "empty.png").write_bytes(png(EMPTY))
    return tmp_path / "plates"


def limits_of(run):
    return {
        row["image_id"]: (*row["normalization"]["low"], *row["normalization"]["high"])
        for row in table(run, "metrics")
    }


def run_with(plates, model, out, **keys):
    predict(config_of(plates, model, out, input=keys))
    return limits_of(out)


def test_groups_are_folders_and_the_dataset_is_all(plates, tiny_model, tmp_path):
    by_image = run_with(plates, tiny_model, tmp_path / "image")
    by_group = run_with(plates, tiny_model, tmp_path / "group", statistics="group")
    of_all = run_with(plates, tiny_model, tmp_path / "dataset", statistics="dataset")
    assert len(set(by_image.values())) > 5
    assert {name[0]: value for name, value in by_group.items()} == {
        "a": by_group["a/0.png"], "b": by_group["b/0.png"],
    }  # fmt: skip
    assert by_group["a/empty.png"] == by_group["a/0.png"]
    assert by_group["b/0.png"][1] < by_group["a/0.png"][1]
    assert len(set(of_all.values())) == 1
    identity = open_run(str(tmp_path / "group")).record.identity
    assert identity["input.statistics"] == "group"
    assert set(identity["input.limits"]) == {"a", "b"}


def test_a_resume_keeps_the_limits_whatever_the_images_are_now(plates, tiny_model, tmp_path):
    config = config_of(plates, tiny_model, tmp_path / "run",
                       input={"statistics": "dataset", "shard_images": 3})  # fmt: skip
    predict(config)
    before = limits_of(tmp_path / "run")
    (tmp_path / "run" / "_SUCCESS").unlink()
    for part in sorted((tmp_path / "run" / "metrics").iterdir())[:2]:
        part.unlink()
    predict(config)
    assert limits_of(tmp_path / "run") == before
    with pytest.raises(RunMismatchError, match=r"input\.statistics"):
        prepare(config.model_copy(update={"input": config.input.model_copy(
            update={"statistics": "image"})}))  # fmt: skip


def test_a_folder_that_came_later_fails_by_name(plates, tiny_model, tmp_path):
    errors = {"max_failed_images": 1.0}
    config = config_of(plates, tiny_model, tmp_path / "run",
                       input={"statistics": "group"}, errors=errors)  # fmt: skip
    predict(config)
    shutil.copytree(plates / "a", plates / "c")
    outcome = predict(config, refresh=True)
    assert outcome.totals.errors == {"statistics": 6}
    (message,) = {r["error_message"] for r in table(tmp_path / "run", "metrics") if r["error_code"]}
    assert "folder 'c' was not there" in message


def test_fixed_limits_are_used_for_every_image(plates, tiny_model, tmp_path):
    found = run_with(plates, tiny_model, tmp_path / "run", low=5, high=[200])
    assert set(found.values()) == {(5.0, 200.0)}


@pytest.mark.parametrize("dtypes", [("uint8", "uint16"), ("float32", "uint8")])
def test_values_of_different_types_have_no_common_limits(dtypes, tiny_model, tmp_path):
    for dtype in dtypes:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{dtype}.tif").write_bytes(tiff(EMPTY.astype(dtype)))
    config = config_of(tmp_path / "images", tiny_model, tmp_path / "run",
                       input={"statistics": "dataset"})  # fmt: skip
    with pytest.raises(ConfigError, match="values of different types"):
        predict(config)


def test_limits_of_floats_are_percentiles_of_all_values(tiny_model, tmp_path):
    images = [np.random.default_rng(n).normal(n, 1, (50, 60)).astype(np.float32) for n in range(4)]
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(images):
        (tmp_path / "images" / f"{number}.tif").write_bytes(tiff(pixels))
    found = run_with(tmp_path / "images", tiny_model, tmp_path / "run", statistics="dataset")
    values = np.sort(np.concatenate(images).ravel())
    low, high = (values[int(np.ceil(values.size * q / 100)) - 1] for q in (1, 99.8))
    ((used_low, used_high),) = set(found.values())
    assert (used_low, used_high) == (low, pytest.approx(high))


def test_builtins_are_guarded_and_others_are_not(plates, tiny_model, tmp_path):
    for model, kind in (("builtin:nuclei", "guarded"), (tiny_model, "image")):
        job = prepare(config_of(plates, model, tmp_path / kind))
        assert job.identity["input.statistics"] == kind
    outcome = predict(config_of(plates, "builtin:nuclei", tmp_path / "run"))
    assert outcome.totals.extrapolated == 1
    rows = {row["image_id"]: row for row in table(tmp_path / "run", "metrics")}
    assert [name for name, row in rows.items() if row["is_extrapolated"]] == ["a/empty.png"]
    assert rows["a/empty.png"]["class_pixels"][1] == 0
    assert rows["a/0.png"]["class_pixels"][1] > 0


def test_what_a_checkpoint_cannot_use_is_refused(plates, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="does not tell how far"):
        prepare(config_of(plates, tiny_model, tmp_path / "x", input={"statistics": "guarded"}))
    fixed = {}
    for kind in ("range", "zscore"):
        spec = preset("padded", in_channels=1, classes=1, width=4)
        path = write_checkpoint(tmp_path / f"{kind}.safetensors", spec)
        network, header = checkpoint.load(path)
        changed = header.preprocessing.model_copy(update={"normalization": kind})
        data = checkpoint.serialize(network, header.__class__(
            **{**vars(header), "preprocessing": changed}))  # fmt: skip
        (tmp_path / f"{kind}.safetensors").write_bytes(data)
        fixed[kind] = path
    with pytest.raises(ConfigError, match="normalizes all images alike"):
        prepare(config_of(plates, fixed["range"], tmp_path / "x", input={"statistics": "dataset"}))
    with pytest.raises(ConfigError, match="mean and deviation"):
        prepare(config_of(plates, fixed["zscore"], tmp_path / "x", input={"low": 0, "high": 9}))
    with pytest.raises(ConfigError, match="one for each channel"):
        prepare(config_of(plates, tiny_model, tmp_path / "x", input={"low": [0, 1], "high": 9}))
    predict(config_of(plates, fixed["zscore"], tmp_path / "moments"))
    (row, *_) = table(tmp_path / "moments", "metrics")
    assert row["normalization"]["low"] is None
    assert row["normalization"]["std"][0] > 0


def test_images_that_cannot_be_read_are_left_out_of_the_sample(plates, tiny_model, tmp_path):
    errors = {"max_failed_images": 1.0}
    before = run_with(plates, tiny_model, tmp_path / "before", statistics="dataset")
    (plates / "a" / "damaged.png").write_bytes(b"not an image")
    predict(config_of(plates, tiny_model, tmp_path / "run", input={"statistics": "dataset"},
                      errors=errors))  # fmt: skip
    rows = {row["image_id"]: row for row in table(tmp_path / "run", "metrics")}
    assert rows["a/damaged.png"]["error_code"] == "decode"
    assert rows["a/0.png"]["normalization"]["high"] == [before["a/0.png"][1]]
    for path in plates.rglob("*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(ConfigError, match=r"none of 12 sampled images can be read; [ab]/"):
        predict(config_of(plates, tiny_model, tmp_path / "none", input={"statistics": "dataset"}))
