"""Export of networks to ONNX, checked by comparing the logits of onnxruntime and torch."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from unet_core.errors import CheckpointError, ConfigError, one_line
from unet_core.networks.header import Header
from unet_core.tiling.geometry import Tiling

TOLERANCE = 1e-4
"""Largest absolute and relative difference of logits: float32 rounding over many layers."""


def to_onnx(network: nn.Module, header: Header) -> bytes:
    """Export a network: ``image`` (N×C×H×W float32, normalized) to ``logits`` (N×K×H'×W'), for all
    sizes that it accepts; class names, preprocessing and tiling are in the metadata.

    Raises ConfigError if the extra is not installed, CheckpointError if the network cannot be
    exported or differs under onnxruntime.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ConfigError("onnx is not installed: pip install 'unet-jobs[onnx]'") from error
    channels, tiling = header.network.in_channels, header.tiling
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    try:
        program = torch.onnx.export(
            network, (_sample(2, channels, tiling, 2),), dynamo=True, dynamic_shapes=(free,),
            input_names=["image"], output_names=["logits"], verbose=False,
        )  # fmt: skip
        assert program is not None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            program.save(str(path), external_data=False)
            model = onnx.load(str(path))
    except Exception as error:  # exporters share no base class
        raise CheckpointError(
            f"the network cannot be exported to ONNX: {one_line(error)}"
        ) from error
    metadata = {
        "classes": json.dumps(header.class_names),
        "preprocessing": header.preprocessing.model_dump_json(),
        "tiling": json.dumps({"stride": tiling.stride, "margin": tiling.margin,
                              "halo": tiling.halo, "smallest": tiling.sides.smallest,
                              "step": tiling.sides.step}),
    }  # fmt: skip
    onnx.helper.set_model_props(model, metadata)
    data: bytes = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for count, steps in ((1, 3), (3, 1)):
        x_NCHW = _sample(count, channels, tiling, steps)
        logits = session.run(None, {"image": x_NCHW.numpy()})[0]
        with torch.inference_mode():
            expected = network(x_NCHW).numpy()
        if not np.allclose(expected, logits, atol=TOLERANCE, rtol=TOLERANCE):
            raise CheckpointError(
                "ONNX gives other logits: they differ by up to "
                f"{np.abs(expected - logits).max():.2g}"
            )
    return data


def _sample(count: int, channels: int, tiling: Tiling, steps: int) -> torch.Tensor:
    """Create random images N×C×H×W of a legal size, higher than wide."""
    width = tiling.sides.at_least(2 * tiling.margin + steps * tiling.stride)
    height = tiling.sides.at_least(width + 1)
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))
