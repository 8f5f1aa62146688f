"""The manifests for KubeRay: known fields, confined pods, secrets by reference, room for actors."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.manifests import (
    CLUSTER,
    KUBERAY,
    OBJECT_STORE_BYTES,
    PODS,
    SECRET,
    clusters,
    config_at,
    documents,
    job_config,
    of_kind,
    parsed,
    pinned,
)
from unet_core.config.predict import PredictConfig
from unet_core.config.train import TrainConfig

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


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


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


def require_room(config: Any, spec: dict[str, Any], most: int) -> None:
    """An actor or rank must fit a pod, and the pods of all must be allowed."""
    (group,) = spec["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.workers.gpus == limits["nvidia.com/gpu"]
    assert config.workers.cpus == float(limits["cpu"])
    assert most == group["maxReplicas"]


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
