"""Every network through the whole job: presets, other people's, exact, blended and averaged."""

import numpy as np
import pytest

from jobs.predict import predict
from tests.reference.whole_image import logits_of
from tests.support.data import digests, pictures, write_checkpoint
from tests.support.runs import masks_of, table
from unet_core import open_run
from unet_core.config.presets import PRESETS, Factory, preset
from unet_core.errors import CheckpointError, ConfigError, RunMismatchError
from unet_core.networks import checkpoint
from unet_core.synthetic import png

pytestmark = pytest.mark.slow
FOREIGN = {
    "basic_unet": Factory(
        "monai.networks.nets:BasicUNet",
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "norm": "batch",
         "features": [4, 4, 8, 8, 16, 4]},
        1, 2,
    ),
    "instance_norm": Factory(
        "monai.networks.nets:BasicUNet",
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 2,
         "features": [4, 4, 8, 8, 16, 4]},
        1, 2,
    ),
    "small": Factory("tests.support.foreign:small", {"in_channels": 1, "classes": 2}, 1, 2),
}  # fmt: skip


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """One of each preset, and of each foreign network."""
    folder = tmp_path_factory.mktemp("checkpoints")
    specs = {name: preset(name, in_channels=1, classes=2, width=3) for name in PRESETS}
    return {
        name: (write_checkpoint(folder / f"{name}.safetensors", spec), spec)
        for name, spec in (specs | FOREIGN).items()
    }


def config_of(make_config, checkpoints, name, *overrides, **options):
    path, spec = checkpoints[name]
    factory = spec.factory if isinstance(spec, Factory) else ""
    model = {"checkpoint": path, "factory": factory}
    return make_config(*overrides, model=model, tile={"size": "auto"}, **options)


@pytest.mark.parametrize("name", [*PRESETS, *FOREIGN])
def test_every_network_segments_as_a_pass_over_the_whole_image(
    make_config, checkpoints, tmp_path, name
):
    network, header = checkpoint.load(checkpoints[name][0], factory=getattr(
        checkpoints[name][1], "factory", ""))  # fmt: skip
    smallest = max(16, header.tiling.smallest_tile)
    cut = (f"tile.size={smallest}",) if header.tiling.is_exact else ()
    predict(config_of(make_config, checkpoints, name, *cut))
    masks, seen = masks_of(tmp_path / "run"), set()
    for key, image, _ in pictures():
        mask_HW = masks[next(i for i in masks if i.endswith(key))]
        logits_KHW = logits_of(network, header, png(image))
        clear_HW = np.abs(logits_KHW[1] - logits_KHW[0]) > 1e-4
        assert (logits_KHW.argmax(0) == mask_HW)[clear_HW].all()
        seen |= set(np.unique(mask_HW))
    assert header.tiling.is_exact == (name not in ("bilinear", "dilated", "instance_norm"))
    assert seen == {0, 1}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["paper", "dilated", "basic_unet"])
def test_every_network_gives_the_same_parts_on_ray(make_config, checkpoints, tmp_path, name):
    predict(config_of(make_config, checkpoints, name, out="inline"))
    workers = {"count": 2, "gpus": 1, "cpus": 1}
    predict(config_of(make_config, checkpoints, name, out="ray", workers=workers,
                      storage={"shared": True}))  # fmt: skip
    assert digests(tmp_path / "inline") == digests(tmp_path / "ray")


def test_a_checkpoint_runs_no_function_that_the_user_did_not_name(make_config, checkpoints):
    path, _ = checkpoints["small"]
    with pytest.raises(CheckpointError, match=r"model\.factory = 'tests\.support\.foreign:small'"):
        predict(make_config(model={"checkpoint": path}))
    with pytest.raises(CheckpointError, match=r"now it is 'os:system'"):
        predict(make_config(model={"checkpoint": path, "factory": "os:system"}))
    with pytest.raises(CheckpointError, match="is a U-Net of presets"):
        predict(make_config("model.factory=os:system"))


@pytest.mark.parametrize("tta", ["flips", "dihedral"])
def test_averaged_masks_do_not_depend_on_the_tile_size(make_config, tmp_path, tta):
    for size in (208, 400):
        predict(make_config(f"tile.size={size}", f"tile.tta={tta}", out=f"run{size}"))
    small, large = masks_of(tmp_path / "run208"), masks_of(tmp_path / "run400")
    assert all((small[image_id] == large[image_id]).all() for image_id in large)
    plain = make_config("tile.size=400", out="run400")
    with pytest.raises(RunMismatchError, match=r"tile\.tta"):
        predict(plain)


def test_blending_is_what_the_user_asked_for(make_config, tmp_path):
    predict(make_config("tile.mode=blend", "tile.size=208", out="blend"))
    predict(make_config("tile.size=208", out="exact"))
    blended, exact = masks_of(tmp_path / "blend"), masks_of(tmp_path / "exact")
    different = {i for i in exact if (blended[i] != exact[i]).any()}
    assert {i.rpartition("/")[2] for i in different} <= {"cell04", "cell10"}  # the tiled ones
    rows = {row["image_id"]: row for row in table(tmp_path / "blend", "metrics")}
    for image_id, mask_HW in blended.items():
        assert rows[image_id]["class_pixels"] == np.bincount(mask_HW.ravel(), minlength=2).tolist()


@pytest.mark.parametrize("mode", ["exact", "blend"])
@pytest.mark.parametrize("kind", ["uint8", "float16"])
def test_probabilities_lie_beside_the_masks(make_config, checkpoints, tmp_path, mode, kind):
    overrides = (f"output.probabilities={kind}", f"tile.mode={mode}")
    predict(config_of(make_config, checkpoints, "padded", *overrides))
    for row in table(tmp_path / "run", "masks"):
        shape = (row["height"], row["width"])
        p_KHW = np.frombuffer(row["probabilities"], kind).reshape(2, *shape).astype(np.float32)
        p_KHW /= 255 if kind == "uint8" else 1
        assert np.abs(p_KHW.sum(0) - 1).max() < 0.01
        mask_HW = np.frombuffer(row["mask"], np.uint8).reshape(shape)
        clear_HW = np.abs(p_KHW[1] - p_KHW[0]) > 0.01
        assert (p_KHW.argmax(0) == mask_HW)[clear_HW].all()


def test_masks_are_read_back_by_image_and_window(make_config, tmp_path):
    predict(make_config("output.encoding=png"))
    run = str(tmp_path / "run")
    for image_id, mask_HW in masks_of(tmp_path / "run").items():
        assert (open_run(run).mask(image_id) == mask_HW).all()
        assert (open_run(run).mask(image_id, (3, 5, 20, 17)) == mask_HW[3:23, 5:22]).all()
    with pytest.raises(ValueError, match="leaves the image of 64 × 64"):
        open_run(run).mask("shard-0.tar/cell00", (50, 0, 20, 20))
    with pytest.raises(Exception, match="has no image nowhere among the 12 of"):
        open_run(run).mask("nowhere")


def test_illegal_sizes_are_refused_with_their_neighbours(make_config, checkpoints):
    with pytest.raises(ConfigError, match="300 and 316 are possible"):
        predict(config_of(make_config, checkpoints, "paper", "tile.size=310"))


def test_another_version_of_the_factorys_code_is_another_run(
    make_config, checkpoints, tmp_path, monkeypatch
):
    config = config_of(make_config, checkpoints, "small")
    predict(config)
    (tmp_path / "run" / "_SUCCESS").unlink()
    next((tmp_path / "run" / "metrics").glob("*")).unlink()
    monkeypatch.setattr("unet_core.inference.engine.origin", lambda _: "another")
    with pytest.raises(RunMismatchError, match=r"compute\.versions: .*model\.factory"):
        predict(config)
