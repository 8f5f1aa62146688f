"""Checkpoint files: safetensors. Of a network: weights, with everything that prediction needs in
the metadata. Of a training in progress: only ``pack`` and ``unpack``; ``training_run`` says what
is in them.

Files of this project only; ``foreign.weights`` reads weights of other projects.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Collection
from typing import TYPE_CHECKING

from unet_core.config.presets import UNetSpec
from unet_core.config.sections import StorageConfig
from unet_core.errors import CheckpointError, few, one_line
from unet_core.networks.header import (
    FORMAT,
    Header,
    palette_of,
    read_bytes,
    read_header,
    require_factory,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


def load(
    checkpoint: str, sha256: str | None = None, storage: StorageConfig | None = None,
    factory: str = "",
) -> tuple["nn.Module", Header]:  # fmt: skip
    """Load a network in eval mode on the CPU, float32, and its header.

    ``factory``: the function that the user allows to build the network, if it is not a preset.
    Raises CheckpointError if the file's SHA-256 is not ``sha256``, or its tensors do not fit.
    """
    import torch

    from unet_core.networks.construction import build

    data = read_bytes(checkpoint, storage)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{checkpoint}: the file changed since the run was made")
    header = read_header(checkpoint, storage, data)
    require_factory(checkpoint, header, factory)
    tensors = unpack(data, checkpoint)
    is_ours = isinstance(header.network, UNetSpec)
    try:
        with torch.device("meta") if is_ours else contextlib.nullcontext():
            network = build(header.network)  # a small file must not allocate a large network
        fill(network, tensors, assign=is_ours)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: its tensors do not fit its header: {one_line(error)}"
        ) from error
    return network.eval(), header


def fill(network: "nn.Module", tensors: "dict[str, Tensor]", assign: bool = False) -> None:
    """Load weights strictly, except BatchNorm's batch counters, which are set to 0; ``assign``
    replaces the tensors of the network instead of copying into them.

    Raises ValueError that names the tensors that do not fit.
    """
    own = network.state_dict()
    wanted, given = ([key for key in keys if not is_counter(key)] for keys in (own, tensors))
    if different := difference(wanted, given):
        raise ValueError(f"not the weights of this network: {different}")
    weights = {key: fitting(key, tensors[key], own[key]) for key in wanted}
    counters = {key: own[key].new_zeros((), device="cpu") for key in own if is_counter(key)}
    network.load_state_dict(weights | counters, assign=assign)


def fitting(key: str, tensor: "Tensor", wanted: "Tensor") -> "Tensor":
    """Convert a tensor to the dtype of ``wanted``.

    Raises ValueError for another shape, floating point for integers or vice versa, or NaN.
    """
    if tensor.shape != wanted.shape:
        raise ValueError(
            f"{key} has the shape {list(tensor.shape)}, but its network needs {list(wanted.shape)}"
        )
    if tensor.is_floating_point() != wanted.is_floating_point():
        raise ValueError(f"{key} holds {tensor.dtype}, but its network needs {wanted.dtype}")
    tensor = tensor.to(wanted.dtype)
    if not tensor.isfinite().all():
        raise ValueError(f"{key} holds NaN or infinite numbers")
    return tensor


def difference(wanted: Collection[str], got: Collection[str]) -> str:
    """Describe keys that are missing and unexpected; empty if there are none."""
    found = {
        "missing": [key for key in wanted if key not in got],
        "unexpected": [key for key in got if key not in wanted],
    }
    return ", ".join(f"{what} {few(keys)}" for what, keys in found.items() if keys)


def is_counter(key: str) -> bool:
    """Return True for BatchNorm's batch counters, which checkpoints leave out."""
    return key.endswith("num_batches_tracked")


def load_model(checkpoint: str, factory: str = "") -> "nn.Module":
    """Load the network of ``builtin:NAME``, a path or a URI, in eval mode.

    It maps normalized NCHW float32 to logits NKHW. Raises CheckpointError for an unusable file.
    """
    return load(checkpoint, factory=factory)[0]


def serialize(network: "nn.Module", header: Header) -> bytes:
    """Encode a checkpoint file: weights as float32, and the header."""
    import torch

    tensors = {
        name: value.detach()
        .to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        .contiguous()
        for name, value in network.state_dict().items()
        if not is_counter(name)
    }
    metadata = {
        "format": FORMAT,
        "model": json.dumps(dataclasses.asdict(header.network)),
        "tiling": json.dumps(dataclasses.asdict(header.tiling)),
        "classes": json.dumps(header.class_names),
        "preprocessing": header.preprocessing.model_dump_json(),
        "palette": json.dumps(header.palette or palette_of(header.classes)),
        "training": json.dumps(header.training, sort_keys=True),
    }
    if header.background != "first":  # other files keep the bytes that they had before this key
        metadata["background"] = json.dumps(header.background)
    return pack(tensors, metadata)


def pack(tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> bytes:
    """Encode tensors and metadata as a safetensors file."""
    import safetensors.torch

    return safetensors.torch.save(tensors, metadata)


def unpack(data: bytes, where: str) -> "dict[str, Tensor]":
    """Decode the tensors of a safetensors file; raises CheckpointError if it is damaged."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: a damaged safetensors file: {error}") from error
