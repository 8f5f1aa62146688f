"""``predict`` beside what people use instead: the same images and weights, each writing Parquet.

    python -m tests.benchmarks.peers [IMAGES] [--rounds 5] [--only small short ...] [--page PAGE.md]

All take turns; the first round warms up. Without imports and the start of Ray, everything counts,
from the checkpoint's file to masks on disk. With IMAGES, a folder of gray PNGs, ``builtin:nuclei``
segments these; else images are made.
"""

import argparse
import contextlib
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, set_start_method
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.contenders import HERE, ON_RAY, Case, Contender, Work, monai
from tests.benchmarks.peers_page import Found, rewrite
from tests.support.data import write_checkpoint
from tests.support.foreign import declare_torchvision
from unet_core import open_run
from unet_core.arrays import Array
from unet_core.config.presets import Factory, UNetSpec
from unet_core.synthetic import nuclei, png

SMP = Factory("tests.support.foreign:smp_unet", {"encoder_name": "resnet18", "in_channels": 1}, 1)
RAY = "on Ray"
SETTLE_S = 2.0
"""Actors of the one before take so long to end."""


CASES = (
    Case("small", "many small images", 200, 256, window=256, on_ray=True),
    Case("short", "a short job", 20, 256, window=256, on_ray=True),
    Case("wide", "the model dominates", 4, 512, UNetSpec(in_channels=1, width=32)),
    Case("large", "images larger than a tile", 2, 2000),
    Case("smp", "smp.Unet of resnet18", 6, 512, SMP, window=0),
)


def place(group: str) -> Executor:
    """Where a contender works: a process of its own, since ``predict`` has glibc keep freed memory,
    which others would gain from; on Ray this one, which holds the session.
    """
    return ThreadPoolExecutor(1) if group == RAY else ProcessPoolExecutor(1, get_context("spawn"))


def timed(contender: Contender, work: Work, out: Path) -> float:
    """Seconds for all of it."""
    declare_torchvision()
    set_start_method("fork", force=True)  # a spawned process would spawn those that load data
    start = time.perf_counter()
    contender.run(work, out)
    return time.perf_counter() - start


def measured(work: Work, group: str, contenders: list[Contender], rounds: int) -> Iterator[Found]:
    """Let all take turns; the first one is what the others are compared with."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    differing: dict[str, float] = {}
    wanted: dict[str, Array] = {}
    with contextlib.ExitStack() as stack:
        places = {c.name: stack.enter_context(place(group)) for c in contenders}
        for number in range(rounds + 1):
            first = number % len(contenders)  # nobody always follows the same one
            for contender in contenders[first:] + contenders[:first]:
                time.sleep(SETTLE_S if group == RAY else 0)
                with tempfile.TemporaryDirectory() as scratch:
                    out = Path(scratch) / "out"
                    given = replace(work, has_back_end=contender.has_back_end)
                    taken = places[contender.name].submit(timed, contender, given, out)
                    seconds[contender.name].append(taken.result())
                    if not number:
                        masks = masks_in(out)
                        wanted = wanted or masks
                        differing[contender.name] = difference(wanted, masks)
    base = seconds[contenders[0].name][1:]
    for name, (_, *taken) in seconds.items():
        ratios = [mine / first for mine, first in zip(taken, base, strict=True)]
        yield Found(work.case.name, group, name, taken, ratios, differing[name])


def masks_in(out: Path) -> dict[str, Array]:
    """Masks by file name, whoever wrote them."""
    if (out / "run.json").exists():
        run = open_run(str(out))
        return {Path(i).name: run.mask(i) for i in run.metrics["image_id"].to_pylist()}
    rows = pa.dataset.dataset(out, format="parquet").to_table().to_pylist()
    return {
        row["image"]: np.frombuffer(row["mask"], np.uint8).reshape(row["height"], row["width"])
        for row in rows
    }


def difference(wanted: dict[str, Array], masks: dict[str, Array]) -> float:
    """Share of pixels that differ."""
    assert wanted.keys() == masks.keys()
    wrong = sum(int((wanted[name] != masks[name]).sum()) for name in wanted)
    return wrong / sum(mask.size for mask in wanted.values())


def prepared(case: Case, root: Path, images: Path | None) -> Work:
    """Images and a checkpoint in a scratch folder."""
    folder = root / case.name
    folder.mkdir()
    made = 0 if images else case.images
    for number in range(made):
        gray_HW, _ = nuclei(case.side, case.side, np.random.default_rng(number))
        (folder / f"{number:04d}.png").write_bytes(png(gray_HW))
    name = "builtin:nuclei"
    if case.network is not None:
        name = write_checkpoint(root / f"{case.name}.safetensors", case.network)
    return Work(case, images or folder, name)


def gflop_per_megapixel(work: Work) -> float:
    """Of one pass, two for each multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        work.load().to("meta")(torch.zeros(1, 1, 256, 256, device="meta"))
    return counter.get_total_flops() / 1e9 / 0.256**2


def compared(
    works: list[Work], group: str, contenders: tuple[Contender, ...], rounds: int
) -> list[Found]:
    """Everybody who is installed, on all cases; printed as it comes."""
    here = [contender for contender in contenders if contender.is_installed]
    for missing in sorted({c.needs for c in contenders} - {c.needs for c in here}):
        print(f"{missing} is not installed: left out")
    found = []
    for work in works:
        print(f"\n{described(work)}", flush=True)
        fitting = [c for c in here if c.run is not monai or work.case.window]
        for result in measured(work, group, fitting, rounds):
            found.append(result)
            middle = statistics.median(result.seconds)
            print(f"{result.name:36} {middle:7.2f} s  {result.ratio:20} "
                  f"{result.differing:.1e} differ", flush=True)  # fmt: skip
    return found


def described(work: Work) -> str:
    case = work.case
    images = f"{len(work.paths)} images" + (f" of {case.side}²" if case.side else "")
    return f"{case.name}, {case.about}: {images}, {gflop_per_megapixel(work):.0f} GFLOP per Mpx"


def main() -> None:
    """Measure, print, and write the page if there is one."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--without", choices=["inline", "ray"])
    parser.add_argument("--page", type=Path, help="whose tables and picture are made anew")
    options = parser.parse_args()
    declare_torchvision()
    cases = [case for case in CASES if case.name in options.only]
    if options.images:
        cases = [Case("given", "your images", 0, 0)]
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        works = [prepared(case, Path(scratch), options.images) for case in cases]
        if options.without != "inline":
            found += compared(works, "one process", HERE, options.rounds)
        on_ray = [work for work in works if work.case.on_ray]
        if on_ray and options.without != "ray":
            start_ray()
            found += compared(on_ray, RAY, ON_RAY, options.rounds)
        if options.page:
            rewrite(options.page, found, [f"- {described(work)}" for work in works])


def start_ray() -> None:
    """One local session for everybody, with Ray's own size of its object store."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    started = time.perf_counter()
    ray.init(address="local", include_dashboard=False, log_to_driver=False,
             logging_level=logging.ERROR)  # fmt: skip
    print(f"\nRay started in {time.perf_counter() - started:.1f} s, which count for nobody")
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
