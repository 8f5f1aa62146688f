"""Import of weights of other projects: reading, recognition by key, conversion to a checkpoint.

Files cannot run code: pickles are loaded with ``weights_only``, and networks that are not presets
are built by a function that the user names.
"""

import io
import itertools
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unet_core.config.import_weights import ForeignConfig, ImportConfig
from unet_core.config.presets import Factory, NetworkSpec, UNetSpec, channels_of
from unet_core.config.sections import StorageConfig
from unet_core.errors import CheckpointError, ConfigError, few
from unet_core.networks import checkpoint, construction
from unet_core.networks.foreign.layouts import LAYOUTS, Layout
from unet_core.networks.header import Header
from unet_core.networks.unet import UNet
from unet_core.storage.store import Store

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts save a state_dict."""
PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile add to all names."""
PICKLES = (b"PK\x03\x04", b"\x80")
"""First bytes of files that ``torch.save`` writes, since 1.6 (ZIP) and before (pickle)."""

Reading = tuple[Layout, UNetSpec, dict[str, str]]
"""A layout, its spec with a depth and with or without biases, and the resulting names."""


def import_weights(config: ImportConfig) -> Header:
    """Write a checkpoint that gives the same logits as the source's network.

    Raises CheckpointError for weights that fit no network, ConfigError for a destination that is
    there already and for class names or colours that do not fit the network.
    """
    destination = Store(config.destination, config.storage)
    if destination.exists():
        raise ConfigError(f"{config.destination} exists already; remove it, or give another name")
    tensors = read_tensors(config.source, config.storage)
    with _naming(config.source):
        network, spec = _network_with(tensors, config.model)
    header = replace(
        construction.header_of(network, spec, config.model),
        training={"imported_from": config.source},
    )
    destination.publish("", checkpoint.serialize(network, header))
    return header


def read_tensors(source: str, storage: StorageConfig | None = None) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or of a ``state_dict`` that ``torch.save`` wrote, by
    name, without the wrappers and prefixes that training added.

    Raises CheckpointError for a file that is neither, or holds something else.
    """
    data = Store(source, storage).read("")
    is_safetensors = data[8:9] == b"{"  # after eight bytes with the length of the header
    tensors = checkpoint.unpack(data, source) if is_safetensors else None
    with _naming(source):
        found = _unwrapped(_unpickled(data) if tensors is None else tensors)
        for name, value in found.items():
            if reason := _why_not(name, value, len(data)):
                raise CheckpointError(f"{name} {reason}")
        if not found:
            raise CheckpointError("holds no tensors")
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in found)), ""):
        found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def recognise(tensors: Mapping[str, Tensor], layout: str = "") -> tuple[Layout, UNetSpec]:
    """Find the layout of weights by their names, and channels, width and classes by their shapes.

    Raises CheckpointError unless exactly one layout (of those called ``layout``, if given) has
    these names; ConfigError if there is no such layout.
    """
    allowed = dict.fromkeys(known.name for known in LAYOUTS)
    if layout and layout not in allowed:
        raise ConfigError(f"model.layout: got {layout!r}, allowed: {', '.join(allowed)}")
    keys = {name for name in tensors if not checkpoint.is_counter(name)}
    readings = [
        (known, replace(known.spec, depth=depth, bias=bias), known.names(depth, bias))
        for known in LAYOUTS
        for depth, bias in itertools.product(range(1, 9), (True, False))
        if layout in ("", known.name)
    ]
    fitting = [reading for reading in readings if set(reading[2].values()) == keys]
    if not fitting:
        raise CheckpointError(_nearest(readings, keys))
    if len(fitting) > 1:
        names = ", ".join(known.name for known, _, _ in fitting)
        raise CheckpointError(f"several networks have these keys; say which with --layout: {names}")
    found, spec, theirs = fitting[0]
    width, channels = _shape_of(tensors, theirs["encoder.0.conv1.weight"])
    classes, _ = _shape_of(tensors, theirs["head.conv.weight"])
    return found, replace(spec, width=width, in_channels=channels, classes=classes)


def convert(tensors: Mapping[str, Tensor], layout: Layout, spec: UNetSpec) -> dict[str, Tensor]:
    """Rename tensors to those of ``UNet``; raises ValueError for one that does not fit."""
    with torch.device("meta"):  # other initial weights take seconds
        wanted = UNet(replace(spec, init="torch")).state_dict()
    names = layout.names(spec.depth, spec.bias)
    return {
        ours: checkpoint.fitting(theirs, tensors[theirs], wanted[ours])
        for ours, theirs in names.items()
    }


def _shape_of(tensors: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    """Return output and input channels of a convolution; raises CheckpointError for others."""
    tensor = tensors[key]
    if tensor.ndim != 4 or not tensor.numel():
        raise CheckpointError(
            f"{key} has the shape {list(tensor.shape)}, which is none of a convolution"
        )
    return tensor.shape[0], tensor.shape[1]


def _nearest(readings: list[Reading], keys: set[str]) -> str:
    """Describe the differences to the layout that has the largest share of keys in common."""

    def share(reading: Reading) -> float:
        wanted = set(reading[2].values())
        return len(wanted & keys) / len(wanted | keys)

    layout, spec, names = max(readings, key=share)
    return (
        f"no known network has these keys; the nearest is {layout.name} with {spec.depth} pools: "
        f"{checkpoint.difference(names.values(), sorted(keys))}; give model.factory for another one"
    )


def _network_with(
    tensors: dict[str, Tensor], model: ForeignConfig
) -> tuple[nn.Module, NetworkSpec]:
    """Build the network with these weights; the spec of a factory's network lacks its classes."""
    if model.factory:
        made_by = Factory(model.factory, model.arguments, channels_of(model.color))
        foreign = construction.build(made_by)
        checkpoint.fill(foreign, tensors)
        return foreign.eval(), made_by
    layout, spec = recognise(tensors, model.layout)
    converted = convert(tensors, layout, spec)  # holds shapes against each other first
    network = UNet(spec)
    network.load_state_dict(converted)
    return network.eval(), spec


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Prefix errors with the file that they are about, as CheckpointError."""
    try:
        yield
    except ConfigError:
        raise
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _unpickled(data: bytes) -> Any:
    if not data.startswith(PICKLES):
        raise CheckpointError("neither safetensors nor a file that torch.save wrote")
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):  # torch.save does not compress
            size = sum(member.file_size for member in zipfile.ZipFile(io.BytesIO(data)).infolist())
            if size > len(data):
                raise CheckpointError(f"{len(data)} bytes that claim to hold {size}; save it again")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"holds {_objects(data)} instead of tensors alone; where it was made, save its "
            "state_dict: torch.save(model.state_dict(), path)"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged or hostile pickle brings about
        first = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CheckpointError(
            f"damaged, or no state_dict that torch.save wrote: {first}"
        ) from error


def _objects(data: bytes) -> str:
    """List the globals that a pickle needs and that are refused, those of torch last."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # too old, or too damaged to tell
        found = []
    found.sort(key=lambda name: (name.startswith("torch."), name))
    return few(found) or "objects of Python, or damage,"


def _unwrapped(found: Any) -> dict[Any, Any]:
    """Return the innermost state_dict, without the entry that milesial's training adds.

    Raises CheckpointError if there is none.
    """
    for _ in WRAPPERS:
        inner = [found[key] for key in WRAPPERS if isinstance(found, dict) and key in found]
        found = inner[0] if inner else found
    if not isinstance(found, dict):
        raise CheckpointError(f"holds {type(found).__name__}, not a state_dict")
    return {key: value for key, value in found.items() if key != "mask_values"}


def _why_not(key: object, value: object, file_bytes: int) -> str:
    """Describe why an entry is refused, or return an empty string; tensors larger than their file
    may be an attack.
    """
    if not isinstance(key, str) or not isinstance(value, Tensor):
        return f"is {type(value).__name__}, not a tensor with a name"
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_complex():
        return f"is a {value.layout} tensor of {value.dtype} on {value.device}, not a plain one"
    if value.numel() * value.element_size() > file_bytes:
        return f"claims the shape {list(value.shape)}, more than the file holds"
    return ""
