import copy

import pytest
import torch

from unet_core.errors import ConfigError
from unet_core.unet import UNet, fold_batchnorm


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [("padded", {"in_channels": 3, "classes": 1}, 31_043_521),
     ("plain", {"in_channels": 3, "classes": 10}, 31_032_330)],
)  # fmt: skip
def test_presets_have_the_parameters_of_their_originals(name, options, parameters):
    with torch.device("meta"):
        network = UNet.from_preset(name, **options)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("name", ["padded", "plain"])
def test_folding_keeps_the_logits(name):
    torch.manual_seed(0)
    network = UNet.from_preset(name, in_channels=1, classes=3, width=8)
    for buffer_name, buffer in network.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_()
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    network.eval()
    x = torch.randn(2, 1, 48, 64)
    with torch.inference_mode():
        before = network(x)
        after = fold_batchnorm(copy.deepcopy(network))(x)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="allowed: padded, plain"):
        UNet.from_preset("unet")
