import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from unet_core.config.presets import PRESETS, preset
from unet_core.errors import ConfigError
from unet_core.networks.unet import JOINS, UNet, fold_batchnorm


@pytest.mark.parametrize(
    ("name", "channels", "logits", "parameters"),
    [("padded", 3, 1, 31_043_521),
     ("bilinear", 3, 1, 28_954_561),
     ("transpose", 3, 1, 31_043_521),
     ("paper", 1, 2, 31_030_658),
     ("valid3", 1, 2, 8_563_078),
     ("dilated", 3, 2, 31_031_810),
     ("concat-crop", 3, 10, 31_044_106),
     ("concat-pad", 3, 10, 31_044_106),
     ("concat-same", 3, 10, 31_044_106),
     ("plain", 3, 10, 31_032_330)],
)  # fmt: skip
def test_presets_have_the_parameters_of_their_originals(name, channels, logits, parameters):
    spec = preset(name, in_channels=channels, classes=logits)
    with torch.device("meta"):
        network = UNet(replace(spec, init="torch"))
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "side", "out"),
    [("padded", 512, 512), ("bilinear", 17, 17), ("transpose", 33, 33), ("paper", 572, 388),
     ("paper", 188, 4), ("valid3", 284, 196), ("valid3", 572, 484), ("dilated", 233, 233),
     ("concat-crop", 572, 388), ("concat-pad", 141, 133), ("concat-same", 48, 48)],
)  # fmt: skip
def test_sizes_are_those_of_the_originals(name, side, out):
    spec = preset(name, width=1)
    assert side in spec.sides
    assert spec.output_side(side) == out
    logits = UNet(spec).eval()(torch.zeros(1, spec.in_channels, side, side + spec.sides.step))
    assert logits.shape == (1, spec.classes, out, out + spec.sides.step)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_sides_at_equal_steps_are_all_that_the_layers_let_through(name):
    spec = preset(name, width=1)
    for side in range(1, spec.sides.smallest + 2 * spec.stride):
        assert (side in spec.sides) == (spec.output_side(side) is not None)


def test_any_width_depth_channels_and_classes():
    for name in PRESETS:
        spec = preset(name, in_channels=5, classes=3, width=3, depth=2)
        side = spec.sides.at_least(40 + 2 * spec.margin)
        assert UNet(spec).eval()(torch.zeros(2, 5, side, side)).shape[:2] == (2, 3)


def test_a_centre_crop_rounds_as_its_original():
    skip, decoder = torch.arange(11.0).expand(1, 1, 11, 11), torch.zeros(1, 1, 4, 4)
    assert JOINS["crop"](decoder, skip)[1][0, 0, 0, 0] == 3
    assert JOINS["crop_even"](decoder, skip)[1][0, 0, 0, 0] == 4  # 7 / 2 = 3.5, half to even
    padded = JOINS["pad"](torch.ones(1, 1, 4, 4), skip)[0]
    assert padded[0, 0, 3:7, 3:7].all()
    assert padded.sum() == 16


def test_the_papers_weights_begin_with_he_and_the_tutorials_with_xavier():
    torch.manual_seed(0)
    paper, tutorial = UNet(preset("paper", width=16)), UNet(preset("bilinear", width=16))
    conv = paper.encoder[1].conv2
    assert conv.weight.detach().std() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)
    assert not conv.bias.any()
    conv = tutorial.encoder[1].conv2
    assert conv.weight.detach().std() == pytest.approx((2 / (32 * 9 + 32 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_folding_keeps_the_logits(name):
    torch.manual_seed(0)
    network = UNet(preset(name, in_channels=1, classes=3, width=8))
    sides = network.spec.sides
    for buffer_name, buffer in network.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_()
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    network.eval()
    x = torch.randn(2, 1, sides.at_least(48), sides.at_least(64))
    with torch.inference_mode():
        before = network(x)
        after = fold_batchnorm(copy.deepcopy(network))(x)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, x_NCHW):
        return super().forward(x_NCHW).relu()


class DoubledConv(nn.Conv2d):
    def forward(self, x_NCHW):
        return 2 * super().forward(x_NCHW)


def doubled_by_a_hook(conv):
    conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    return conv


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("conv", "norm"),
    [
        (nn.Conv2d(1, 4, 3), ActivatedNorm(4)),
        (DoubledConv(1, 4, 3), nn.BatchNorm2d(4)),
        (doubled_by_a_hook(nn.Conv2d(1, 4, 3)), nn.BatchNorm2d(4)),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)), nn.BatchNorm2d(4)),
        (nn.utils.spectral_norm(nn.Conv2d(1, 4, 3)), nn.BatchNorm2d(4)),
        (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    ],
)
def test_folding_leaves_layers_alone_that_do_more_than_their_class(conv, norm):
    nn.init.ones_(norm.bias)
    network = nn.Sequential(conv, norm).eval()
    x = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        before = network(x)
        torch.testing.assert_close(fold_batchnorm(network)(x), before)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="allowed: padded, bilinear, "):
        preset("unet")
    with pytest.raises(ConfigError, match="widht is no option; allowed: in_channels, classes"):
        preset("paper", widht=3)


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"up": "nearest"}, {"padding": "valid"}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError, match=r"'batch', allowed: none|'nearest'|at no image size"):
        assert preset("padded", **options).sides
