"""The image of every node: its Python, its packages, what it copies."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.specifiers import SpecifierSet

from tests.support.documents import ROOT
from tests.support.manifests import BUILD, CLUSTER, DOCKERFILE, FINAL, PODS, pinned


def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--no-color", CLUSTER / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    assert "hadolint ignore" not in DOCKERFILE


def test_the_image_has_a_python_that_the_project_supports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stages = re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE)
    assert len(set(stages)) == 1  # the venv is built for the Python that runs it
    (version,) = re.findall(r"^python:(\d+\.\d+)-slim-\w+$", stages[0])
    assert version in SpecifierSet(project["requires-python"])


def test_the_image_installs_pinned_packages_only():
    for command in re.findall(r"pip install .*", BUILD):
        assert "--constraint constraints.txt" in command or "--no-deps" in command, command
    assert pinned("boto3")


def test_the_image_can_train():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(re.match(r"pandas\b|ray\[.*\btrain\b", name) for name in project["dependencies"]), (
        "importing ray.train needs pandas"
    )


def test_the_image_runs_as_nobody_special():
    (user,) = re.findall(r"^USER (.*)$", FINAL, flags=re.MULTILINE)
    redis = 999
    assert {pod.spec["securityContext"]["runAsUser"] for pod in PODS} == {int(user), redis}


def test_the_build_sees_what_it_copies_and_nothing_more():
    _, everything, *rules = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert everything == "*"
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, flags=re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)
