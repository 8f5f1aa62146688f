"""How long it takes to plan an input of N objects, and what it costs in memory.

    python -m tests.benchmarks.planning list [--count 2000000]
    python -m tests.benchmarks.planning tars [--count 1000000]

``list``: a Parquet list of made-up URIs, none of them opened. ``tars``: a folder of empty tars.
Drafts the manifest and the dispatcher's scheduler as ``predict`` does, and prints seconds,
peak resident memory and the size of the manifest.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.scheduler.scheduler import Scheduler
from unet_core.config.predict import ErrorsConfig
from unet_core.config.sections import InputConfig, StorageConfig
from unet_core.inputs.formats import list_shards, open_source
from unet_core.runs.manifest import draft

STEP = 500_000
TARS_PER_FOLDER = 1000


def write_list(root: Path, count: int) -> InputConfig:
    """URIs as long as real ones, with sizes and etags."""
    schema = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("etag", pa.string())])
    path = root / "list.parquet"
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, count, STEP):
            numbers = range(first, min(first + STEP, count))
            uris = [f"s3://archive/plates/{n // 9600:06d}/well-{n % 9600:04d}.png" for n in numbers]
            etags = [f"{n * 2654435761 % 2**64:016x}{n:016x}" for n in numbers]
            sizes = [100_000 + n % 50_000 for n in numbers]
            writer.write_table(pa.table([uris, sizes, etags], schema=schema))
    return InputConfig(uri=str(path), format="list", allow=["s3://archive/plates"])


def write_tars(root: Path, count: int) -> InputConfig:
    """Empty files: planning opens none."""
    for number in range(count):
        if number % TARS_PER_FOLDER == 0:
            folder = root / f"{number // TARS_PER_FOLDER:06d}"
            folder.mkdir()
        (folder / f"images-{number:08d}.tar").touch()
    return InputConfig(uri=str(root))


def main() -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["list", "tars"])
    parser.add_argument("--count", type=int)
    arguments = parser.parse_args()
    write, usual = {"list": (write_list, 2_000_000), "tars": (write_tars, 1_000_000)}[
        arguments.kind
    ]
    count = arguments.count or usual
    with tempfile.TemporaryDirectory() as folder:
        config = write(Path(folder), count)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        with draft(list_shards(open_source(config))) as made:
            shards = len(Scheduler.of(made.heads, ErrorsConfig(), StorageConfig()).waiting)
            seconds = time.perf_counter() - start
            made.file.seek(0, os.SEEK_END)
            size = made.file.tell()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{count:,} objects, {shards:,} shards: {seconds:.1f} s, peak {peak / 2**20:.2f} GiB "
          f"(before planning {before / 2**20:.2f}), manifest {size / 1e6:.1f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
