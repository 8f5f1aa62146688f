"""What cluster/ describes is what the project is: versions, commands, configs, sizes, secrets."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from packaging.specifiers import SpecifierSet
from ray.scripts.scripts import cli as ray_cli

from jobs.cli import cli
from tests.support.documents import ROOT, blocks
from unet_core import __version__
from unet_core.config import PredictConfig, build
from unet_core.train_config import TrainConfig

CLUSTER = ROOT / "cluster"
KUBERAY = ("cluster.yaml", "monthly.yaml", "predict.yaml", "train.yaml")
TESTED_HERE = {
    "Dockerfile",
    "Dockerfile.dockerignore",
    "README.md",
    "aws.yaml",
    "prometheus.yml",
    *(f"kuberay/{name}" for name in KUBERAY),
}
TESTED_ELSEWHERE = {"local.py"}

# The API reference of KubeRay 1.7.0, ray.io/v1.
FIELDS = {
    "RayJob": """activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint
        entrypointNumCpus entrypointNumGpus entrypointResources jobId managedBy metadata
        preRunningDeadlineSeconds rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes
        submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished""",
    "RayCluster": """authOptions autoscalerOptions enableInTreeAutoscaling
        gcsFaultToleranceOptions headGroupSpec headServiceAnnotations historyServerOptions managedBy
        networkPolicy rayVersion suspend tlsOptions upgradeStrategy workerGroupSpecs""",
    "head": """enableIngress headService ingressOptions labels rayStartParams resources serviceType
        template""",
    "workers": """groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority
        rayStartParams replicas resources scaleStrategy suspend template""",
    "authOptions": "enableK8sTokenAuth mode secretName",
    "autoscalerOptions": """args command env envFrom idleTimeoutSeconds image imagePullPolicy
        resources securityContext upscalingMode version volumeMounts""",
    "gcsFaultToleranceOptions": """backend externalStorageNamespace redisAddress redisPassword
        redisUsername storage""",
}
VALUES = {
    "submissionMode": {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"},
    "mode": {"token", "disabled"},
    "version": {"v1", "v2"},
    "upscalingMode": {"Default", "Aggressive", "Conservative"},
    "backend": {"redis", "rocksdb"},
}
# Kubernetes: what of it is in use here.
POD = """automountServiceAccountToken containers nodeSelector restartPolicy securityContext
    serviceAccountName tolerations volumes"""
CONTAINER = """args command env envFrom image name ports readinessProbe resources securityContext
    volumeMounts"""
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


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


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
CONTAINERS = [
    (f"{pod.where} {container['name']}", container)
    for pod in PODS
    for container in pod.spec["containers"]
] + [
    (f"{name} autoscaler", {"name": "autoscaler", **spec["autoscalerOptions"]})
    for name, spec in clusters().items()
]
each_pod = pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod.where)
each_container = pytest.mark.parametrize(
    "container", [c for _, c in CONTAINERS], ids=[where for where, _ in CONTAINERS]
)
each_cluster = pytest.mark.parametrize("name", sorted(clusters()))
each_job = pytest.mark.parametrize("name", sorted(of_kind("RayJob")))


def pinned(package: str) -> str:
    text = (ROOT / "constraints.txt").read_text()
    (version,) = re.findall(rf"^{package}==(\S+)$", text, flags=re.MULTILINE)
    return version


def require_fields(given: dict[str, Any], known: str) -> None:
    assert set(given) <= set(known.split())
    for key in set(given) & set(VALUES):
        assert given[key] in VALUES[key], key


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a document."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from walk(inner)


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


def require_room(config: Any, spec: dict[str, Any], most: int) -> None:
    """An actor or rank must fit a pod, and the pods of all must be allowed."""
    (group,) = spec["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.workers.gpus == limits["nvidia.com/gpu"]
    assert config.workers.cpus == float(limits["cpu"])
    assert most == group["maxReplicas"]


def test_every_file_here_is_tested():
    there = {
        path.relative_to(CLUSTER).as_posix()
        for path in CLUSTER.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there - TESTED_ELSEWHERE == TESTED_HERE


@pytest.mark.parametrize("name", KUBERAY)
def test_documents_are_of_kinds_that_exist(name):
    kinds = {(d["apiVersion"], d["kind"]) for d in documents(name)}
    assert kinds <= {
        ("v1", "ConfigMap"),
        ("v1", "Service"),
        ("apps/v1", "StatefulSet"),
        ("batch/v1", "CronJob"),
        ("ray.io/v1", "RayCluster"),
        ("ray.io/v1", "RayJob"),
    }
    assert all(
        set(d) <= {"apiVersion", "kind", "metadata", "spec", "data"} for d in documents(name)
    )


@each_cluster
def test_ray_clusters_have_only_fields_that_kuberay_knows(name):
    spec = clusters()[name]
    require_fields(spec, FIELDS["RayCluster"])
    for part in ("authOptions", "autoscalerOptions", "gcsFaultToleranceOptions"):
        require_fields(spec.get(part, {}), FIELDS[part])
    require_fields(spec["headGroupSpec"], FIELDS["head"])
    for group in spec["workerGroupSpecs"]:
        require_fields(group, FIELDS["workers"])


@each_job
def test_ray_jobs_have_only_fields_that_kuberay_knows_and_that_go_together(name):
    spec = of_kind("RayJob")[name]["spec"]
    require_fields(spec, FIELDS["RayJob"])
    assert "clusterSelector" not in spec  # excludes backoffLimit
    assert spec["backoffLimit"] >= 1
    assert spec["submissionMode"] == "K8sJobMode"  # others exclude what is used here
    assert "deletionStrategy" not in spec  # excludes the next two
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert not {"entrypointNumCpus", "entrypointNumGpus"} & set(spec)  # the head has none


@each_cluster
def test_a_ray_cluster_runs_the_pinned_ray_behind_a_token(name):
    spec = clusters()[name]
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"]["mode"] == "token"
    assert spec["authOptions"]["secretName"]


@each_cluster
def test_a_ray_cluster_grows_by_spot_gpus_and_its_head_takes_no_work(name):
    spec = clusters()[name]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] >= 60
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in groups(spec):
        params = group["rayStartParams"]
        assert all(isinstance(value, str) for value in params.values())
        assert int(params["object-store-memory"]) <= OBJECT_STORE_BYTES
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"  # autoscaler v2
        ports = group["template"]["spec"]["containers"][0]["ports"]
        assert {"name": "metrics", "containerPort": 8080} in ports
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] == 16
        assert "spot" in pod["nodeSelector"].values()
        tolerated = {toleration["key"] for toleration in pod["tolerations"]}
        assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= tolerated
        resources = pod["containers"][0]["resources"]
        assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] > 0
    assert "spot" not in spec["headGroupSpec"]["template"]["spec"]["nodeSelector"].values()


def test_only_a_training_holds_gpus_before_it_asks():
    idle = {n: sum(g["minReplicas"] for g in s["workerGroupSpecs"]) for n, s in clusters().items()}
    assert {name for name, least in idle.items() if least} == {"train.yaml"}
    assert idle["train.yaml"] == job_config("train.yaml").workers.count[0]


@each_pod
def test_pods_run_confined(pod):
    require_fields(pod.spec, POD)
    security = pod.spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}


@each_container
def test_containers_run_confined_and_within_limits(container):
    security = container["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert {"cpu", "memory"} <= set(requests) == set(limits)


@each_pod
def test_containers_have_known_fields_and_mount_volumes_that_exist(pod):
    claims = {"data"} if "StatefulSet" in pod.where else set()
    volumes = {volume["name"] for volume in pod.spec.get("volumes", [])} | claims
    for container in pod.spec["containers"]:
        require_fields(container, CONTAINER)
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


@pytest.mark.parametrize("name", KUBERAY)
def test_secrets_come_by_reference_and_the_readme_makes_them(name):
    readme = (CLUSTER / "README.md").read_text()
    for document in documents(name):
        for mapping in walk(document):
            if SECRET.search(str(mapping.get("name", ""))):
                assert "value" not in mapping, mapping["name"]
            for key in set(mapping) & {"redisPassword", "redisUsername"}:
                assert set(mapping[key]) == {"valueFrom"}, key
            for key in set(mapping) & {"secretKeyRef", "secretRef"}:
                assert f"kubectl create secret generic {mapping[key]['name']} " in readme
                assert f"{mapping[key].get('key', 'file=FILE')}=" in readme or key == "secretRef"
            if "secretName" in mapping:
                assert f"create secret generic {mapping['secretName']} " in readme
                assert "--from-literal=auth_token=" in readme
            if "serviceAccountName" in mapping:
                assert f"create serviceaccount {mapping['serviceAccountName']}\n" in readme


@pytest.mark.parametrize("path", sorted(TESTED_HERE))
def test_every_image_has_the_version_of_the_project(path):
    text = (CLUSTER / path).read_text()
    for image in re.findall(r"registry\.example\.com/\S+", text):
        assert re.fullmatch(
            rf"registry\.example\.com/unet-jobs:{re.escape(__version__)}-(cuda|cpu)", image
        ), image


@each_container
def test_every_container_names_an_image(container):
    if container["name"] == "autoscaler":
        assert "image" not in container  # the head's
    else:
        assert re.fullmatch(r"(registry\.example\.com/unet-jobs|redis):[\w.-]+", container["image"])


def test_a_predict_job_has_a_command_a_config_and_room_for_its_actors():
    config = job_config("predict.yaml")
    assert isinstance(config, PredictConfig)
    assert config.output.uri.startswith("s3://")
    require_room(config, clusters()["predict.yaml"], config.workers.max)


def test_a_train_job_has_a_command_a_config_and_room_for_its_ranks():
    config = job_config("train.yaml")
    assert isinstance(config, TrainConfig)
    assert config.output.uri.startswith("s3://")
    fewest, most = config.workers.count
    require_room(config, clusters()["train.yaml"], most)
    assert fewest <= most <= config.train.batch  # every rank needs a crop


def test_the_monthly_job_submits_to_the_shared_cluster():
    spec = of_kind("CronJob")["monthly.yaml"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] >= 1
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["command"] == ["/bin/bash", "-c"]
    (script,) = container["args"]
    assert script.startswith("exec unet-jobs submit ")  # so that its exit code is the job's
    command = script.removeprefix("exec ").replace("$(date +%Y-%m)", "2026-01")
    _, arguments = parsed(command)
    (cluster,) = of_kind("RayCluster").values()
    assert arguments["address"] == f"http://{cluster['metadata']['name']}-head-svc:8265"
    assert arguments["follow"]
    assert arguments["overrides"] == ("output.uri=s3://my-bucket/runs/2026-01",)
    paths = [value for value in arguments.values() if str(value).endswith(".toml")]
    assert arguments["verb"] == "predict"
    config = config_at("monthly.yaml", pod, "predict", paths[0], arguments["overrides"])
    require_room(config, cluster["spec"], config.workers.max)
    environment = {variable["name"]: variable for variable in container["env"]}
    token = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    assert token == {"name": cluster["spec"]["authOptions"]["secretName"], "key": "auth_token"}


def test_the_shared_cluster_keeps_its_state_in_the_redis_beside_it():
    options = of_kind("RayCluster")["cluster.yaml"]["spec"]["gcsFaultToleranceOptions"]
    service = of_kind("Service")["cluster.yaml"]
    redis = of_kind("StatefulSet")["cluster.yaml"]
    port = service["spec"]["ports"][0]["port"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{port}"
    labels = redis["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == redis["spec"]["selector"]["matchLabels"] == labels
    assert redis["spec"]["serviceName"] == service["metadata"]["name"]
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    (variable,) = container["env"]
    assert variable["valueFrom"] == options["redisPassword"]["valueFrom"]
    arguments = container["args"]
    assert arguments[arguments.index("--requirepass") + 1] == f"$({variable['name']})"
    assert arguments[arguments.index("--appendonly") + 1] == "yes"
    assert arguments[arguments.index("--dir") + 1] == container["volumeMounts"][0]["mountPath"]
    (claim,) = redis["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == container["volumeMounts"][0]["name"]


def test_jobs_with_a_cluster_of_their_own_need_no_redis():
    assert {n for n, s in clusters().items() if "gcsFaultToleranceOptions" in s} == {"cluster.yaml"}


AWS = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
BUILD, _, FINAL = DOCKERFILE.rpartition("\nFROM ")


def test_aws_is_what_ray_up_accepts():
    ray = Path(str(importlib.util.find_spec("ray").origin)).parent
    schema = json.loads((ray / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(AWS, schema)
    assert AWS["head_node_type"] in AWS["available_node_types"]
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert AWS[commands] == []  # where they are absent, `ray up` installs another Ray


@pytest.mark.parametrize("node", sorted(AWS["available_node_types"]))
def test_aws_nodes_are_what_ec2_accepts(node):
    ec2 = botocore.session.get_session().get_service_model("ec2")
    config = AWS["available_node_types"][node]["node_config"]
    shape = ec2.operation_model("RunInstances").input_shape
    assert not set(config) - set(shape.members)
    wanted = {**config, "MinCount": 1, "MaxCount": 1}
    assert not ParamValidator().validate(wanted, shape).generate_report()
    assert config["InstanceType"] in ec2.shape_for("InstanceType").enum
    assert set(config["IamInstanceProfile"]) == {"Name"}
    for disk in config["BlockDeviceMappings"]:
        assert set(disk["Ebs"]) <= set(ec2.shape_for("EbsBlockDevice").members)
        assert disk["Ebs"]["VolumeSize"] >= 100  # the machine's image and ours
        assert disk["Ebs"]["VolumeType"] in ec2.shape_for("VolumeType").enum


def test_aws_grows_by_spot_gpus_and_its_head_takes_no_work():
    nodes = dict(AWS["available_node_types"])
    head = nodes.pop(AWS["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    for node in nodes.values():
        assert node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert node["resources"]["GPU"] >= 1
        assert (node["min_workers"], node["max_workers"]) == (0, AWS["max_workers"])


@pytest.mark.parametrize("who", ["head", "worker"])
def test_aws_starts_ray_with_options_that_exist(who):
    _, start = AWS[f"{who}_start_ray_commands"]
    arguments = ray_arguments(start.replace("$RAY_HEAD_IP", "HEAD"))
    assert arguments["object_store_memory"] <= OBJECT_STORE_BYTES
    assert arguments["metrics_export_port"] == 8080
    assert arguments["head"] == (who == "head")
    assert arguments["num_cpus"] == (0 if who == "head" else None)


def test_aws_gives_every_node_the_token():
    (home,) = re.findall(r"HOME=(\S+)", FINAL)
    assert AWS["file_mounts"] == {f"{home}/.ray/auth_token": "~/.ray/auth_token"}
    options = [word for option in AWS["docker"]["run_options"] for word in option.split()]
    assert options[options.index("--env") + 1] == "RAY_AUTH_MODE=token"
    assert not [o for o in options if "=" in o and SECRET.search(o.partition("=")[0].upper())]


def test_prometheus_reads_the_list_that_ray_writes():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())
    assert set(config) == {"global", "scrape_configs"}
    (scrape,) = config["scrape_configs"]
    assert set(scrape) == {"job_name", "file_sd_configs"}
    assert scrape["file_sd_configs"] == [
        {"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}
    ]


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


README = (CLUSTER / "README.md").read_text()
LINES = [
    line.partition(" # ")[0].rstrip(" &")
    for block in blocks("sh", README)
    for line in block.replace("\\\n", " ").splitlines()
]


def ray_arguments(command: str) -> dict[str, Any]:
    """What Ray's own command line makes of a command."""
    program, *words = shlex.split(command)
    assert program == "ray"
    group: Any = ray_cli
    while hasattr(group, "commands"):
        name, *words = words
        group = group.commands[name]
    return group.make_context(name, words).params


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
    pod = job_config("predict.yaml").workers
    assert f"`max = {pod.max}` actors of `gpus = 1` and `cpus = {pod.cpus:g}`" in README
