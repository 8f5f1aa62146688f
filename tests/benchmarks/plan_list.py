"""How long it takes to plan a list of N objects, and what it costs in memory.

    python -m tests.benchmarks.plan_list [--rows 2000000]

Writes a Parquet list of made-up URIs, drafts its manifest as ``predict`` does, and prints seconds,
peak resident memory and the size of the manifest. Nothing listed is opened.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from unet_core.config import InputConfig
from unet_core.inputs import list_shards, open_source
from unet_core.manifest import draft

STEP = 500_000


def write_list(path: Path, rows: int) -> None:
    """URIs as long as real ones, with sizes and etags."""
    schema = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("etag", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, rows, STEP):
            numbers = range(first, min(first + STEP, rows))
            uris = [f"s3://archive/plates/{n // 9600:06d}/well-{n % 9600:04d}.png" for n in numbers]
            etags = [f"{n * 2654435761 % 2**64:016x}{n:016x}" for n in numbers]
            sizes = [100_000 + n % 50_000 for n in numbers]
            writer.write_table(pa.table([uris, sizes, etags], schema=schema))


def main() -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.parquet"
        write_list(path, rows)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        config = InputConfig(uri=str(path), format="list", allow=["s3://archive/plates"])
        with draft(list_shards(open_source(config))) as made:
            seconds = time.perf_counter() - start
            made.file.seek(0, os.SEEK_END)
            size, shards = made.file.tell(), len(made.heads)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{rows:,} rows, {shards:,} shards: {seconds:.1f} s, peak {peak / 2**20:.2f} GiB "
          f"(before planning {before / 2**20:.2f}), manifest {size / 1e6:.1f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
