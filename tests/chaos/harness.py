"""Run the cells and say what was found.

python -m tests.chaos --seed 1 --runs 20 [--cells 'driver/*,late'] [--plant swap-parts]
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

from tests.chaos import table
from tests.chaos.cells import KINDS, Bench, Case, Cell, Result, chosen
from tests.chaos.faults import PLANTS

FINDERS = {
    "swap-parts": "driver/before-masks",
    "no-rename": "driver/inside-metrics",
    "charge-innocent": "actor/decoding",
    "count-twice": "two/start",
}
"""Cells that must find each planted bug."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="what everything is drawn from")
    parser.add_argument("--runs", type=int, default=20, help="runs of each cell")
    parser.add_argument("--only", type=int, help="this run alone, with its number")
    parser.add_argument("--cells", default="*", help="names or beginnings, with * and commas")
    parser.add_argument("--plant", choices=[*PLANTS, "all"], help="a bug that must be found")
    parser.add_argument("--keep", type=Path, help="work there, and keep runs that have findings")
    parser.add_argument("--list", action="store_true", help="only name the cells")
    arguments = parser.parse_args()
    if arguments.list:
        for cell in chosen(arguments.cells):
            print(cell.name)
        return
    if arguments.plant == "all":
        missed = [bug for bug in PLANTS if not _is_found(bug, arguments)]
        sys.exit(bool(missed))
    work = arguments.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        sys.exit(not run(arguments, work.resolve()))
    finally:
        if not arguments.keep:
            shutil.rmtree(work, ignore_errors=True)


def _is_found(bug: str, arguments: argparse.Namespace) -> bool:
    """Whether the cells that must find a planted bug do, and are clean without it."""
    command = [
        sys.executable, "-m", "tests.chaos", "--seed", str(arguments.seed),
        "--runs", str(arguments.runs), "--cells", FINDERS[bug],
    ]  # fmt: skip
    done = subprocess.run([*command, "--plant", bug], check=False, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    is_found = done.returncode == 1 and bool(found)
    print(f"{bug}: {'found' if is_found else 'MISSED'} by {FINDERS[bug]}", flush=True)
    print("\n".join(found[:2]) if is_found else done.stdout + done.stderr, flush=True)
    return is_found


def run(arguments: argparse.Namespace, work: Path) -> bool:
    """Run the chosen cells; returns whether all of them are clean."""
    cells = chosen(arguments.cells)
    if not cells:
        print(f"no cell fits {arguments.cells}")
        return False
    plants = (arguments.plant,) if arguments.plant else ()
    command = f"python -m tests.chaos --seed {arguments.seed}"
    command += "".join(f" --plant {bug}" for bug in plants)
    width = max(len(cell.name) for cell in cells)
    print(command, f"--runs {arguments.runs}", flush=True)
    print(table.line(table.HEAD, width), flush=True)
    results: dict[str, dict[int, Result]] = defaultdict(dict)
    numbers = range(arguments.runs) if arguments.only is None else [arguments.only]
    bench = Bench(work, arguments.seed, plants)
    start = time.monotonic()
    try:
        for cell in cells:
            for number in numbers:
                result = results[cell.name][number] = perform(bench, cell, number)
                if plants and not result.is_clean:
                    break
            print(table.line(table.row(cell, [*results[cell.name].values()]), width), flush=True)
    finally:
        bench.close()
    done = {cell: results[cell.name] for cell in cells if cell.name in results}
    for cell, of_cell in done.items():
        print(*table.findings(cell, of_cell, command), sep="\n", end="\n" * (not _clean(of_cell)))
    runs = [*itertools.chain.from_iterable(r.values() for r in done.values())]
    dirty = sum(not result.is_clean for result in runs)
    print(f"{len(runs)} runs of {len(done)} cells in {time.monotonic() - start:.0f} s, "
          f"{dirty} with findings")  # fmt: skip
    return all(map(_clean, done.values()))


def _clean(results: dict[int, Result]) -> bool:
    return table.is_clean([*results.values()])


def perform(bench: Bench, cell: Cell, number: int) -> Result:
    """One run; whatever breaks the harness itself is a finding too."""
    try:
        return cell.perform(Case(bench, cell, number))
    except (OSError, RuntimeError) as error:
        result = Result(fired=False)
        result.findings[KINDS[-1]].append(f"the harness met {type(error).__name__}: {error}")
        return result
