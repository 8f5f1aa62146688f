"""The command line of ``python -m tests.tools.gpu_day``."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from tests.tools.gpu_day.day import Day, Section, Setup
from tests.tools.gpu_day.machine import casts, device
from tests.tools.gpu_day.model import forward, memory, overlap, shapes, variants
from tests.tools.gpu_day.results import correct, same
from tests.tools.gpu_day.runs import host, isolation, job, ray, train

SECTIONS: dict[str, Section] = {
    section.__name__: section
    for section in (
        device, casts, correct, same, forward, shapes, memory, variants, overlap, host,
        isolation, job, train, ray,
    )
}  # fmt: skip


def main() -> int:
    """Measure; returns 1 if a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.gpu_day")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run")
    parser.add_argument("--tiny", action="store_true", help="networks and images of a dry run")
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="folder of the figures")
    parser.add_argument("--budget", type=float, default=1500, help="seconds for all sections")
    asked = parser.parse_args()
    if unknown := set(asked.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if asked.tiny:
        torch.set_num_threads(1)  # more of them cost more than they bring
        os.environ["OMP_NUM_THREADS"] = "1"  # of child processes
    day = Day(asked.out, asked.budget)
    with tempfile.TemporaryDirectory(prefix="gpu-day-") as scratch:
        setup = Setup(asked.device, asked.tiny, os.cpu_count() or 1, scratch, str(asked.out))
        for name in asked.sections or SECTIONS:
            day.measure(name, SECTIONS[name](setup))
    print(day.summary())
    return 1 if day.failures else 0


if __name__ == "__main__":
    sys.exit(main())
