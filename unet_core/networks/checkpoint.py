"""Checkpoints: one safetensors file with everything that prediction needs in its metadata.

The only module that loads weights of this project; ``foreign.weights`` reads those of others.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Collection
from typing import TYPE_CHECKING

from unet_core.config.presets import UNetSpec
from unet_core.config.sections import StorageConfig
from unet_core.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn
from unet_core.networks.header import (
    FORMAT,
    Header,
    _read,
    palette_of,
    read_header,
    require_factory,
)

SHOWN = 3


def load(
    checkpoint: str, sha256: str | None = None, storage: StorageConfig | None = None,
    factory: str = "",
) -> tuple["nn.Module", Header]:  # fmt: skip
    """The network in eval mode, float32 on the CPU, weights strict; and its header.

    ``factory`` is the function that the user allows to build a network of somebody else. Raises
    CheckpointError if the file is not the one with ``sha256``, or its tensors do not fit.
    """
    import torch

    from unet_core.networks.construction import build

    data = _read(checkpoint, storage)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{checkpoint}: the file changed since the run was made")
    header = read_header(checkpoint, storage)
    require_factory(checkpoint, header, factory)
    tensors = unpack(data, checkpoint)
    is_ours = isinstance(header.network, UNetSpec)
    try:
        with torch.device("meta") if is_ours else contextlib.nullcontext():
            network = build(header.network)  # a small file must not bring about a large network
        fill(network, tensors, assign=is_ours)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = f"its tensors do not fit its header: {one_line(error)}"
        raise CheckpointError(f"{checkpoint}: {reason}") from error
    return network.eval(), header


def fill(network: "nn.Module", tensors: "dict[str, Tensor]", assign: bool = False) -> None:
    """Give a network its weights, strictly but for counters of batches; ``assign`` puts them in
    the place of its own.

    Raises ValueError that names those that do not fit.
    """
    own = network.state_dict()
    wanted, given = ([key for key in keys if not is_counter(key)] for keys in (own, tensors))
    if different := difference(wanted, given):
        raise ValueError(f"not the weights of this network: {different}")
    sound = {key: fitting(key, tensors[key], own[key]) for key in wanted}
    none = {key: own[key].new_zeros((), device="cpu") for key in own if is_counter(key)}
    network.load_state_dict(sound | none, assign=assign)


def fitting(key: str, tensor: "Tensor", wanted: "Tensor") -> "Tensor":
    """A tensor in its network's type; raises ValueError for another shape or kind, or for NaN."""
    if tensor.shape != wanted.shape:
        got, needed = list(tensor.shape), list(wanted.shape)
        raise ValueError(f"{key} has the shape {got}, but its network needs {needed}")
    if tensor.is_floating_point() != wanted.is_floating_point():
        raise ValueError(f"{key} holds {tensor.dtype}, but its network needs {wanted.dtype}")
    tensor = tensor.to(wanted.dtype)
    if not tensor.isfinite().all():
        raise ValueError(f"{key} holds NaN or infinite numbers")
    return tensor


def difference(wanted: Collection[str], got: Collection[str]) -> str:
    """The first few keys on either side, and how many more there are."""
    missing = [key for key in wanted if key not in got]
    unexpected = [key for key in got if key not in wanted]
    found = {"missing": missing, "unexpected": unexpected}
    return ", ".join(f"{what} {few(keys)}" for what, keys in found.items() if keys)


def few(keys: list[str]) -> str:
    """The first ones, and how many more there are."""
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def is_counter(key: str) -> bool:
    """Whether a tensor counts the steps of a training, which is not kept."""
    return key.endswith("num_batches_tracked")


def load_model(checkpoint: str, factory: str = "") -> "nn.Module":
    """The network of ``builtin:NAME``, a path or a URI: normalised NCHW float32 to logits NKHW."""
    return load(checkpoint, factory=factory)[0]


def serialize(network: "nn.Module", header: Header) -> bytes:
    """The bytes of a checkpoint file."""
    import torch

    tensors = {}
    for name, value in network.state_dict().items():
        if not is_counter(name):
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            tensors[name] = value.detach().to("cpu", dtype, copy=True).contiguous()
    metadata = {
        "format": FORMAT,
        "model": json.dumps(dataclasses.asdict(header.network)),
        "tiling": json.dumps(dataclasses.asdict(header.tiling)),
        "classes": json.dumps(header.class_names),
        "preprocessing": header.preprocessing.model_dump_json(),
        "palette": json.dumps(header.palette or palette_of(header.classes)),
        "training": json.dumps(header.training, sort_keys=True),
    }
    return pack(tensors, metadata)


def pack(tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> bytes:
    """Tensors and texts in one safetensors file: what a training goes on from."""
    import safetensors.torch

    return safetensors.torch.save(tensors, metadata)


def unpack(data: bytes, where: str) -> "dict[str, Tensor]":
    """The tensors of a safetensors file; raises CheckpointError if it is damaged."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: a damaged safetensors file: {error}") from error
