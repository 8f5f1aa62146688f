"""``cluster/aws.yaml`` and its Prometheus: what Ray and EC2 accept."""

import importlib.util
import json
import re
from pathlib import Path

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator

from tests.support.manifests import AWS, CLUSTER, FINAL, OBJECT_STORE_BYTES, SECRET, ray_arguments


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
