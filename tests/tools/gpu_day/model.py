"""Sections on the network and the engine: speed, variants, and how little memory will do."""

import contextlib
import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.tools.gpu_day.day import Measurement, Setup
from tests.tools.gpu_day.overlapped import overlapped
from tests.tools.gpu_day.pieces import (
    batch_of,
    digest,
    engine_of,
    gflop_of,
    input_of,
    matrix_tflops,
)
from unet_core.inference.engine import Engine

Forward = Callable[[Tensor], Tensor]
SIZES = ((64, 512, 32), (16, 512, 64), (8, 512, 64))
"""Width, side and tiles of a batch."""
TINY_SIZES = ((2, 32, 2),)


def forward(setup: Setup) -> Iterator[Measurement]:
    """The network alone and the engine around it: every precision, width and size of a batch."""
    sizes = [(64, 512, (1, 8, 32, 64)), (64, 1024, (1, 8)), (16, 512, (1, 64, 128)),
             (8, 512, (1, 64, 256))]  # fmt: skip
    for width, side, counts in [(2, 32, (1, 2))] if setup.is_tiny else sizes:
        for precision, count in itertools.product(setup.precisions, counts):
            call = functools.partial(_speed, setup, width, side, count, precision)
            yield f"width {width} side {side} batch {count} {precision}", call
    yield "profile", functools.partial(_profile, setup)


def _speed(setup: Setup, width: int, side: int, count: int, precision: str) -> dict[str, float]:
    engine = engine_of(setup, width, precision)
    batch, x_NCHW = batch_of(engine.header, count, side), input_of(setup, engine, count, side)
    if setup.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        network_ms = setup.device_ms(lambda: engine.network(x_NCHW), 1.0)
    run_ms = setup.wall_ms(lambda: engine.run(batch))
    tflops = gflop_of(width, side) * count / network_ms
    return {
        "network ms": network_ms,
        "engine ms": run_ms,
        "images/s": count / run_ms * 1e3,
        "network TFLOP/s": tflops,
        "of the matrix product": tflops / matrix_tflops(setup, engine.dtype),
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if setup.is_cuda else 0.0,
    }


def _profile(setup: Setup) -> str:
    """The kernels of one batch, longest first; returns the name of their file."""
    width, side, count = TINY_SIZES[0] if setup.is_tiny else SIZES[0]
    engine = engine_of(setup, width, "bfloat16")
    batch = batch_of(engine.header, count, side)
    engine.run(batch)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.is_cuda else [])]
    with profile(activities=kinds) as seen:
        engine.run(batch)
    order = "cuda_time_total" if setup.is_cuda else "cpu_time_total"
    path = Path(setup.out) / f"profile_width{width}.txt"
    path.write_text(seen.key_averages().table(sort_by=order, row_limit=40))
    return path.name


def shapes(setup: Setup) -> Iterator[Measurement]:
    """What the first batch of a new shape costs."""
    yield "milliseconds", functools.partial(_first_of_a_shape, setup)


def _first_of_a_shape(setup: Setup) -> dict[str, Any]:
    engine = engine_of(setup, 2 if setup.is_tiny else 64, "bfloat16")
    smallest, sides = (32, 3) if setup.is_tiny else (256, 24)
    found = []
    for number in range(sides):
        batch = batch_of(engine.header, 1, smallest + 16 * number)
        spans = []
        for _ in range(2):
            start = time.perf_counter()
            engine.run(batch)
            spans.append((time.perf_counter() - start) * 1e3)
        found.append(spans)
    first, again = (statistics.median(spans) for spans in zip(*found[1:], strict=True))
    return {"first": first, "again": again, "all": found}


def memory(setup: Setup) -> Iterator[Measurement]:
    """A device with little room: whether a batch is split, by which error, and the same bits."""
    for share in (0.9, 0.7, 0.4, 0.15, 0.05):
        yield f"{share:g} of what a batch needs", functools.partial(_confined, setup, share)


def _confined(setup: Setup, share: float) -> dict[str, Any]:
    setup.require_cuda()
    width, side, count = SIZES[0]
    engine = engine_of(setup, width, "bfloat16")
    batch = batch_of(engine.header, count, side)
    torch.cuda.reset_peak_memory_stats()
    want = digest(engine.run(batch))
    peak = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(setup.device).total_memory
    engine.free_memory()
    torch.cuda.set_per_process_memory_fraction(min(1.0, share * peak / total))
    try:
        got = engine.run(batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "peak GiB": peak / 2**30,
        "most pixels": engine.max_batch_pixels,
        "same bits": digest(got) == want,
    }


class Fused(nn.Module):
    """A convolution, its bias and a ReLU as one call of cuDNN."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x_NCHW: Tensor) -> Tensor:
        conv = self.conv
        return torch.cudnn_convolution_relu(
            x_NCHW, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )


def fused(network: nn.Module) -> nn.Module:
    """The network with every convolution that a ReLU follows as one call, in place."""
    for block in network.modules():
        if type(block) is nn.Sequential:
            _fuse(block)
    return network


def _fuse(block: nn.Sequential) -> None:
    layers = [(n, m) for n, m in block.named_children() if not isinstance(m, nn.Identity)]
    for (name, layer), (after, follower) in itertools.pairwise(layers):
        if type(layer) is nn.Conv2d and type(follower) is nn.ReLU:
            setattr(block, name, Fused(layer))
            setattr(block, after, nn.Identity())


def graphed(network: nn.Module, x_NCHW: Tensor) -> Forward:
    """The network as a CUDA graph for inputs of one shape."""
    static = x_NCHW.clone()
    network(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = network(static)

    def replay(x_NCHW: Tensor) -> Tensor:
        static.copy_(x_NCHW)
        graph.replay()
        return logits

    return replay


def variants(setup: Setup) -> Iterator[Measurement]:
    """One change of the network at a time: its speed, what it takes to begin, and its bits."""
    for width, side, count in TINY_SIZES if setup.is_tiny else SIZES:
        for name in VARIANTS:
            call = functools.partial(_variant, setup, width, side, count, name)
            yield f"width {width} {name}", call


def _variant(setup: Setup, width: int, side: int, count: int, name: str) -> dict[str, Any]:
    needs_cuda, make, flags = VARIANTS[name]
    if needs_cuda:
        setup.require_cuda()
    engine = engine_of(setup, width, "bfloat16")
    plain, x_NCHW = engine.network, input_of(setup, engine, count, side)
    if name.startswith("compile"):
        torch._dynamo.reset()
    with torch.inference_mode(), flags():
        start = time.perf_counter()
        network = make(setup, copy.deepcopy(plain), x_NCHW)
        network(x_NCHW)
        setup.synchronise()
        ready_s = time.perf_counter() - start
        first = network(x_NCHW).clone()
        repeats = all(torch.equal(first, network(x_NCHW)) for _ in range(5))
        ms = setup.device_ms(lambda: network(x_NCHW), 1.0)
        difference = float((first.float() - plain(x_NCHW).float()).abs().max())
    tflops = gflop_of(width, side) * count / ms
    return {
        "ms": ms,
        "images/s": count / ms * 1e3,
        "of the matrix product": tflops / matrix_tflops(setup, engine.dtype),
        "ready after s": ready_s,
        "bits repeat": repeats,
        "largest difference of a logit": difference,
    }


def _eager(setup: Setup, network: nn.Module, x_NCHW: Tensor) -> Forward:
    return network


def _contiguous(setup: Setup, network: nn.Module, x_NCHW: Tensor) -> Forward:
    return network.to(memory_format=torch.contiguous_format)


def _fused(setup: Setup, network: nn.Module, x_NCHW: Tensor) -> Forward:
    return fused(network)


def _fused_graph(setup: Setup, network: nn.Module, x_NCHW: Tensor) -> Forward:
    return graphed(fused(network), x_NCHW)


def _graph(setup: Setup, network: nn.Module, x_NCHW: Tensor) -> Forward:
    return graphed(network, x_NCHW)


def _compiled(setup: Setup, network: nn.Module, x_NCHW: Tensor, mode: str | None = None) -> Forward:
    if setup.is_tiny:  # a real compilation takes minutes
        return torch.compile(network, fullgraph=True, backend="eager")
    return torch.compile(network, fullgraph=True, mode=mode)


def _cudnn(benchmark: bool, deterministic: bool) -> contextlib.AbstractContextManager[None]:
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=benchmark, deterministic=deterministic, allow_tf32=False
    )


def _inductor(**options: Any) -> contextlib.AbstractContextManager[None]:
    """Options of torch's compiler; those that this torch does not know are left out."""
    import torch._inductor.config as inductor

    return inductor.patch({n: v for n, v in options.items() if hasattr(inductor, n)})


REPEATED = functools.partial(_cudnn, benchmark=False, deterministic=True)
AUTOTUNED = functools.partial(_compiled, mode="max-autotune")
FROZEN = functools.partial(_compiled, mode="max-autotune-no-cudagraphs")
Variant = tuple[
    bool,
    Callable[[Setup, nn.Module, Tensor], Forward],
    Callable[[], contextlib.AbstractContextManager[None]],
]
"""Whether it needs CUDA, what makes it, and the flags under which it is made and runs."""
VARIANTS: dict[str, Variant] = {
    "eager": (False, _eager, REPEATED),
    "eager, not deterministic": (False, _eager, functools.partial(_cudnn, False, False)),
    "eager, benchmark": (False, _eager, functools.partial(_cudnn, True, True)),
    "eager, contiguous": (False, _contiguous, REPEATED),
    "graph": (True, _graph, REPEATED),
    "fused": (True, _fused, REPEATED),
    "fused, graph": (True, _fused_graph, REPEATED),
    "compile": (False, _compiled, contextlib.nullcontext),
    "compile, deterministic": (False, _compiled, functools.partial(_inductor, deterministic=True)),
    "compile, max-autotune": (False, AUTOTUNED, contextlib.nullcontext),
    "compile, freezing": (False, FROZEN, functools.partial(_inductor, freezing=True)),
}


def overlap(setup: Setup) -> Iterator[Measurement]:
    """The engine batch by batch, beside a pipeline of pinned memory on three streams."""
    for width, side, count in TINY_SIZES if setup.is_tiny else SIZES:
        call = functools.partial(_overlap, setup, width, side, count)
        yield f"width {width} batch {count}", call


def _overlap(setup: Setup, width: int, side: int, count: int) -> dict[str, Any]:
    engine = engine_of(setup, width, "bfloat16")
    batches = [batch_of(engine.header, count, side, seed=seed) for seed in range(12)]
    images = len(batches) * count

    def one_by_one() -> None:
        for batch in batches:
            engine.run(batch)

    found = {"one by one images/s": images / setup.wall_ms(one_by_one, 3) * 1e3}
    found["network alone images/s"] = count / _network_ms(setup, engine, count, side) * 1e3
    if setup.is_cuda:
        want = [[result.mask_HW for result in engine.run(batch)] for batch in batches]
        got = overlapped(engine, batches)
        found["same masks"] = all(
            (mask == one).all()
            for masks, ones in zip(want, got, strict=True)
            for mask, one in zip(masks, ones, strict=True)
        )
        pipeline_ms = setup.wall_ms(lambda: overlapped(engine, batches), 3)
        found["overlapped images/s"] = images / pipeline_ms * 1e3
    return found


def _network_ms(setup: Setup, engine: Engine, count: int, side: int) -> float:
    x_NCHW = input_of(setup, engine, count, side)
    with torch.inference_mode():
        return setup.device_ms(lambda: engine.network(x_NCHW))
