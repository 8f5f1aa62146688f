"""The command: execute the scenarios with two trees, compare what they wrote, print a table."""

import argparse
import os
import sys
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path

from tests.tools.bytes import scenarios
from tests.tools.bytes.allowances import ALLOWED, given
from tests.tools.bytes.comparison import Comparison, compare
from tests.tools.bytes.execution import Place, Scenarios, copy_packages
from tests.tools.bytes.inputs import write_inputs

HERE = Path(__file__).resolve().parents[3]


def main(words: list[str]) -> int:
    """Compare two trees; returns the exit code."""
    options = arguments(words)
    chosen = chosen_scenarios(options)
    with tempfile.TemporaryDirectory(prefix="bytes-") as folder:
        work = (options.keep or Path(folder)).resolve()
        if work.exists() and any(work.iterdir()):
            print(f"{work} is not empty; choose a new folder", file=sys.stderr)
            return 2
        found = executed(options, chosen, work)
    print_table(found, (str(options.base), str(options.other)))
    return 0 if found.is_clean else 1


def arguments(words: list[str]) -> argparse.Namespace:
    """Options of the command line; ends the process for wrong ones."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.bytes", description=__doc__)
    parser.add_argument("base", type=Path, help="a source tree")
    parser.add_argument("other", type=Path, nargs="?", default=HERE, help="else this one")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="GLOB=REASON",
        help="files of this comparison that may differ or be only in one",
    )
    parser.add_argument("--only", default="*", metavar="GLOB", help="of the scenarios' names")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where all files stay: a, b, data")
    parser.add_argument("--seed", type=int, default=1, help="of the inputs")
    parser.add_argument("--large", action="store_true", help="also an image read by window")
    parser.add_argument("--ray", action="store_true", help="also with actors on Ray")
    options = parser.parse_args(words)  # fmt: skip
    for tree in (options.base, options.other):
        if not (tree / "jobs").is_dir():
            parser.error(f"{tree} is no source tree: it has no jobs/")
    try:
        options.allow = given(options.allow)
    except ValueError as error:
        parser.error(str(error))
    return options


def chosen_scenarios(options: argparse.Namespace) -> Scenarios:
    """Scenarios that were asked for."""
    known = {
        **scenarios.SCENARIOS,
        **(scenarios.LARGE if options.large else {}),
        **(scenarios.RAY if options.ray else {}),
    }
    return {name: known[name] for name in known if fnmatchcase(name, options.only)}


def executed(options: argparse.Namespace, chosen: Scenarios, work: Path) -> Comparison:
    """The files of both trees, written at the same place one after the other, and compared."""
    write_inputs(work / "data", options.seed, options.large)
    for name, tree in (("a", options.base), ("b", options.other)):
        place = Place(work / "tree", work / "data", work / "out")
        copy_packages(tree.resolve(), place.tree)
        if name == "a":
            prepare(place)
        began = time.monotonic()
        place.run(chosen)
        print(f"{tree}: {len(chosen)} scenarios in {time.monotonic() - began:.0f} s", flush=True)
        place.tree.rename(work / f"tree-{name}")
        place.out.rename(work / name)
    return compare(work / "a", work / "b", ALLOWED, options.allow)


def prepare(place: Place) -> None:
    """Write what both trees read with the code of one; raises RuntimeError if that fails."""
    for command in scenarios.PREPARED:
        said = place.say(command, place.data)
        if not said.startswith(b"exit code 0"):
            raise RuntimeError(f"{command}: {said.decode()}")


def print_table(found: Comparison, trees: tuple[str, str]) -> None:
    """Say what differs, where first, and what may."""
    for name, where in found.different.items():
        print(f"\nDIFFERS {name}")
        print("\n".join(f"    {line}" for line in where.splitlines()))
    for tree, names in zip(trees, found.only_in, strict=True):
        print("".join(f"\nONLY IN {tree}: {name}" for name in names), end="")
    print(f"\n{'files':>7}")
    print(f"{found.files:7,} in all")
    print(f"{found.same:7,} the same to the byte")
    for reason, names in found.allowed.items():
        print(f"{len(names):7,} allowed to differ, as {_kind(reason)}: {reason}")
    print(f"{len(found.different):7,} differ")
    for tree, names in zip(trees, found.only_in, strict=True):
        print(f"{len(names):7,} only in {tree}")


def _kind(reason: str) -> str:
    """The glob of an allowance, of those that are always there."""
    return next((a.glob for a in ALLOWED if a.reason == reason), "asked for")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads of Arrow or torch may abort a process that ends, and its exit code
