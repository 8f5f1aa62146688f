from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from unet_core.config.presets import preset
from unet_core.errors import ConfigError, RunMismatchError, WorkersError
from unet_core.images.preprocessing import Preprocessing
from unet_core.inference.engine import (
    Batch,
    Engine,
    choose_device,
    memory_format,
    to_tensor,
)
from unet_core.inference.postprocessing import Postprocessing
from unet_core.networks.header import Header, palette_of
from unet_core.networks.reach import tiling_of
from unet_core.networks.unet import UNet
from unet_core.runs.schema import CONFIDENCE_UNIT
from unet_core.tiling.tile_grid import TileGrid


def make_engine(classes=1, width=8, precision="float32", **postprocessing):
    torch.manual_seed(classes)
    spec = preset("padded", in_channels=1, classes=classes, width=width)
    names = tuple(f"class {i}" for i in range(max(2, classes)))
    wanted = Preprocessing(color="gray", normalization="range")
    header = Header(spec, tiling_of(spec), names, wanted, palette_of(len(names)))
    return Engine(
        UNet(spec),
        header,
        torch.device("cpu"),
        Postprocessing(classes, **postprocessing),
        precision=precision,
    )


def make_batch(count=2, height=96, width=144):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, height, width), dtype=np.uint8)
    return Batch(
        pixels,
        np.zeros((count, 1), np.float32),
        np.full((count, 1), 1 / 255, np.float32),
        TileGrid(1024, tiling_of(preset("padded"))).over(height, width) * count,
        [None] * count,
    )


@pytest.mark.parametrize(("classes", "width"), [(1, 12), (3, 24)])
def test_the_bits_do_not_depend_on_the_number_of_cores(classes, width):
    engine, batch, before = (
        make_engine(classes, width=width),
        make_batch(1),
        torch.get_num_threads(),
    )
    seen = set()
    for cores in (1, 2, 8):
        engine.share_cores(cores, 2048)
        with ThreadPoolExecutor(engine.lanes) as lanes:
            for results in lanes.map(engine.run, [batch] * engine.lanes):
                seen.add(tuple((r.mask_HW.tobytes(), r.confidence_sum) for r in results))
    torch.set_num_threads(before)
    assert len(seen) == 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_differs_near_borders_only_and_is_told(precision):
    batch = make_batch(1, 64, 64)
    whole = make_engine(probabilities="float16")
    half = make_engine(probabilities="float16", precision=precision)
    assert half.probe(64, 1).precision == precision
    (before,), (after,) = whole.run(batch), half.run(batch)
    differs_HW = before.mask_HW != after.mask_HW
    assert differs_HW.mean() < 0.02
    assert abs(before.probabilities_KHW[0].astype(float) - 0.5)[differs_HW].max(initial=0) < 0.02
    assert (before.probabilities_KHW != after.probabilities_KHW).any()


def test_the_threshold_decides_one_logit_models_and_confidence_is_that_of_the_choice():
    batch = make_batch(1, 32, 32)
    low, high = (make_engine(threshold=t).run(batch)[0] for t in (0.001, 0.999))
    assert low.mask_HW.all()
    assert not high.mask_HW.any()
    pixels = 32 * 32
    assert low.confidence_sum + high.confidence_sum == pytest.approx(
        CONFIDENCE_UNIT * pixels, abs=pixels
    )


def test_a_device_that_is_not_there_is_refused_with_those_that_are():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"got 'cuda', available here: .*cpu"):
        choose_device("cuda")


def test_another_device_or_version_is_refused_by_name():
    compute = make_engine().probe(1024, "auto")
    compute.require(compute)
    other = compute.model_copy(update={"device": "NVIDIA H200"})
    with pytest.raises(RunMismatchError, match=r"compute\.device: the run has NVIDIA H200"):
        other.require(compute)


def test_batches_hold_a_number_of_pixels():
    compute = make_engine().probe(512, 2)
    assert compute.batch_of(512, 512) == 2
    assert compute.batch_of(256, 256) == 8
    assert compute.batch_of(2048, 2048) == 1


@pytest.mark.parametrize("tta", ["flips", "dihedral"])
def test_a_mean_over_symmetries_does_not_care_how_the_image_lies(tta):
    batch = make_batch(1, 96, 96)
    engine = make_engine(3, tta=tta, probabilities="float16")
    upright = engine.run(batch)[0]
    for turn in ([-1], [-2], [-1, -2]):
        turned = replace(batch, tiles_NCHW=np.flip(batch.tiles_NCHW, turn).copy())
        back = np.flip(engine.run(turned)[0].probabilities_KHW, turn)
        assert np.abs(back - upright.probabilities_KHW).max() <= 1e-3
    if tta == "dihedral":
        turned = replace(batch, tiles_NCHW=batch.tiles_NCHW.swapaxes(2, 3).copy())
        back = engine.run(turned)[0].probabilities_KHW.swapaxes(1, 2)
        assert np.abs(back - upright.probabilities_KHW).max() <= 1e-3
    plain = make_engine(3, probabilities="float16").run(batch)[0]
    assert np.abs(plain.probabilities_KHW - upright.probabilities_KHW).max() > 1e-3


def test_probabilities_are_those_that_decide():
    batch = make_batch(2, 32, 48)
    for result in make_engine(3, probabilities="uint8").run(batch):
        assert result.probabilities_KHW.shape == (3, 32, 48)
        assert result.probabilities_KHW.dtype == np.uint8
        top = result.probabilities_KHW.max(0)
        chosen = np.take_along_axis(result.probabilities_KHW, result.mask_HW[None].astype(int), 0)
        assert (chosen[0] == top).all()
        assert result.confidence_sum / 65535 == pytest.approx(top.sum() / 255, rel=0.01)


class Narrow(torch.nn.Module):
    """A network on a device that holds only so many tiles."""

    def __init__(self, network, most):
        super().__init__()
        self.network, self.most, self.tried = network, most, []

    def forward(self, x_NCHW):
        self.tried.append(len(x_NCHW))
        if len(x_NCHW) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.network(x_NCHW)


def test_a_batch_that_does_not_fit_is_split_and_the_size_remembered():
    engine, batch = make_engine(), make_batch(7, 32, 32)
    whole = engine.run(batch)
    engine.network = Narrow(engine.network, most=2)
    split = engine.run(batch)
    assert [r.mask_HW.tobytes() for r in split] == [r.mask_HW.tobytes() for r in whole]
    assert engine.network.tried[0] == 7
    engine.network.tried.clear()
    engine.run(batch)
    assert max(engine.network.tried) <= 2
    engine.network = Narrow(engine.network, most=0)
    with pytest.raises(WorkersError, match=r"single tile of 32 × 32 pixels; lower tile\.size"):
        engine.run(batch)


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_apples_gpus_get_what_they_take(kind):
    device, is_apple = torch.device(kind), kind == "mps"
    wide, values = np.array([0, 65535], np.uint16), np.array([0, 255], np.uint8)
    assert to_tensor(wide, device).dtype == (torch.float32 if is_apple else torch.uint16)
    assert to_tensor(wide, device).tolist() == [0, 65535]
    assert to_tensor(values, device).dtype == torch.uint8
    assert (memory_format(device) == torch.channels_last) == (not is_apple)
