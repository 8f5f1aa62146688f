"""The engine on a pretended CUDA device: the same results as on the CPU, and what they cost."""

import copy

import numpy as np
import pytest
import torch

from tests.support.planted import planted
from tests.support.pretended_device import DEVICE, NAME, pretended_device
from unet_core.config.presets import preset
from unet_core.images.preprocessing import Preprocessing
from unet_core.inference import engine as engine_module
from unet_core.inference.engine import Batch, Engine, choose_device
from unet_core.inference.postprocessing import Postprocessing
from unet_core.networks.header import Header, palette_of
from unet_core.networks.reach import tiling_of
from unet_core.networks.unet import UNet
from unet_core.tiling.tile_grid import TileGrid

CPU = torch.device("cpu")
POSTPROCESSING = [
    {},
    {"tta": "dihedral", "probabilities": "float16"},
    {"probabilities": "uint8"},
    {"tta": "flips", "blends": True},
]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they bring on tiles this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network_of(classes, name="padded"):
    torch.manual_seed(classes)
    spec = preset(name, in_channels=1, classes=classes, width=4, depth=2)
    names = tuple(f"class {i}" for i in range(max(2, classes)))
    wanted = Preprocessing(color="gray", normalization="range")
    header = Header(spec, tiling_of(spec), names, wanted, palette_of(len(names)))
    return UNet(spec).eval(), header


def batch_of(header, dtype="uint8", count=2, side=32):
    side = header.tiling.sides.at_least(side + 2 * header.tiling.margin)
    kept = side - 2 * header.tiling.margin
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (count, 1, side, side))
    return Batch(
        pixels.astype(dtype),
        np.zeros((count, 1), np.float32),
        np.full((count, 1), 1 / np.iinfo(dtype).max, np.float32),
        TileGrid(4096, header.tiling).over(kept, kept) * count,
        [None] * count,
    )


def segmented(device, classes=1, name="padded", module=engine_module, **options):
    """What a device gives for one batch."""
    options = {"dtype": "uint8", "precision": "float32", "blends": False, "count": 2, **options}
    dtype, precision, blends, count = map(options.pop, ("dtype", "precision", "blends", "count"))
    network, header = network_of(classes, name)
    how = Postprocessing(classes, **options)
    engine = module.Engine(copy.deepcopy(network), header, device, how, blends, precision)
    return engine.run(batch_of(header, dtype, count))


def is_equal(one, other):
    same = [
        (a is None and b is None) or np.array_equal(a, b)
        for a, b in ((one.mask_HW, other.mask_HW), (one.probabilities_KHW, other.probabilities_KHW))
    ]
    return all(same) and (one.confidence_sum, one.is_finite) == (
        other.confidence_sum,
        other.is_finite,
    )


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", POSTPROCESSING, ids=lambda how: " ".join(how) or "plain")
def test_every_option_gives_what_it_gives_on_the_cpu(classes, dtype, precision, how):
    options = {"dtype": dtype, "precision": precision, **how}
    want = segmented(CPU, classes, **options)
    with pretended_device():
        got = segmented(DEVICE, classes, **options)
    assert len(got) == len(want) == 2
    assert all(map(is_equal, got, want))


@pytest.mark.parametrize("name", ["paper", "bilinear"])
def test_every_kind_of_unet_gives_what_it_gives_on_the_cpu(name):
    want = segmented(CPU, 3, name, probabilities="float16")
    with pretended_device():
        got = segmented(DEVICE, 3, name, probabilities="float16")
    assert all(map(is_equal, got, want))


def test_the_device_is_found_and_named():
    _, header = network_of(1)
    with pretended_device():
        assert choose_device("auto").type == "cuda"
        network, _ = network_of(1)
        engine = Engine(network, header, choose_device("cuda"), Postprocessing(1))
        assert {p.device for p in engine.network.parameters()} == {DEVICE}
        compute = engine.probe(256, "auto")
    assert compute.device == NAME
    assert compute.batch_pixels > Engine(network_of(1)[0], header, CPU, Postprocessing(1)).probe(
        256, "auto"
    ).batch_pixels  # fmt: skip


@pytest.mark.parametrize("count", [1, 7])
def test_a_batch_waits_for_the_device_as_often_whatever_it_holds(count):
    with pretended_device() as traffic:
        network, header = network_of(3)
        engine = Engine(network, header, DEVICE, Postprocessing(3, probabilities="uint8"))
        traffic.clear()
        engine.run(batch_of(header, count=count))
        assert [crossing.shape[1:] for crossing in traffic.uploads] == [(1, 32, 32), (1,), (1,)]
        assert traffic.uploads[0].dtype == torch.uint8  # converted there
        assert [crossing.dtype for crossing in traffic.downloads] == [torch.uint8] * 2
        assert [crossing.function for crossing in traffic.syncs] == ["tolist"] * 2


@pytest.mark.parametrize(
    ("right", "wrong", "refusal"),
    [
        ("to_tensor(batch.tiles_NCHW, self.device).to(self.device)",
         "to_tensor(batch.tiles_NCHW, self.device)", RuntimeError),
        ("torch.from_numpy(batch.offset_NC).to(self.device)",
         "torch.from_numpy(batch.offset_NC)", RuntimeError),
        ("folded.to(device, self.dtype,", "folded.to(self.dtype,", RuntimeError),
        ("dtype=torch.bool, device=self.device)", "dtype=torch.bool)", RuntimeError),
        ("ids_NHW.to(kind).cpu().numpy()", "ids_NHW.to(kind).numpy()", TypeError),
        ("kind)).cpu().numpy()", "kind)).numpy()", TypeError),
    ],
    ids=["tiles", "offset", "network", "flags", "mask", "probabilities"],
)  # fmt: skip
def test_what_is_left_on_the_wrong_side_is_refused(right, wrong, refusal):
    module = planted(engine_module, right, wrong)
    segmented(CPU, module=module, probabilities="uint8")  # not seen there
    with pretended_device(), pytest.raises(refusal, match="cuda:0"):
        segmented(DEVICE, module=module, probabilities="uint8")


def test_a_wait_for_every_tile_is_counted():
    right = "torch.stack([confidence_NHW[at].sum() for at in kept]).tolist()"
    module = planted(engine_module, right, "[confidence_NHW[at].sum().item() for at in kept]")
    with pretended_device() as traffic:
        segmented(DEVICE, module=module, count=5)
        assert len([c for c in traffic.syncs if c.function == "item"]) == 5
