import numpy as np
import pytest
import torch

from tests.support.data import write_checkpoint
from unet_core import load_model
from unet_core.config.presets import preset
from unet_core.errors import CheckpointError
from unet_core.networks import checkpoint
from unet_core.networks.onnx_export import to_onnx

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the exporter's own
]


@pytest.mark.parametrize("name", ["padded", "concat-pad", "dilated"])
def test_onnx_gives_the_same_logits_at_any_size(tmp_path, name):
    spec = preset(name, in_channels=1, classes=2, width=2, depth=2)
    path = write_checkpoint(tmp_path / "net.safetensors", spec)
    network, header = checkpoint.load(path)
    session = onnxruntime.InferenceSession(to_onnx(network, header))
    assert session.get_modelmeta().custom_metadata_map["classes"] == '["background", "nucleus"]'
    for count, more in ((1, 0), (2, 50)):
        height, width = (header.tiling.sides.at_least(side + more) for side in (80, 97))
        x_NCHW = torch.rand(count, 1, height, width)
        (theirs,) = session.run(None, {"image": x_NCHW.numpy()})
        with torch.inference_mode():
            mine = load_model(path)(x_NCHW).numpy()
        np.testing.assert_allclose(theirs, mine, atol=1e-4, rtol=1e-4)


def test_a_network_that_onnx_computes_otherwise_is_not_written(tiny_model):
    network, header = checkpoint.load(tiny_model)
    calls = []

    def unsteady(module, x, logits):
        calls.append(1)
        return logits + (0 if torch.compiler.is_compiling() else 1)

    network.register_forward_hook(unsteady)
    with pytest.raises(CheckpointError, match="other logits: they differ by up to 1"):
        to_onnx(network, header)
