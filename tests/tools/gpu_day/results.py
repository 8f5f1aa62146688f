"""Sections on what the engine gives: right, and the same every time."""

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from tests.tools.gpu_day.day import Measurement, Setup
from tests.tools.gpu_day.pieces import batch_of, digest, engine_of, trained_like
from unet_core.inference.engine import TileResult

MOST_DIFFERENT = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2}
"""Share of a mask's pixels that may differ from those of the CPU in float32."""
PRESETS = ("paper", "bilinear", "dilated", "valid3", "plain")


def correct(setup: Setup) -> Iterator[Measurement]:
    """The engine beside the CPU's in float32, with every option."""
    padded = itertools.product(
        ("padded",), (1, 3), ("uint8", "uint16", "float32"), ("none", "dihedral"),
        ("none", "uint8", "float16"),
    )  # fmt: skip
    others = itertools.product(PRESETS, (3,), ("uint8",), ("none",), ("float16",))
    cases = itertools.chain(padded, others)
    for case in itertools.islice(cases, 0, 18, 5) if setup.is_tiny else cases:
        for precision in setup.precisions:
            name = " ".join(map(str, (*case, precision)))
            yield name, functools.partial(_beside_the_cpu, setup, precision, *case)


def _beside_the_cpu(
    setup: Setup, precision: str, name: str, classes: int, dtype: str, tta: str, probabilities: str
) -> dict[str, float]:
    """Shares that differ; raises AssertionError if they are too large."""
    width, side = (2, 32) if setup.is_tiny else (8, 96)
    _, header = trained_like(width, classes, name=name)
    batch = batch_of(
        header, 3, header.tiling.sides.at_least(side + 2 * header.tiling.margin), dtype
    )
    how = {"tta": tta, "probabilities": probabilities}
    cpu = engine_of(setup, width, "float32", classes, name, torch.device("cpu"), **how)
    want = cpu.run(batch)
    got = engine_of(setup, width, precision, classes, name, **how).run(batch)
    pairs = list(zip(want, got, strict=True))
    found = {
        "pixels": max(float((x.mask_HW != y.mask_HW).mean()) for x, y in pairs),
        "confidence": max(abs(y.confidence_sum / x.confidence_sum - 1) for x, y in pairs),
    }
    assert all(result.is_finite for result in got), "some numbers are none"
    assert found["pixels"] <= MOST_DIFFERENT[precision], found
    return found


def same(setup: Setup) -> Iterator[Measurement]:
    """Bits: repeated, in another process, and elsewhere in a batch."""
    sizes = ((2, 32, 3),) if setup.is_tiny else ((64, 512, 32), (16, 512, 64), (8, 512, 64))
    for (width, side, count), precision in itertools.product(sizes, setup.precisions):
        call = functools.partial(_repeated, setup, width, side, count, precision)
        yield f"width {width} {precision}", call
    for (width, side, count), precision in itertools.product(sizes, setup.precisions):
        call = functools.partial(_elsewhere, setup, width, side, count, precision)
        yield f"width {width} {precision} in another process", call


def _repeated(setup: Setup, width: int, side: int, count: int, precision: str) -> dict[str, Any]:
    engine = engine_of(setup, width, precision)
    batch = batch_of(engine.header, count, side)
    first = engine.run(batch)
    seen = {digest(engine.run(batch)) for _ in range(3 if setup.is_tiny else 20)}
    turned = replace(batch, tiles_NCHW=batch.tiles_NCHW[::-1].copy())
    back = engine.run(turned)[::-1]
    half = engine.run(batch.part(slice(0, max(1, count // 2))))
    alone = engine.run(batch.part(slice(0, 1)))
    return {
        "repeats": seen == {digest(first)},
        "in reverse": all(map(_is_equal, first, back)),
        "half a batch": all(map(_is_equal, first, half)),
        "alone": _is_equal(first[0], alone[0]),
        "digest": digest(first),
    }


def _is_equal(one: TileResult, other: TileResult) -> bool:
    same_ids = np.array_equal(one.mask_HW, other.mask_HW)
    return same_ids and one.confidence_sum == other.confidence_sum


def _digest_of(setup: Setup, width: int, side: int, count: int, precision: str) -> str:
    engine = engine_of(setup, width, precision)
    return digest(engine.run(batch_of(engine.header, count, side)))


def _elsewhere(setup: Setup, width: int, side: int, count: int, precision: str) -> bool:
    """Whether a process of its own gives the same bits."""
    given = (setup, width, side, count, precision)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        other = pool.submit(_digest_of, *given)
        mine = _digest_of(*given)
        return other.result() == mine
