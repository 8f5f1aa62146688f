import json
import threading

import pytest
from s3fs import S3FileSystem

from jobs.tools import doctor
from jobs.tools.doctor import diagnose
from tests.support.runs import write_toml
from tests.support.s3 import BUCKET


def test_nothing_is_wrong_here_and_nothing_is_left(run_cli, make_config, tmp_path):
    config = write_toml(make_config(), tmp_path / "predict.toml")
    code, out, _ = run_cli("doctor", config, "--json")
    found = json.loads(out)
    says = {check["name"]: check["says"] for check in found["checks"]}
    assert (code, found["is_ok"]) == (0, True), says
    assert set(found["checks"][0]) == {"name", "is_ok", "says", "hangs"}
    assert list(says) == ["processor", "GPU", "Ray", "model", "input.uri", "output.uri"]
    assert "torch" in says["processor"]
    assert [path.name for path in tmp_path.iterdir()] == ["predict.toml"]


def test_each_wrong_is_a_line_and_the_others_are_looked_at(
    run_cli, make_config, tmp_path, monkeypatch
):
    def broken():
        raise ImportError("no such library\n  at all")

    machine = {"broken": broken, "hangs": threading.Event().wait, "fine": lambda: "all is well"}
    machine["Ray"] = doctor.ray
    monkeypatch.setattr(doctor, "MACHINE", machine)
    monkeypatch.setattr(doctor, "LIMIT_S", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (tmp_path / "file").write_text("")
    found = diagnose(make_config(output={"uri": str(tmp_path / "file" / "run")},
                                 model={"checkpoint": "nowhere.safetensors"}))  # fmt: skip
    says = {check.name: check.says for check in found if not check.is_ok}
    assert says["broken"] == "ImportError: no such library"
    assert says["hangs"] == "no answer in 0.5 s"
    assert "no Ray cluster at 127.0.0.1:1" in says["Ray"]
    assert "nowhere.safetensors" in says["model"]
    assert "cannot write" in says["output.uri"]
    assert {check.name for check in found if check.is_ok} == {"fine", "input.uri"}
    del machine["hangs"]
    monkeypatch.delenv("RAY_ADDRESS")
    code, out, _ = run_cli("doctor", tmp_path / "nothing")
    assert code == 1
    assert "ok    fine:      all is well" in out
    assert f"WRONG input.uri: cannot list {tmp_path}/nothing: there is no such" in out


def test_a_bucket_is_read_and_written_and_left_as_it_was(make_config, s3, tars, monkeypatch):
    S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(doctor, "MACHINE", {})
    places = {"input": {"uri": s3.upload(tars, "doctor/in")},
              "output": {"uri": f"s3://{BUCKET}/doctor/out"}}  # fmt: skip
    found = diagnose(make_config(**places, storage={"endpoint_url": s3.url}))
    says = {check.name: check.says for check in found}
    assert all(check.is_ok for check in found), says
    assert s3.objects("doctor/out") == {}
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    S3FileSystem.clear_instance_cache()
    found = diagnose(make_config(**places, storage={"endpoint_url": s3.url}))
    wrong = {check.name for check in found if not check.is_ok}
    assert wrong == {"input.uri", "output.uri"}
    assert s3.secret not in str(found)
    S3FileSystem.clear_instance_cache()


@pytest.mark.ray
def test_a_cluster_is_told_by_its_nodes_and_their_code(ray_session, monkeypatch):
    monkeypatch.setattr(doctor, "MACHINE", {"Ray": doctor.ray})
    monkeypatch.setenv("RAY_ADDRESS", ray_session.address)
    found = diagnose()
    assert found[0].is_ok, found
    assert "2 nodes with 4 GPUs and 4 CPU cores; the same code on 2 of them" in str(found)
    other = {"n1": "unet-jobs 0 (sources other)"}
    monkeypatch.setattr(doctor.session, "code_on_nodes", lambda *_: other)
    assert "runs unet-jobs 0 (sources other), the driver" in diagnose()[0].says
