"""Sections on the machine itself: its limits, and what its kernels do with rare values."""

import functools
import importlib.metadata
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tests.tools.gpu_day.day import Measurement, Setup
from tests.tools.gpu_day.pieces import matrix_tflops
from unet_core.inference.engine import to_tensor

LIBRARIES = ("torch", "triton", "numpy", "pillow", "pyarrow", "ray")
COPIED_BYTES = (2**23, 2**26)
MATRICES = (
    ("bfloat16", torch.bfloat16, False),
    ("float16", torch.float16, False),
    ("tf32", torch.float32, True),
    ("float32", torch.float32, False),
)


def device(setup: Setup) -> Iterator[Measurement]:
    """Versions, the device, and the speed of its copies, products, launches and syncs."""
    yield "versions", functools.partial(_versions, setup)
    yield "device", functools.partial(_properties, setup)
    for size in COPIED_BYTES[:1] if setup.is_tiny else COPIED_BYTES:
        yield f"copies of {size / 1e6:.0f} MB in GB/s", functools.partial(_copies, setup, size)
    for name, dtype, allow_tf32 in MATRICES:
        call = functools.partial(matrix_tflops, setup, dtype, allow_tf32)
        yield f"matrix product {name} in TFLOP/s", call
    yield "microseconds", functools.partial(_latencies, setup)


def _versions(setup: Setup) -> dict[str, Any]:
    found: dict[str, Any] = {"python": sys.version.split()[0], "cores": setup.cores}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def _properties(setup: Setup) -> dict[str, Any]:
    setup.require_cuda()
    found = torch.cuda.get_device_properties(setup.device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "gib": found.total_memory / 2**30,
        "devices": torch.cuda.device_count(),
    }


def _copies(setup: Setup, size: int) -> dict[str, float]:
    pageable = torch.randint(0, 255, (size,), dtype=torch.uint8)
    there = torch.empty(size, dtype=torch.uint8, device=setup.device)
    other = torch.empty_like(there)
    calls = {
        "up, pageable": lambda: there.copy_(pageable),
        "down, fresh": lambda: there.to("cpu", copy=True),
        "on the device": lambda: other.copy_(there),
    }
    if setup.is_cuda:
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        calls |= {
            "up, pinned": lambda: there.copy_(pinned, non_blocking=True),
            "down, pinned": lambda: pinned.copy_(there, non_blocking=True),
            "into pinned": lambda: pinned.copy_(pageable),
        }
    return {name: size / 1e6 / setup.wall_ms(call) for name, call in calls.items()}


def _latencies(setup: Setup) -> dict[str, float]:
    one, times = torch.zeros(1, device=setup.device), 20 if setup.is_tiny else 1000

    def launches() -> None:
        for _ in range(times):
            one.add_(1)

    def reads() -> None:
        for _ in range(times):
            one.item()

    return {
        "launch": 1e3 * setup.wall_ms(launches) / times,
        "sync": 1e3 * setup.wall_ms(reads) / times,
    }


def casts(setup: Setup) -> Iterator[Measurement]:
    """Whether casts, ties and numbers that are none come out as on the CPU."""
    yield "uint16 to float32 is exact", functools.partial(_uint16, setup)
    yield "max takes the first of equals", functools.partial(_ties, setup)
    yield "isfinite sees every kind", functools.partial(_finite, setup)


def _uint16(setup: Setup) -> bool:
    values = np.arange(65536, dtype=np.uint16)
    there = to_tensor(values, setup.device).to(setup.device).float()
    return bool(np.array_equal(there.cpu().numpy(), values.astype(np.float32)))


def _ties(setup: Setup) -> dict[str, bool]:
    levels = torch.randint(0, 2, (4, 7, 96, 96), generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        here = levels.to(dtype)
        there = here.to(setup.device)
        found[str(dtype)] = torch.equal(there.max(dim=1).indices.cpu(), here.max(dim=1).indices)
    return found


def _finite(setup: Setup) -> bool:
    values = torch.tensor([0.0, float("nan"), float("inf"), -float("inf")], device=setup.device)
    return torch.isfinite(values).tolist() == [True, False, False, False]
