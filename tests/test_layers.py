"""Which rooms and libraries a module may import: the tables of docs/design.md, held to the code."""

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("unet_core", "jobs")
    for path in sorted((ROOT / package).rglob("*.py"))
}

VERBS = ("models", "results", "running", "show")


@functools.cache
def imports(path: Path, everywhere: bool = True) -> frozenset[str]:
    """Modules that a file imports, at its top level or everywhere but for type checkers."""
    tree = parsed(path)
    nodes = outside_type_checking(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def outside_type_checking(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield child
            yield from outside_type_checking(child)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


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
                "jobs.backends.segment_actor",
                "jobs.backends.tasks",
                "jobs.submission.job_server",
            },
        ),
        ("safetensors", {"unet_core.networks.checkpoint"}),
        (
            "click",
            {"jobs.cli", *(f"jobs.commands.{n}" for n in ("models", "results", "running", "show"))},
        ),
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


def room_of(module: str) -> str:
    """The folder below a package, or the single module beside the folders."""
    package, room, *_ = module.split(".")
    return f"jobs.{room}" if package == "jobs" else room


def rows_of_the_table() -> dict[str, int]:
    """Each room with its row in docs/design.md."""
    table = (ROOT / "docs" / "design.md").read_text().partition("| | rooms |")[2]
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", table, re.M)
    named = [(room, int(row)) for row, cell in rows for room in re.findall(r"`([\w.]+)`", cell)]
    assert len(named) == len(dict(named)), "a room stands twice"
    return dict(named)


def test_rooms_import_only_from_rows_above_their_own():
    row_of = rows_of_the_table()
    modules = {name: path for name, path in MODULES.items() if not name.endswith("__init__")}
    assert row_of.keys() == {room_of(name) for name in modules}
    for name, path in modules.items():
        rooms = {room_of(found) for found in imports(path) if found in modules}
        assert not {r for r in rooms - {room_of(name)} if row_of[r] >= row_of[room_of(name)]}, name


def test_a_file_is_found_by_its_name_alone():
    names = Counter(path.name for path in MODULES.values() if path.name != "__init__.py")
    twice = {name for name, count in names.items() if count > 1}
    assert twice == {"predict.py", "train.py"}  # the verb, and its config


def test_no_two_public_classes_have_one_name():
    trees = map(parsed, MODULES.values())
    classes = [n.name for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)]
    public = Counter(name for name in classes if not name.startswith("_"))
    assert not {name for name, count in public.items() if count > 1}


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


@pytest.mark.slow
def test_work_in_this_process_never_imports_ray(tars, tiny_model, tmp_path):
    words = ("predict", tars, "--model", tiny_model, "--out", tmp_path, "workers.count=inline")
    code = (
        "import sys; from jobs.cli import cli; "
        "cli(sys.argv[1:], standalone_mode=False); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True)
