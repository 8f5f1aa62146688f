"""Resident memory of ``predict`` inline over very many small images, and what a shard costs.

    python -m tests.benchmarks.memory [--images 100000] [--shards 100] [--plot docs/memory.png]
    python -m tests.benchmarks.memory --images 10000 --shards 10000

Gray PNGs of 64² in tars that it makes itself; memory is read at each commit.
"""

import argparse
import io
import logging
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from jobs.predict import predict
from unet_core.config.loading import build
from unet_core.config.predict import PredictConfig
from unet_core.synthetic import nuclei, png

SIDE = 64
DISTINCT = 64
WARM = 0.1
"""The share of the images that a run has done when its buffers are as large as they get."""


def write_tars(root: Path, images: int, shards: int) -> None:
    """So many images, evenly in so many tars."""
    random = np.random.default_rng(0)
    files = [png(nuclei(SIDE, SIDE, random)[0]) for _ in range(DISTINCT)]
    for shard, numbers in enumerate(np.array_split(np.arange(images), shards)):
        with tarfile.open(root / f"{shard:06d}.tar", "w") as tar:
            for number in numbers:
                info = tarfile.TarInfo(f"{number:08d}.png")
                info.size = len(files[number % DISTINCT])
                tar.addfile(info, io.BytesIO(files[number % DISTINCT]))


class Watch(logging.Handler):
    """Notes images done, and resident MiB, at every commit."""

    def __init__(self) -> None:
        super().__init__()
        self.images = [0]
        self.resident_MiB = [resident()]

    def emit(self, record: logging.LogRecord) -> None:
        """A shard was committed."""
        _, images, _ = record.args
        self.images.append(self.images[-1] + images)
        self.resident_MiB.append(resident())


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def main() -> None:
    """Make the images, segment them, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--plot", help="a PNG to write")
    options = parser.parse_args()
    watch, log = Watch(), logging.getLogger("unet_core.inference.shard_segmenter")
    log.addHandler(watch)
    log.setLevel(logging.INFO)
    log.propagate = False
    with tempfile.TemporaryDirectory() as scratch:
        tars = Path(scratch, "tars")
        tars.mkdir()
        write_tars(tars, options.images, options.shards)
        table = {"input": {"uri": str(tars)}, "output": {"uri": f"{scratch}/run", "report": False},
                 "model": {"checkpoint": "builtin:nuclei"},
                 "workers": {"count": "inline"}}  # fmt: skip
        start, cpu = time.perf_counter(), time.process_time()
        totals = predict(build(PredictConfig, table, [])).totals
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert totals.ok == options.images
    warm = [MiB for done, MiB in zip(watch.images, watch.resident_MiB, strict=True)
            if done >= WARM * options.images]  # fmt: skip
    each = " and ".join(f"{1e3 * cpu / n:.2f} ms" for n in (options.images, options.shards))
    print(f"{options.images} images in {options.shards} shards: {seconds:.0f} s; "
          f"CPU of an image and of a shard: {each}")  # fmt: skip
    print(f"resident MiB: {warm[0]:.0f} after {WARM:.0%} of the images, "
          f"{warm[-1]:.0f} at the end, at most {max(watch.resident_MiB):.0f}")  # fmt: skip
    if options.plot:
        plot(watch, options.plot)


def plot(watch: Watch, path: str) -> None:
    """Resident memory over images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(watch.images, watch.resident_MiB)
    axes.set(ylim=(0, None), xlabel="images done", ylabel="resident memory, MiB")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
