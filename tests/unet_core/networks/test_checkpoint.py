import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.data import rewritten
from unet_core.errors import CheckpointError
from unet_core.networks import checkpoint
from unet_core.networks.header import checkpoint_digest, locate, read_header, read_metadata


def test_a_checkpoint_gives_back_its_network_and_header(tiny_model):
    network, header = checkpoint.load(tiny_model)
    again, same = checkpoint.load(tiny_model, checkpoint_digest(tiny_model))
    assert header == same == read_header(tiny_model)
    assert header.tiling.halo == 96
    x = torch.randn(1, 1, 32, 32)
    with torch.inference_mode():
        assert torch.equal(network(x), again(x))
    assert not network.training


def test_a_checkpoint_keeps_whether_class_0_is_background(tiny_model, tmp_path):
    network, header = checkpoint.load(tiny_model)
    assert (header.background, header.first_foreground) == ("first", 1)
    assert "background" not in read_metadata(tiny_model)
    path = tmp_path / "none.safetensors"
    path.write_bytes(checkpoint.serialize(network, replace(header, background="none")))
    assert read_header(str(path)) == replace(header, background="none")
    assert read_header(str(path)).first_foreground == 0


def test_the_built_in_checkpoint_is_small_and_loads():
    assert len(Path(locate("builtin:nuclei")).read_bytes()) <= 4_000_000
    network, header = checkpoint.load("builtin:nuclei")
    assert header.class_names == ("background", "nucleus")
    assert network.spec.in_channels == 1
    with pytest.raises(CheckpointError, match="shipped: builtin:nuclei"):
        checkpoint.load("builtin:cells")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04 a zipped pickle", "not a safetensors file"),
        (struct.pack("<Q", 2**40) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 10) + b"{ damaged ", "header is damaged"),
        (struct.pack("<Q", 2) + b"{}", "format is None"),
    ],
)
def test_foreign_files_are_refused_without_torch(tmp_path, data, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason):
        read_header(str(path))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("format", "unet-jobs/9", "format is 'unet-jobs/9'"),
        ("classes", '["a","b","c"]', "got 3 names, but the network has 2"),
        ("model", '{"width": 4, "nonsense": 1}', "metadata is damaged"),
        ("preprocessing", '{"color": "rgb", "normalization": "range"}', "takes 1"),
        ("preprocessing", '{"color": "purple"}', "metadata is damaged"),
        ("background", '"last"', "metadata is damaged"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tiny_model, tmp_path, key, value, reason):
    bad = rewritten(
        tiny_model, tmp_path, lambda header: header["__metadata__"].update({key: value})
    )
    with pytest.raises(CheckpointError, match=reason):
        read_header(bad)


def test_tensors_that_do_not_fit_or_changed_are_refused(tiny_model, tmp_path):
    spec = '{"in_channels": 1, "classes": 1, "width": 8}'
    bad = rewritten(tiny_model, tmp_path, lambda h: h["__metadata__"].update({"model": spec}))
    with pytest.raises(CheckpointError, match=r"tensors do not fit its header: .*has the shape"):
        checkpoint.load(bad)
    bad = rewritten(tiny_model, tmp_path, lambda h: h.update(extra=h.pop("head.conv.bias")))
    with pytest.raises(CheckpointError, match=r"missing head\.conv\.bias, unexpected extra"):
        checkpoint.load(bad)
    with pytest.raises(CheckpointError, match="changed since the run was made"):
        checkpoint.load(tiny_model, "0" * 64)
    network, header = checkpoint.load(tiny_model)
    with torch.no_grad():
        network.head.conv.bias[0] = torch.nan
    (tmp_path / "nan.safetensors").write_bytes(checkpoint.serialize(network, header))
    with pytest.raises(CheckpointError, match=r"head\.conv\.bias holds NaN or inf"):
        checkpoint.load(str(tmp_path / "nan.safetensors"))
    whole = Path(tiny_model).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="a damaged safetensors file"):
        checkpoint.load(str(tmp_path / "cut.safetensors"))
