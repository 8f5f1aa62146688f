"""The plain PyTorch loop that a person would write, beside ``predict`` inline: the same images, the
same folded model, one Parquet file.

    python -m tests.benchmarks.plain_loop IMAGES [--checkpoint C] [--rounds 5]

Prints the wall seconds of both in turn, without imports, and the ratio of their medians.
"""

import argparse
import io
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from jobs.predict import predict
from unet_core.config import PredictConfig, build
from unet_core.networks import checkpoint
from unet_core.networks.unet import fold_batchnorm

PERCENTILES = (1, 99.8)
"""What a checkpoint means that names none."""


def plain_loop(images: Path, name: str, out: Path) -> int:
    """One image after the other, then one table; returns the pixels of class 1."""
    network, header = checkpoint.load(name)
    network = fold_batchnorm(network).to(memory_format=torch.channels_last)
    rows = []
    for path in sorted(images.rglob("*.png")):
        gray = np.asarray(Image.open(path).convert("L"))
        wanted = header.preprocessing
        ends = (
            1 if wanted.low is None else wanted.low,
            99.8 if wanted.high is None else wanted.high,
        )
        low, high = np.percentile(gray, ends)
        x = (gray.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-6))
        height, width = x.shape
        x = np.pad(x, ((0, -height % 16), (0, -width % 16)), mode="reflect")
        with torch.inference_mode():
            x_NCHW = torch.from_numpy(x)[None, None].contiguous(memory_format=torch.channels_last)
            logits = network(x_NCHW)
        mask = (torch.sigmoid(logits[0, 0]) > 0.5).numpy()[:height, :width].astype(np.uint8)
        rows.append({"image": path.name, "height": height, "width": width, "mask": mask.tobytes()})
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    out.write_bytes(sink.getvalue())
    return sum(int(np.frombuffer(row["mask"], np.uint8).sum()) for row in rows)


def ours(images: Path, name: str, out: Path) -> int:
    """The job, inline; returns pixels of class 1."""
    table = {"input": {"uri": str(images)}, "model": {"checkpoint": name},
             "output": {"uri": str(out), "report": False},
             "workers": {"count": "inline"}}  # fmt: skip
    return predict(build(PredictConfig, table, [])).totals.class_pixels[1]


def main() -> None:
    """Run both in turn and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--checkpoint", default="builtin:nuclei")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"plain loop": [], "predict inline": []}
    for number in range(options.rounds + 1):
        scratch = Path(tempfile.mkdtemp())
        for label, work in (("plain loop", plain_loop), ("predict inline", ours)):
            start = time.perf_counter()
            pixels = work(options.images, options.checkpoint, scratch / label.replace(" ", "_"))
            if number:  # the first round warms up
                seconds[label].append(time.perf_counter() - start)
        shutil.rmtree(scratch)
        print(f"round {number}: class 1 has {pixels} pixels")
    for label, times in seconds.items():
        print(f"{label:15} {statistics.median(times):.2f} s  ({min(times):.2f}–{max(times):.2f})")
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"ratio           {statistics.median(ratios):.2f}  ({min(ratios):.2f}–{max(ratios):.2f})")


if __name__ == "__main__":
    main()
