"""A pretended CUDA device, for tests of the GPU path on machines without a GPU.

Within ``pretended_device()`` a tensor that is moved to CUDA or made there keeps its values on the
CPU and reports ``cuda:0``. As on a real device, it refuses to meet tensors of the CPU, except those
without dimensions, and has no ``numpy()``; copies between the two and reads that wait for the
device are recorded.

The kernels are the CPU's, so numbers equal those of the CPU, and nothing follows about numerics,
speed, memory or streams of a real GPU. Moves and factories are seen in the thread that entered
the context; tensors that are there already keep their refusals in every thread.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
NAME = "Pretended GPU"
MEMORY_BYTES = 80 * 2**30
FREE_BYTES = 79 * 2**30
CAPABILITY = (9, 0)
MOVES = {"to", "cpu", "cuda"}
ARRAYS = {"numpy", "__array__"}
MIXES = {"copy_", "__getitem__", "__setitem__"}
"""Functions that take values of the CPU when their first argument is on the device."""
UNIFORM = {"cat", "concat", "stack"}
"""Functions that take no tensor of the CPU, not even one without dimensions."""
FROM_VALUES = {"tensor", "as_tensor", "asarray", "new_tensor"}
"""Factories that upload what they are given."""
SYNCS = {
    "__bool__", "__contains__", "__float__", "__index__", "__int__", "allclose", "equal",
    "is_nonzero", "item", "masked_select", "nonzero", "tolist", "unique",
}  # fmt: skip
"""Functions whose result needs a value, or a number of values, from the device."""

Function = Callable[..., Any]


class Crossing(NamedTuple):
    """One copy between the CPU and the device, or one wait for a value."""

    function: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


@dataclass
class Traffic:
    """Everything that crossed, in order."""

    uploads: list[Crossing] = field(default_factory=list)
    downloads: list[Crossing] = field(default_factory=list)
    """Copies of whole tensors; each of them waits, too."""
    syncs: list[Crossing] = field(default_factory=list)
    """Reads of values, and explicit waits."""

    def clear(self) -> None:
        """Forget what was recorded."""
        for crossings in (self.uploads, self.downloads, self.syncs):
            crossings.clear()

    @property
    def counts(self) -> tuple[int, int, int]:
        """Numbers of uploads, downloads and syncs."""
        return len(self.uploads), len(self.downloads), len(self.syncs)


TRAFFIC = Traffic()
"""Of the context that was entered last."""


class Pretended(Tensor):
    """A tensor of the device."""

    @property
    def device(self) -> torch.device:
        """``cuda:0``."""
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        """Always true."""
        return True

    @property
    def is_cpu(self) -> bool:
        """Always false."""
        return False

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _called(func, args, kwargs or {})


class _Intercepted(TorchFunctionMode):
    """Sees every call of torch, also those without a tensor of the device."""

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _called(func, args, kwargs or {})


def _called(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of torch as if the device were one."""
    name = getattr(func, "__name__", "")
    with torch._C.DisableTorchFunctionSubclass():
        if name == "__deepcopy__" and isinstance(args[0], Pretended):
            return _deepcopied(*args)
        if name in MOVES:
            return _moved(name, func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        here = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
        if name == "_has_compatible_shallow_copy_type":  # whether a module may keep a parameter
            return not (there and here) and func(*args)
        if there:
            _require_possible(name, args, there, here)
        _record(name, args, kwargs, there, here)
        is_there = bool(there)
        if kwargs.get("device") is not None:
            is_there = _is_cuda(kwargs["device"])
            kwargs = {**kwargs, "device": CPU} if is_there else kwargs
        found = func(*args, **kwargs)
        return _placed(found) if is_there and name not in SYNCS else found


def _require_possible(
    name: str, args: tuple[Any, ...], there: list[Tensor], here: list[Tensor]
) -> None:
    """Raise what torch raises for tensors of two devices, and for arrays of a device's memory."""
    if name in ARRAYS:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )
    takes_both = name == "copy_" or (name in MIXES and isinstance(args[0], Pretended))
    strange = [tensor for tensor in here if tensor.dim() or name in UNIFORM]
    if strange and not takes_both:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in strange)
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! In {name}, on the cpu: {shapes}; on cuda:0: {len(there)}"
        )


def _record(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], there: list[Tensor],
    here: list[Tensor],
) -> None:  # fmt: skip
    """Record what a call that is possible moves or waits for."""
    if there and name in SYNCS:
        TRAFFIC.syncs.append(_crossing(name, there[0]))
    if there and name in ("__getitem__", "__setitem__") and _has_mask(args[1], there):
        TRAFFIC.syncs.append(_crossing(name, there[0]))
    if there and here and name in MIXES:
        is_upload = isinstance(args[0], Pretended)
        (TRAFFIC.uploads if is_upload else TRAFFIC.downloads).append(_crossing(name, args[0]))
    if name in FROM_VALUES and _is_cuda(kwargs.get("device", there[0].device if there else CPU)):
        TRAFFIC.uploads.append(Crossing(name))


def _has_mask(index: Any, there: list[Tensor]) -> bool:
    """Whether an index holds a mask on the device: how many values it picks must be known."""
    leaves = tree_leaves(index)
    return any(t.dtype == torch.bool and any(t is leaf for leaf in leaves) for t in there)


def _crossing(name: str, tensor: Tensor) -> Crossing:
    return Crossing(name, tuple(tensor.shape), tensor.dtype)


def _moved(name: str, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``to``, ``cpu`` and ``cuda``: what crosses is copied, as between two memories."""
    tensor, rest, kwargs = args[0], list(args[1:]), dict(kwargs)
    was_there = is_there = isinstance(tensor, Pretended)
    if name == "to":
        target = _target(rest, kwargs)
        if target is not None:
            is_there = target.type == "cuda"
        if is_there:
            rest = [CPU if isinstance(value, str | torch.device) else value for value in rest]
            kwargs |= {"device": CPU} if kwargs.get("device") is not None else {}
        found = func(tensor, *rest, **kwargs)
    else:
        is_there = name == "cuda"
        found = tensor
    if was_there == is_there:
        return found if found is tensor or not is_there else _placed(found)
    (TRAFFIC.uploads if is_there else TRAFFIC.downloads).append(_crossing(name, tensor))
    if not found.is_meta and found.data_ptr() == tensor.data_ptr():
        found = found.clone()
    return found.as_subclass(Pretended if is_there else Tensor)


def _target(rest: list[Any], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that ``to`` was asked for; None where only the dtype or layout changes."""
    wanted = kwargs.get("device", kwargs.get("other", rest[0] if rest else None))
    if isinstance(wanted, Tensor):
        return wanted.device
    return torch.device(wanted) if isinstance(wanted, str | torch.device) else None


def _is_cuda(device: object) -> bool:
    """Whether ``device=`` names the device; a bare number is one of CUDA."""
    if isinstance(device, str | torch.device):
        return torch.device(device).type == "cuda"
    return isinstance(device, int)


def _placed(found: Any) -> Any:
    """Results as tensors of the device."""

    def place(value: Any) -> Any:
        is_new = isinstance(value, Tensor) and not isinstance(value, Pretended)
        return value.as_subclass(Pretended) if is_new else value

    return tree_map(place, found)


def _deepcopied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy on the device; a parameter's is one."""
    if id(tensor) in memo:
        return memo[id(tensor)]
    made = tensor.detach().as_subclass(Tensor).clone().as_subclass(Pretended)
    made.requires_grad_(tensor.requires_grad)
    if isinstance(tensor, torch.nn.Parameter):
        made._is_param = True  # type: ignore[attr-defined]  # as torch marks those of subclasses
    memo[id(tensor)] = made
    return made


class _Autocast(torch.autocast):
    """Autocast of the device by the CPU's list of functions."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class _Generator(torch.Generator):
    """Random numbers of the device: the CPU's."""

    def __new__(cls, device: object = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")


def _grouped(tensors: list[list[Tensor | None]], with_indices: bool = False) -> dict[Any, Any]:
    """Tensors of the device by device and dtype, where torch would tell that of their memory."""
    groups = _group_tensors_by_device_and_dtype(tensors, with_indices)
    is_there = any(isinstance(tensor, Pretended) for tensor in tensors[0])
    return {(DEVICE if is_there else at, dtype): g for (at, dtype), g in groups.items()}


def _synchronised(device: object = None) -> None:
    TRAFFIC.syncs.append(Crossing("synchronize"))


def _replacements() -> list[tuple[Any, str, Any]]:
    """What torch says of CUDA, by module and name."""
    cuda = torch.cuda
    properties = SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY_BYTES,
        multi_processor_count=132,
    )  # fmt: skip
    return [
        (cuda, "is_available", lambda: True),
        (cuda, "device_count", lambda: 1),
        (cuda, "current_device", lambda: 0),
        (cuda, "set_device", lambda device: None),
        (cuda, "get_device_name", lambda device=None: NAME),
        (cuda, "get_device_capability", lambda device=None: CAPABILITY),
        (cuda, "get_device_properties", lambda device=None: properties),
        (cuda, "mem_get_info", lambda device=None: (FREE_BYTES, MEMORY_BYTES)),
        (cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (cuda, "empty_cache", lambda: None),
        (cuda, "synchronize", _synchronised),
        (torch, "autocast", _Autocast),
        (torch, "Generator", _Generator),
        (clip_grad, "_group_tensors_by_device_and_dtype", _grouped),
    ]


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    """Put the replacements in place, and undo them; flags of cuDNN become what they were."""
    cudnn, future = torch.backends.cudnn, torch.__future__
    flags = {name: getattr(cudnn, name) for name in ("benchmark", "deterministic", "allow_tf32")}
    overwrites = future.get_overwrite_module_params_on_conversion()
    replacements = _replacements()
    before = [getattr(module, name) for module, name, _ in replacements]
    try:
        future.set_overwrite_module_params_on_conversion(True)  # a parameter changes its class
        for module, name, value in replacements:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(replacements, before, strict=True):
            setattr(module, name, value)
        future.set_overwrite_module_params_on_conversion(overwrites)
        for name, value in flags.items():
            setattr(cudnn, name, value)


@contextlib.contextmanager
def pretended_device() -> Iterator[Traffic]:
    """Have a CUDA device; yields what crosses between it and the CPU."""
    TRAFFIC.clear()
    with _replaced(), _Intercepted():
        yield TRAFFIC
