import io
import pickle
import resource
import zipfile
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.reference.published_unets import (
    DeepResearch,
    Dilated,
    DoubleConv,
    FromScratch,
    Jvanvugt,
    Nikhilroxtomar,
    concat,
    milesial,
    randomised,
)  # fmt: skip
from tests.support.foreign import small
from unet_core.config.import_weights import ImportConfig
from unet_core.config.loading import build
from unet_core.config.presets import UNetSpec
from unet_core.errors import CheckpointError, ConfigError, NotFoundError
from unet_core.networks import checkpoint
from unet_core.networks.foreign.layouts import LAYOUTS
from unet_core.networks.foreign.weights import convert, import_weights, read_tensors, recognise
from unet_core.networks.unet import UNet


@dataclass(frozen=True)
class Source:
    """A published network: the name of its layout, and its row in the table."""

    layout: str
    make: Any
    parameters: int
    sizes: tuple[int, int] = (3, 1)
    """Channels and classes for which the number of parameters is given."""
    sides: list[tuple[int, int]] = field(default_factory=lambda: [(16, 32), (48, 32)])
    needs_layout: bool = False
    depth: int = 4

    def __str__(self):
        return self.layout


ANY = [(16, 16), (17, 31), (45, 50)]
VALID = [(188, 204)]
SOURCES = [
    Source("nikhilroxtomar", Nikhilroxtomar, 31_043_521),
    Source("double_conv-bilinear", partial(DoubleConv, up="conv"), 28_954_561, sides=ANY),
    Source("double_conv-transpose", DoubleConv, 31_043_521, sides=ANY),
    Source("early-pytorch-unet", partial(DoubleConv, up="none"), 13_395_329, sides=ANY),
    Source("milesial", milesial, 31_037_698, (3, 2), ANY),
    Source("milesial-bilinear", partial(milesial, up="none", wide=True), 17_263_042, (3, 2), ANY),
    Source("deepresearch", DeepResearch, 8_563_078, (1, 2), [(92, 100), (108, 92)], depth=3),
    Source("dilated", Dilated, 31_031_810, (3, 2), [(233, 240), (236, 233)]),
    Source("concat-crop", partial(concat, padding=0, join="crop"), 31_044_106, (3, 10), VALID,
           needs_layout=True),
    Source("concat-pad", partial(concat, padding=0, join="pad"), 31_044_106, (3, 10),
           [(140, 140), (141, 151)], needs_layout=True),
    Source("concat-same", partial(concat, join="equal"), 31_044_106, (3, 10), needs_layout=True),
    Source("plain", FromScratch, 31_032_330, (3, 10)),
    Source("jvanvugt-valid", Jvanvugt, 31_030_658, (1, 2), VALID, needs_layout=True),
    Source("jvanvugt-padded", partial(Jvanvugt, padding=1), 31_030_658, (1, 2), needs_layout=True),
    Source("jvanvugt-valid", partial(Jvanvugt, norm="after"), 31_042_434, (1, 2), VALID,
           needs_layout=True),
    Source("jvanvugt-padded", partial(Jvanvugt, norm="after", padding=1), 31_042_434, (1, 2),
           needs_layout=True),
]  # fmt: skip
each_source = pytest.mark.parametrize("source", SOURCES, ids=str)


@pytest.fixture
def bring(tmp_path):
    """Import a file, or an object after saving it; return the network and its header."""

    def bring(what, *overrides, **model):
        path = what if isinstance(what, str) else str(tmp_path / "theirs.pth")
        if not isinstance(what, str):
            torch.save(what, path)
        table = {"source": path, "destination": str(tmp_path / "ours.safetensors"), "model": model}
        header = import_weights(build(ImportConfig, table, list(overrides)))
        network, read = checkpoint.load(table["destination"], factory=model.get("factory", ""))
        assert header.network == read.network
        assert header.tiling == read.tiling
        return network, read

    return bring


@pytest.fixture
def nothing_is_written(tmp_path):
    yield
    assert not [p for p in tmp_path.iterdir() if "ours" in p.name]


@torch.inference_mode()
def assert_same_logits(ours, theirs, channels, sides):
    for height, width in sides:
        x_NCHW = torch.rand(2, channels, height, width)
        torch.testing.assert_close(ours(x_NCHW), theirs(x_NCHW), atol=1e-4, rtol=1e-4)


def tiny(**options):
    return randomised(milesial(1, 2, 4, 2, **options))


@each_source
def test_the_twin_and_what_is_recognised_have_the_published_parameters(source):
    with torch.device("meta"):
        twin = source.make(*source.sizes, 64)
        _, spec = recognise(twin.state_dict(), source.layout)
        ours = UNet(replace(spec, init="torch"))
    counts = [sum(p.numel() for p in network.parameters()) for network in (twin, ours)]
    assert counts == [source.parameters] * 2
    assert (spec.in_channels, spec.classes) == source.sizes
    assert (spec.width, spec.depth) == (64, source.depth)


@each_source
def test_recognised_weights_give_the_logits_of_their_network(source, tmp_path):
    channels, classes = source.sizes
    theirs = randomised(source.make(channels, classes, 4))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    tensors = read_tensors(str(tmp_path / "theirs.pth"))
    layout, spec = recognise(tensors, source.layout if source.needs_layout else "")
    ours = UNet(spec).eval()
    ours.load_state_dict(convert(tensors, layout, spec))
    assert layout.name == source.layout
    assert all(height in spec.sides and width in spec.sides for height, width in source.sides)
    assert_same_logits(ours, theirs, channels, source.sides)


@each_source
def test_imported_weights_give_the_logits_of_their_network(source, bring):
    theirs = randomised(source.make(5, 3, 2, 2))
    ours, header = bring(theirs.state_dict(), layout=source.layout)
    spec, sides = header.network, header.tiling.sides
    assert (spec.depth, spec.width, spec.in_channels, spec.classes) == (2, 2, 5, 3)
    assert header.preprocessing.color == 5
    assert_same_logits(ours, theirs, 5, [(sides.smallest, sides.at_least(sides.smallest + 1))])


@pytest.mark.parametrize("depth", [1, 6, 8])
@each_source
def test_depth_is_read_off_the_weights(source, depth):
    with torch.device("meta"):
        weights = source.make(1, 2, 1, depth).state_dict()
    layout, spec = recognise(weights, source.layout)
    assert (layout.name, spec.depth, spec.width) == (source.layout, depth, 1)
    names = layout.names(depth, spec.bias)
    with torch.device("meta"):
        ours = UNet(replace(spec, init="torch")).state_dict()
    wanted = {k: v.shape for k, v in ours.items() if k in names}
    assert wanted == {mine: weights[theirs].shape for mine, theirs in names.items()}


def test_convolutions_have_a_bias_if_their_weights_come_with_one(bring):
    theirs = tiny(bias=True)
    ours, header = bring(theirs.state_dict())
    assert header.network.bias
    assert_same_logits(ours, theirs, 1, ANY)


def test_every_layout_is_tried_here():
    assert {source.layout for source in SOURCES} == {layout.name for layout in LAYOUTS}
    shared = {layout.name: [] for layout in LAYOUTS}
    for layout in LAYOUTS:
        shared[layout.name].append(layout.spec)
    assert all(len(set(specs)) == len(specs) for specs in shared.values())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda weights: {"model": weights},
        lambda weights: {"model_state_dict": {"state_dict": weights}},
        lambda weights: {f"module.{k}": v for k, v in weights.items()},
        lambda weights: {f"_orig_mod.module.module.{k}": v for k, v in weights.items()},
        lambda weights: {**{f"module.{k}": v for k, v in weights.items()}, "mask_values": [0, 1]},
        lambda weights: {**weights, "mask_values": [0, 255]},
        lambda weights: {k: v for k, v in weights.items() if "num_batches" not in k},
        lambda weights: {k: nn.Parameter(v, v.is_floating_point()) for k, v in weights.items()},
    ],
)  # fmt: skip
def test_what_training_wraps_around_the_weights_is_taken_off(wrap, bring):
    theirs = tiny()
    ours, _ = bring(wrap(theirs.state_dict()))
    assert_same_logits(ours, theirs, 1, ANY)


@pytest.mark.parametrize("kind", ["safetensors", "legacy"])
def test_the_content_of_a_file_tells_what_it_is(kind, bring, tmp_path):
    theirs, path = tiny(), tmp_path / "theirs.bin"
    if kind == "safetensors":
        safetensors.torch.save_file(theirs.state_dict(), path)
    else:
        torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=False)
    ours, _ = bring(str(path))
    assert_same_logits(ours, theirs, 1, ANY)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype, bring):
    theirs = tiny().to(dtype)
    ours, _ = bring(theirs.state_dict())
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert_same_logits(ours, theirs.float(), 1, ANY)


@pytest.mark.parametrize(
    ("logits", "classes", "names"),
    [
        (1, [], ("background", "foreground")),
        (2, [], ("background", "foreground")),
        (3, [], ("background", "class 1", "class 2")),
        (3, ["sky", "tree", "road"], ("sky", "tree", "road")),
    ],
)
def test_classes_have_names(logits, classes, names, bring):
    _, header = bring(milesial(3, logits, 2, 1).state_dict(), classes=classes)
    assert header.class_names == names
    assert header.preprocessing.color == "rgb"
    assert (header.preprocessing.normalization, header.preprocessing.low) == ("range", None)


def test_the_normalization_of_imagenet_is_kept(bring):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    weights = milesial(3, 1, 2, 1).state_dict()
    _, header = bring(weights, normalization="standard", mean=mean, std=std)
    assert (header.preprocessing.mean, header.preprocessing.std) == (mean, std)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"normalization": "standard", "mean": 0.5}, "mean and std to standard, which needs both"),
        ({"mean": [0.5, 0.5], "std": 1, "normalization": "standard"}, "one for each channel"),
        ({"classes": ["a", "b", "c"]}, "model.classes: got 3 names, but the network has 2"),
        ({"color": "rgb"}, "model.color: rgb images have 3 channels, but the network takes 1"),
        ({"color": 2}, "model.color: 2 images have 2 channels, but the network takes 1"),
        ({"layout": "milesia"}, r"model.layout: got 'milesia', allowed: nikhilroxtomar, double_"),
        ({"factory": "a:b", "color": "gray", "layout": "milesial"}, "exclude each other"),
        ({"factory": "a:b"}, "give model.color"),
        ({"stride": 4}, "belong to a factory"),
    ],
)
@pytest.mark.usefixtures("nothing_is_written")
def test_a_config_that_does_not_fit_is_refused(model, reason, bring):
    with pytest.raises(ConfigError, match=reason):
        bring(tiny().state_dict(), **model)


def test_a_checkpoint_that_is_there_already_is_kept(bring, tmp_path):
    (tmp_path / "ours.safetensors").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"ours.safetensors exists already; remove it, or give"):
        bring(tiny().state_dict())
    assert (tmp_path / "ours.safetensors").read_bytes() == b"precious"


def test_a_checkpoint_ends_with_safetensors(tmp_path):
    with pytest.raises(ConfigError, match=r"destination: got .x\.pth., but checkpoints end with"):
        build(ImportConfig, {"source": "a.pth", "destination": "x.pth"}, [])


def without(key):
    weights = tiny().state_dict()
    del weights[key]
    return weights


def with_(key, value):
    return {**tiny().state_dict(), key: value}


LAST = "outc.conv.weight"


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (without(LAST), r"nearest is milesial with 2 pools: missing outc\.conv\.weight; give"),
        (with_("extra.weight", torch.ones(1)), r"2 pools: unexpected extra\.weight; give model\."),
        (without("inc.double_conv.1.bias"), r"missing inc\.double_conv\.1\.bias"),
        (with_(LAST, torch.ones(2, 8, 1, 1)), r"outc\.conv\.weight has the shape \[2, 8, 1, 1\], "
         r"but its network needs \[2, 4, 1, 1\]"),
        (with_(LAST, torch.ones(2)), r"outc\.conv\.weight has the shape \[2\], which is none of"),
        (with_("inc.double_conv.0.weight", torch.ones(0, 1, 3, 3)), r"shape \[0, 1, 3, 3\]"),
        (with_("up1.up.bias", torch.full((8,), torch.nan)), r"up1\.up\.bias holds NaN or inf"),
        (with_("up1.up.bias", torch.full((8,), torch.inf)), r"up1\.up\.bias holds NaN or inf"),
        (with_("up1.up.bias", torch.ones(8).double() * 1e300), r"up1\.up\.bias holds"),
        (with_("up1.up.bias", torch.ones(8).to_sparse()), r"up1\.up\.bias is a torch\.sparse"),
        (with_("up1.up.bias", torch.ones(8, device="meta")), r"up1\.up\.bias is a .* on meta"),
        (with_("up1.up.bias", torch.ones(8).cfloat()), r"up1\.up\.bias is a .* torch\.complex64"),
        (with_("up1.up.bias", torch.ones(1).expand(10**9)), r"claims the shape \[1000000000\]"),
        (with_("up1.up.bias", torch.ones(8, dtype=torch.int8)), "bias holds torch.int8, but its"),
        (with_("epoch", 3), "epoch is int, not a tensor"),
        (with_(3, torch.ones(1)), "3 is Tensor, not a tensor with a name"),
        ({}, "holds no tensors"),
        ({"mask_values": [0]}, "holds no tensors"),
        ([torch.ones(1)], "holds list, not a state_dict"),
        ({"state_dict": 5}, "holds int, not a state_dict"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("nothing_is_written")
def test_weights_that_do_not_fit_are_refused_by_name(weights, reason, bring):
    with pytest.raises(CheckpointError, match=rf"theirs\.pth: .*{reason}"):
        bring(weights)


@pytest.mark.usefixtures("nothing_is_written")
def test_long_differences_are_cut_short(bring):
    weights = tiny().state_dict()
    weights |= {f"head{n}.weight": torch.ones(1) for n in range(9)}
    with pytest.raises(CheckpointError, match=r"unexpected head0\S+ head1\S+ head2\S+ and 6 more;"):
        bring(weights)
    with pytest.raises(CheckpointError, match="the nearest is plain with"):
        bring(tiny().state_dict(), layout="plain")


@pytest.mark.usefixtures("nothing_is_written")
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (partial(concat, padding=0), "concat-crop, concat-pad, concat-same"),
        (partial(Jvanvugt, norm="after"), "jvanvugt-padded, jvanvugt-valid"),
    ],
)
def test_keys_of_several_networks_ask_which(make, names, bring):
    with pytest.raises(CheckpointError, match=f"say which with --layout: {names}$"):
        bring(make(1, 2, 2, 2).state_dict())


class Loud:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("run!",)


def saved(what, is_zip=True):
    buffer = io.BytesIO()
    torch.save(what, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


PLAIN = saved(tiny().state_dict())
OLD = saved(tiny().state_dict(), is_zip=False)
SAFE = safetensors.torch.save(tiny().state_dict())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (saved(tiny()), r"holds .*DoubleConv.* instead of tensors.*save\(model\.state_dict\(\), p"),
        (saved({"state_dict": tiny().state_dict(), "x": Loud()}), "holds .*print instead of"),
        (pickle.dumps(Loud(), protocol=2), "holds objects of Python, or damage, instead"),
        (PLAIN[:-100], "damaged, or no state_dict"),
        (PLAIN[: len(PLAIN) // 2], "damaged, or no state_dict"),
        (OLD[:-9], "damaged, or no state_dict"),
        (SAFE[:-9], "a damaged safetensors file"),
        (SAFE[:50], "a damaged safetensors file"),
        (SAFE[:8], "neither safetensors nor a file that torch.save wrote"),
        (b"", "neither safetensors nor a file that torch.save wrote"),
        (b"epoch,loss\n1,0.5\n", "neither safetensors nor a file that torch.save wrote"),
        (b'{"a": {"b": 1}}', "neither safetensors nor a file"),
        (b'12345678{"a": 1}', "a damaged safetensors file"),
        (b"PK\x03\x04", "damaged, or no state_dict"),
        (b"\x80\x02", "damaged, or no state_dict"),
    ],
)
@pytest.mark.usefixtures("nothing_is_written")
def test_files_that_hold_no_weights_are_refused_in_a_sentence(
    data, reason, bring, tmp_path, capsys
):
    path = tmp_path / "theirs.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"theirs\.pth: {reason}") as caught:
        bring(str(path))
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert "run!" not in capsys.readouterr().out


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(NotFoundError, match="theirs"):
        read_tensors(str(tmp_path / "theirs.pth"))


FACTORY = {"factory": "tests.support.foreign:small", "color": "gray"}


@pytest.mark.parametrize("stride", ["auto", 2])
def test_a_factory_brings_any_network(stride, bring):
    theirs = randomised(small(1, 3))
    ours, header = bring(
        theirs.state_dict(), **FACTORY, arguments={"classes": 3}, stride=stride
    )  # fmt: skip
    assert (header.network.in_channels, header.network.classes) == (1, 3)
    assert header.network.arguments == {"classes": 3}
    assert header.class_names == ("background", "class 1", "class 2")
    assert (header.tiling.stride, header.tiling.is_exact) == (2, True)
    assert_same_logits(ours, theirs, 1, [(16, 18)])


@pytest.mark.usefixtures("nothing_is_written")
def test_weights_that_are_not_those_of_the_factory_are_refused(bring):
    weights = small().state_dict()
    other = {**weights, "3.weight": torch.ones(1)}
    del other["0.bias"]
    with pytest.raises(CheckpointError, match=r"theirs\.pth: .* missing 0\.bias, unexpected 3\.w"):
        bring(other, **FACTORY)
    with pytest.raises(CheckpointError, match=r"2\.weight has the shape \[4, 1, 2, 2\].*\[4, 5,"):
        bring(weights, **FACTORY, arguments={"classes": 5})
    with pytest.raises(CheckpointError, match=r"tests\.support\.foreign:not_a_network gave"):
        bring(weights, factory="tests.support.foreign:not_a_network", color="gray")


def test_the_spec_of_milesial_is_the_one_that_was_verified():
    assert recognise(tiny().state_dict())[1] == UNetSpec(
        in_channels=1, classes=2, width=4, depth=2, bias=False, join="pad", concat="skip_decoder"
    )


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="bytes that claim to hold 10000000; save it again"):
        read_tensors(str(path))
    wide = {key: tensor[:1] for key, tensor in FromScratch(3, 10, 2).state_dict().items()}
    wide["down_convolution_1.0.weight"] = torch.zeros(4000, 3, 3, 3)
    torch.save(wide, tmp_path / "wide.pth")
    config = {"source": str(tmp_path / "wide.pth"), "destination": str(tmp_path / "x.safetensors")}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"has the shape .* needs"):
        import_weights(build(ImportConfig, config, []))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
