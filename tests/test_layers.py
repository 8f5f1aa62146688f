"""Who may import whom: the doors of docs/design.md, held by walking the imports."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("unet_core", "jobs")
    for path in sorted((ROOT / package).rglob("*.py"))
}


VERBS = {name for name in MODULES if name.startswith("jobs.verbs.")}


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Modules that a file imports, at its top level or everywhere."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def users_of(package: str) -> set[str]:
    return {
        name
        for name, path in MODULES.items()
        if any(found.partition(".")[0] == package for found in imports(path))
    }


def test_unet_core_knows_nothing_of_ray_or_jobs():
    for package in ("ray", "jobs"):
        assert not {user for user in users_of(package) if user.startswith("unet_core")}


@pytest.mark.parametrize(
    ("package", "doors"),
    [
        ("fsspec", {"unet_core.storage.object_stores"}),
        (
            "ray",
            {
                "jobs.backends.session",
                "jobs.backends.actors",
                "jobs.backends.ddp",
                "jobs.backends.prometheus",
                "jobs.backends.tasks",
                "jobs.submission.job_server",
            },
        ),
        ("safetensors", {"unet_core.networks.checkpoint"}),
        ("click", {"jobs.cli", *VERBS - {"jobs.commands.arguments", "jobs.verbs.__init__"}}),
        (
            "rich",
            {"jobs.progress"},
        ),
        (
            "scipy",
            {
                "unet_core.training.boundary",
                "unet_core.export.instances",
                "unet_core.export.coco",
                "unet_core.report.panels",
            },
        ),
        ("skimage", {"unet_core.export.instances"}),
        ("pycocotools", {"unet_core.export.coco"}),
        (
            "tifffile",
            {
                "unet_core.images.tiff",
                "unet_core.images.tiff_segments",
                "unet_core.images.large_tiff",
                "unet_core.export.mask_images",
            },
        ),
        ("matplotlib", set()),
        ("jinja2", {"unet_core.report.page"}),
    ],
)
def test_there_is_one_door_to_each_library(package, doors):
    assert users_of(package) == doors


def test_only_the_store_knows_the_stores():
    users = {n for n, path in MODULES.items() if "unet_core.storage.object_stores" in imports(path)}
    assert users == {"unet_core.storage.store"}


@pytest.mark.parametrize("room", ["unet_core.export", "unet_core.report"])
def test_what_is_made_afterwards_is_nobodys_concern(room):
    for name, path in MODULES.items():
        is_outside = name.startswith("unet_core") and not name.startswith(room)
        assert not is_outside or not {n for n in imports(path) if n.startswith(room)}, name


def test_there_is_no_circle_of_imports():
    graph = {
        name: {found for found in imports(path, everywhere=False) if found in MODULES}
        for name, path in MODULES.items()
    }
    while graph:
        free = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


def rows_of_the_table() -> Iterator[tuple[int, str]]:
    """Every module with its row in docs/design.md."""
    table = (ROOT / "docs" / "design.md").read_text().partition("| | modules |")[2]
    for row, cell in re.findall(r"^\| (\d) \| (.*) \|$", table, re.M):
        for group in cell.split(";"):
            room, colon, names = group.partition("`:")
            before = f"unet_core.{room.strip(' `')}." if colon else "unet_core."
            for name in re.findall(r"`([\w.*]+)`", names if colon else group):
                pattern = name if name.startswith("jobs") else before + name
                yield from ((int(row), m) for m in MODULES if fnmatch(m, pattern))


def test_modules_import_from_their_own_row_of_the_table_and_those_above():
    rows = [(row, name) for row, name in rows_of_the_table() if not name.endswith("__init__")]
    row_of = {name: row for row, name in rows}
    assert len(rows) == len(row_of), "a module stands twice"
    assert row_of.keys() == {name for name in MODULES if not name.endswith("__init__")}
    for name, row in row_of.items():
        found = imports(MODULES[name], everywhere=False)
        assert not {n for n in found if row_of.get(n, 0) > row}, name


@pytest.mark.parametrize(
    "module",
    [
        "jobs.cli",
        "jobs.job",
        "jobs.results.status",
        "jobs.predict",
        "jobs.results.export",
        "jobs.results.report",
    ],
)
def test_the_driver_starts_without_torch_and_ray(module):
    code = f"import {module}, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert not {"torch", "ray"} & set(loaded)
    if module == "jobs.cli":
        assert not {"numpy", "pyarrow", "fsspec"} & set(loaded)


def test_every_module_goes_into_the_wheel():
    assert all((path.parent / "__init__.py").exists() for path in MODULES.values())


def test_every_file_that_is_no_module_goes_into_the_wheel():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = table["tool"]["setuptools"]["package-data"]
    for package in ("jobs", "unet_core"):
        found = {p for p in (ROOT / package).rglob("*.*") if p.suffix not in (".py", ".pyc")}
        assert found, package
        assert found <= {p for pattern in shipped[package] for p in (ROOT / package).glob(pattern)}


def test_work_in_this_process_never_imports_ray(tars, tiny_model, tmp_path):
    words = ("predict", tars, "--model", tiny_model, "--out", tmp_path, "workers.count=inline")
    code = (
        "import sys; from jobs.cli import cli; "
        "cli(sys.argv[1:], standalone_mode=False); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True)
