from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from unet_core.checkpoint import Header, palette_of
from unet_core.engine import CONFIDENCE_UNIT, Batch, Engine, choose_device
from unet_core.errors import ConfigError, RunMismatchError
from unet_core.geometry import tiles
from unet_core.preprocessing import Preprocessing
from unet_core.presets import preset
from unet_core.unet import UNet


def make_engine(classes=1, threshold=0.5, width=8):
    torch.manual_seed(classes)
    spec = preset("padded", in_channels=1, classes=classes, width=width)
    names = tuple(f"class {i}" for i in range(max(2, classes)))
    wanted = Preprocessing(color="gray", normalisation="range")
    header = Header(spec, names, wanted, palette_of(len(names)))
    return Engine(UNet(spec), header, torch.device("cpu"), threshold)


def make_batch(count=2, height=96, width=144):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, height, width), dtype=np.uint8)
    return Batch(
        pixels,
        np.zeros((count, 1), np.float32),
        np.full((count, 1), 1 / 255, np.float32),
        tiles(height, width, 1024, 112, 16) * count,
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
