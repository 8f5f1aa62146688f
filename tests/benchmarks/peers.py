"""``predict`` beside what people use instead: the same images and weights, each writing Parquet.

    python -m tests.benchmarks.peers [IMAGES] [--rounds 5] [--only small short ...] [--page PAGE.md]

All take turns; the first round warms up. Without imports and the start of Ray, everything counts,
from the checkpoint's file to masks on disk. With IMAGES, a folder of gray PNGs, ``builtin:nuclei``
segments these; else images are made.
"""

import argparse
import contextlib
import importlib.util
import io
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jobs.predict import predict
from tests.benchmarks.peers_page import Found, rewrite
from tests.data import write_checkpoint
from tests.foreign import declare_torchvision
from unet_core import open_run
from unet_core.arrays import Array
from unet_core.config import PredictConfig, build
from unet_core.networks import checkpoint
from unet_core.networks.presets import Factory, NetworkSpec, UNetSpec
from unet_core.networks.unet import fold_batchnorm
from unet_core.synthetic import nuclei, png

SMP = Factory("tests.foreign:smp_unet", {"encoder_name": "resnet18", "in_channels": 1}, 1)


CORES = len(os.sched_getaffinity(0))
RAY = "on Ray"
SETTLE_S = 2.0
"""Actors of the one before take so long to end."""


@dataclass(frozen=True)
class Case:
    """Images of one size, and the network that segments them."""

    name: str
    about: str
    images: int
    side: int
    network: NetworkSpec | None = None
    """None: ``builtin:nuclei``, which is ``padded`` of width 8."""
    window: int = 512
    """Of MONAI; 0 leaves it out."""
    on_ray: bool = False


CASES = (
    Case("small", "many small images", 200, 256, window=256, on_ray=True),
    Case("short", "a short job", 20, 256, window=256, on_ray=True),
    Case("wide", "the model dominates", 4, 512, UNetSpec(in_channels=1, width=32)),
    Case("large", "images larger than a tile", 2, 2000),
    Case("smp", "smp.Unet of resnet18", 6, 512, SMP, window=0),
)


@dataclass(frozen=True)
class Work:
    """What everybody is given."""

    case: Case
    images: Path
    checkpoint: str
    has_back_end: bool = False
    """Ours: BatchNorm folded, channels last."""

    @property
    def paths(self) -> list[Path]:
        return sorted(self.images.rglob("*.png"))

    @property
    def factory(self) -> str:
        network = self.case.network
        return network.factory if isinstance(network, Factory) else ""

    @property
    def step(self) -> int:
        """Sides must be a multiple of it."""
        return checkpoint.read_header(self.checkpoint).tiling.sides.step

    def load(self) -> nn.Module:
        network = checkpoint.load_model(self.checkpoint, self.factory)
        if self.has_back_end:
            network = fold_batchnorm(network).to(memory_format=torch.channels_last)
        return network


def plain_loop(work: Work, out: Path) -> None:
    """One image after the other, then one file."""
    network, step = work.load(), work.step
    rows = []
    with torch.inference_mode():
        for path in work.paths:
            gray_HW = np.asarray(Image.open(path).convert("L"))
            x_NCHW = torch.from_numpy(padded(normalised(gray_HW), step))[None, None]
            mask_HW = torch.sigmoid(network(x_NCHW))[0, 0] > 0.5
            height, width = gray_HW.shape
            rows.append(row(path, mask_HW[:height, :width].numpy().astype(np.uint8)))
    pq.write_table(pa.Table.from_pylist(rows), out)


class Images(torch.utils.data.Dataset[tuple[Array, str, tuple[int, int]]]):
    """As tutorials of torch begin."""

    def __init__(self, paths: list[Path], step: int) -> None:
        self.paths, self.step = paths, step

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Array, str, tuple[int, int]]:
        gray_HW = np.asarray(Image.open(self.paths[index]).convert("L"))
        x_CHW = padded(normalised(gray_HW), self.step)[None]
        return x_CHW, str(self.paths[index]), gray_HW.shape


def data_loader(work: Work, out: Path) -> None:
    """The same with two processes that decode."""
    network, images = work.load(), Images(work.paths, work.step)
    rows = []
    with torch.inference_mode():
        for x_NCHW, paths, (heights, widths) in torch.utils.data.DataLoader(images, num_workers=2):
            masks_NHW = (torch.sigmoid(network(x_NCHW))[:, 0] > 0.5).numpy().astype(np.uint8)
            for mask_HW, path, height, width in zip(masks_NHW, paths, heights, widths, strict=True):
                rows.append(row(Path(path), mask_HW[:height, :width]))
    pq.write_table(pa.Table.from_pylist(rows), out)


def monai(work: Work, out: Path) -> None:
    """As its tutorials evaluate: transforms, its loader, windows that overlap by a quarter."""
    from monai.data import DataLoader, Dataset, PILReader, decollate_batch
    from monai.inferers import sliding_window_inference
    from monai.transforms import Activations, AsDiscrete, Compose, LoadImage
    from monai.transforms import ScaleIntensityRangePercentiles as Scale

    reader = PILReader(reverse_indexing=False)
    load = Compose([LoadImage(reader=reader, ensure_channel_first=True), Scale(1, 99.8, 0, 1)])
    finish = Compose([Activations(sigmoid=True), AsDiscrete(threshold=0.5)])
    loader = DataLoader(Dataset(work.paths, load), batch_size=1, num_workers=1)
    network = work.load()
    rows = []
    with torch.inference_mode():
        for x_NCHW in loader:
            logits = sliding_window_inference(x_NCHW, work.case.window, 4, network)
            for mask_CHW in map(finish, decollate_batch(logits)):
                path = Path(mask_CHW.meta["filename_or_obj"])
                rows.append(row(path, mask_CHW[0].numpy().astype(np.uint8)))
    pq.write_table(pa.Table.from_pylist(rows), out)


class RaySegmenter:
    """What an actor of Ray Data does with a batch."""

    def __init__(self, work: Work) -> None:
        self.network, self.step = work.load(), work.step

    def __call__(self, batch: dict[str, Array]) -> pa.Table:
        rows = []
        with torch.inference_mode():
            for gray_HW, path in zip(batch["image"], batch["path"], strict=True):
                x_NCHW = torch.from_numpy(padded(normalised(gray_HW), self.step))[None, None]
                mask_HW = torch.sigmoid(self.network(x_NCHW))[0, 0] > 0.5
                height, width = gray_HW.shape
                rows.append(row(Path(path), mask_HW[:height, :width].numpy().astype(np.uint8)))
        return pa.Table.from_pylist(rows)


def ray_data(work: Work, out: Path) -> None:
    """Read, map over a pool of actors, write, as Ray's guide to batch inference does."""
    import ray

    data = ray.data.read_images(str(work.images), include_paths=True, mode="L")
    data = data.map_batches(
        RaySegmenter,
        fn_constructor_args=(work,),
        # faster than one actor of a whole core and a core to read with
        compute=ray.data.ActorPoolStrategy(size=CORES),
        num_cpus=0.5,
        batch_size=8,
    )
    data.write_parquet(str(out))


def ours(work: Work, out: Path, count: str | int = "inline", report: bool = False) -> None:
    """The whole job."""
    table = {
        "input": {"uri": str(work.images)},
        "model": {"checkpoint": work.checkpoint, "factory": work.factory},
        "output": {"uri": str(out), "report": report},
        "workers": {"count": count},
    }
    with contextlib.redirect_stderr(io.StringIO()):  # its progress
        assert predict(build(PredictConfig, table, [])).is_complete


def normalised(gray_HW: Array) -> Array:
    """Percentiles 1 and 99.8 become 0 and 1; float32."""
    low, high = np.percentile(gray_HW, (1, 99.8))
    return (gray_HW.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-6))


def padded(x_HW: Array, step: int) -> Array:
    """Reflected at the far edges to sides that the network takes."""
    height, width = x_HW.shape
    return np.pad(x_HW, ((0, -height % step), (0, -width % step)), mode="reflect")


def row(path: Path, mask_HW: Array) -> dict[str, Any]:
    height, width = mask_HW.shape
    return {"image": path.name, "height": height, "width": width, "mask": mask_HW.tobytes()}


@dataclass(frozen=True)
class Contender:
    """Somebody who can do the work."""

    name: str
    run: Callable[[Work, Path], None]
    has_back_end: bool = False
    needs: str = "torch"
    """A library."""

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


INLINE = Contender("`predict` inline", ours)
HERE = (
    INLINE,
    Contender("`predict` inline, with its report", partial(ours, report=True)),
    Contender("plain loop", plain_loop),
    Contender("plain loop, our back end", plain_loop, True),
    Contender("loop over DataLoader", data_loader),
    Contender("MONAI", monai, False, "monai"),
    Contender("MONAI, our back end", monai, True, "monai"),
)
ACTORS = Contender("`predict`, one actor of all cores", partial(ours, count=1))
ON_RAY = (
    ACTORS,
    Contender("`predict`, two actors", partial(ours, count=2)),
    Contender("`predict` inline, beside Ray", ours),
    Contender("Ray Data", ray_data, False, "ray.data"),
    Contender("Ray Data, our back end", ray_data, True, "ray.data"),
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
