"""What ``cluster/`` describes, parsed."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from ray.scripts.scripts import cli as ray_cli

from jobs.cli import cli
from tests.support.documents import ROOT
from unet_core.config.loading import build
from unet_core.config.predict import PredictConfig
from unet_core.config.train import TrainConfig

CLUSTER = ROOT / "cluster"
KUBERAY = ("cluster.yaml", "monthly.yaml", "predict.yaml", "train.yaml")
SECRET = re.compile("KEY|SECRET|TOKEN|PASSWORD")
OBJECT_STORE_BYTES = 200 * 2**20


class Pod(NamedTuple):
    """A pod and where it is described."""

    where: str
    spec: dict[str, Any]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()))


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    """Documents of one kind by their file."""
    return {n: d for n in KUBERAY for d in documents(n) if d["kind"] == kind}


def clusters() -> dict[str, dict[str, Any]]:
    """What makes a Ray cluster, by its file."""
    jobs = {name: job["spec"]["rayClusterSpec"] for name, job in of_kind("RayJob").items()}
    return jobs | {name: cluster["spec"] for name, cluster in of_kind("RayCluster").items()}


def templates(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod template, wherever it hangs."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("template", "submitterPodTemplate"):
                yield inner
            yield from templates(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from templates(inner)


PODS = [
    Pod(f"{name} {document['kind']} {number}", template["spec"])
    for name in KUBERAY
    for document in documents(name)
    for number, template in enumerate(templates(document))
]


def pinned(package: str) -> str:
    text = (ROOT / "constraints.txt").read_text()
    (version,) = re.findall(rf"^{package}==(\S+)$", text, flags=re.MULTILINE)
    return version


def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """The verb of ``unet-jobs`` and its arguments; raises what click raises."""
    program, verb, *arguments = shlex.split(command)
    assert program == "unet-jobs"
    return verb, cli.commands[verb].make_context(verb, arguments).params


def config_at(
    name: str, pod: dict[str, Any], verb: str, path: str, overrides: tuple[str, ...] = ()
) -> Any:
    """The config that a container of a pod finds at a path, checked."""
    folder, _, file = path.rpartition("/")
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == folder]
    (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
    held = {d["metadata"]["name"]: d["data"] for d in documents(name) if d["kind"] == "ConfigMap"}
    table = tomllib.loads(held[volume["configMap"]["name"]][file])
    kind = {"predict": PredictConfig, "train": TrainConfig}[verb]
    return build(kind, table, list(overrides))


def job_config(name: str) -> Any:
    spec = of_kind("RayJob")[name]["spec"]
    verb, arguments = parsed(spec["entrypoint"])
    assert not arguments["overrides"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return config_at(name, head, verb, arguments["source"])


AWS = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
BUILD, _, FINAL = DOCKERFILE.rpartition("\nFROM ")


def ray_arguments(command: str) -> dict[str, Any]:
    """What Ray's own command line makes of a command."""
    program, *words = shlex.split(command)
    assert program == "ray"
    group: Any = ray_cli
    while hasattr(group, "commands"):
        name, *words = words
        group = group.commands[name]
    return group.make_context(name, words).params
