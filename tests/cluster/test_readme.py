"""``cluster/README.md`` names what is there."""

import re

import pytest

from tests.support.documents import ROOT, blocks
from tests.support.manifests import AWS, CLUSTER, KUBERAY, job_config, of_kind, ray_arguments
from unet_core import __version__

TESTED_HERE = {
    "Dockerfile",
    "Dockerfile.dockerignore",
    "README.md",
    "aws.yaml",
    "prometheus.yml",
    *(f"kuberay/{name}" for name in KUBERAY),
}
TESTED_ELSEWHERE = {"local.py"}


def test_every_file_here_is_tested():
    there = {
        path.relative_to(CLUSTER).as_posix()
        for path in CLUSTER.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there - TESTED_ELSEWHERE == TESTED_HERE


@pytest.mark.parametrize("path", sorted(TESTED_HERE))
def test_every_image_has_the_version_of_the_project(path):
    text = (CLUSTER / path).read_text()
    for image in re.findall(r"registry\.example\.com/\S+", text):
        assert re.fullmatch(
            rf"registry\.example\.com/unet-jobs:{re.escape(__version__)}-(cuda|cpu)", image
        ), image


README = (CLUSTER / "README.md").read_text()
LINES = [
    line.partition(" # ")[0].rstrip(" &")
    for block in blocks("sh", README)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("command", [line for line in LINES if line.startswith("ray ")])
def test_every_command_of_ray_in_the_readme_is_one_that_parses(command):
    assert ray_arguments(command) is not None


def test_every_file_that_the_readme_names_is_there():
    named = {path.rstrip(".,") for path in re.findall(r"\bcluster/[\w./-]*\w", README)}
    assert all((ROOT / path).exists() for path in named), named
    linked = {f"cluster/{target}" for target in re.findall(r"\]\(([\w./-]+)\)", README)}
    described = {f"cluster/{path}" for path in TESTED_HERE} - {"cluster/README.md"}
    assert described - {"cluster/Dockerfile.dockerignore"} <= named | linked


def test_the_readme_names_objects_that_the_manifests_make():
    (cluster,) = of_kind("RayCluster").values()
    assert f"service/{cluster['metadata']['name']}-head-svc" in README
    jobs = {job["metadata"]["name"] for job in of_kind("RayJob").values()}
    assert set(re.findall(r"(?:job/|get rayjob )([\w-]+)", README)) <= jobs | {"unet-jobs-monthly"}
    (monthly,) = of_kind("CronJob").values()
    assert f"--from=cronjob/{monthly['metadata']['name']} " in README


def test_the_numbers_in_the_readme_are_those_of_the_manifests():
    (worker,) = [n for n in AWS["available_node_types"].values() if "GPU" in n["resources"]]
    cpus, kind = worker["resources"]["CPU"], worker["node_config"]["InstanceType"]
    assert f"GPU nodes are {kind} with" in README
    assert f"`max = {AWS['max_workers']}`, `gpus = 1`, `cpus = {cpus}`" in README
    for name, days in {"predict.yaml": "three days", "train.yaml": "a week"}.items():
        spec = of_kind("RayJob")[name]["spec"]
        assert spec["activeDeadlineSeconds"] == {"three days": 3, "a week": 7}[days] * 86400
        assert f"after {days}" in README
    pod = job_config("predict.yaml").workers
    assert f"`max = {pod.max}` actors of `gpus = 1` and `cpus = {pod.cpus:g}`" in README
