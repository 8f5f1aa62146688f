"""Execution of scenarios with the command line of one source tree, in fresh processes."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

Scenarios = dict[str, tuple[str, ...]]

ENDS_S = 600
PROCESSES = 2
FIXED = {
    "COLUMNS": "100",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}
KEPT = ("HOME", "LD_LIBRARY_PATH", "PATH")


def copy_packages(tree: Path, to: Path) -> None:
    """Copy the packages of a source tree, so that it gains no bytecode, and both lie at one path
    in turn.
    """
    to.mkdir(parents=True)
    for package in sorted(path.parent for path in tree.glob("*/__init__.py")):
        if package.name != "tests":
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(package, to / package.name, ignore=ignored)


@dataclass(frozen=True)
class Place:
    """The packages of a source tree, and the folders that its commands are given."""

    tree: Path
    data: Path
    out: Path
    """The same for both trees, since records hold absolute paths."""

    def run(self, scenarios: Scenarios) -> None:
        """Execute all scenarios; what they print lies beside what they write, in ``said``."""
        with ThreadPoolExecutor(PROCESSES) as pool:
            list(pool.map(self._one, scenarios, scenarios.values()))

    def _one(self, name: str, commands: Iterable[str]) -> None:
        home, said = self.out / name, self.out / name / "said"
        said.mkdir(parents=True)
        for number, command in enumerate(commands):
            verb = command.split()[0]
            (said / f"{number}-{verb}.txt").write_bytes(self.say(command, home))

    def say(self, command: str, home: Path) -> bytes:
        """What a command prints, with its exit code."""
        temporary = self.out / "tmp" / home.name
        temporary.mkdir(parents=True, exist_ok=True)
        ended = subprocess.run(
            [sys.executable, "-m", "jobs", *self._words(command, home)],
            cwd=self.tree, env=self._environment(temporary), capture_output=True, check=False,
            timeout=ENDS_S,
        )  # fmt: skip
        said = [b"exit code %d" % ended.returncode, ended.stdout, b"--- stderr", ended.stderr]
        return b"\n".join(said)

    def _words(self, command: str, home: Path) -> list[str]:
        places = (("{data}", self.data), ("{out}", home))
        words = shlex.split(command)
        for name, path in places:
            words = [word.replace(name, str(path)) for word in words]
        return words

    def _environment(self, temporary: Path) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        places = {
            "PYTHONPATH": os.pathsep.join([str(self.tree), str(self.data / "modules")]),
            "TMPDIR": str(temporary),
        }
        return kept | FIXED | places
