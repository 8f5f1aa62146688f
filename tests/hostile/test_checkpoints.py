"""Checkpoints and pickles made to do harm: refused, and nothing of them runs."""

import json
import os
import pickle

import pytest

from tests.support import doors
from tests.support.confined import MIB, confined
from tests.support.data import rewritten


def metadata(**texts):
    def change(found):
        found["__metadata__"] |= {
            key: text if isinstance(text, str) else json.dumps(text) for key, text in texts.items()
        }

    return change


def edited(key, **values):
    def change(found):
        inner = json.loads(found["__metadata__"][key])
        found["__metadata__"][key] = json.dumps(inner | values)

    return change


def offsets(start, stop):
    def change(found):
        found["head.conv.bias"]["data_offsets"] = [start, stop]

    return change


def dtype(name, tensor="head.conv.bias"):
    return lambda found: found[tensor].update({"dtype": name})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, id=name)
        for name, change in [
            ("offsets out of the file", offsets(0, 2**50)),
            ("offsets that overlap", offsets(0, 4)),
            ("offsets backwards", offsets(4, 0)),
            ("numbers for floats", dtype("I32")),
            ("no such type", dtype("F3")),
            ("another shape", lambda found: found["head.conv.bias"].update(shape=[2**40, 2**40])),
            ("metadata is a list", lambda found: found.update(__metadata__=["format"])),
            ("metadata is a number", lambda found: found["__metadata__"].update(format=3)),
            ("deep metadata", metadata(model="[" * 100_000)),
            ("long number", metadata(tiling="1" * 100_000)),
            ("a network of petabytes", edited("model", width=2**24)),
            ("a network without end", edited("model", depth=10**9)),
            ("half a pool", edited("model", depth=4.5)),
            ("depth is true", edited("model", depth=True)),
            ("stride 0", edited("tiling", stride=0)),
            ("halo below zero", edited("tiling", halo=-16)),
            ("an absurd halo", edited("tiling", halo=2**40)),
            ("channels of nothing", edited("tiling", channels=0)),
            ("sides of others", edited("tiling", sides={"smallest": 2**15, "step": 16})),
            ("step 0", edited("tiling", sides={"smallest": 16, "step": 0})),
            ("a million classes", metadata(classes=["x"] * 10**6)),
            ("classes are a text", metadata(classes="ab")),
            ("colours of nothing", metadata(palette=[[0, 0, 0], [256, -1, 0]])),
            ("no factory of the config", metadata(
                model={"factory": "os:system", "arguments": {"command": "touch {marker}"}})),
        ]
    ],
)  # fmt: skip
def test_a_checkpoint_that_lies_is_refused_and_runs_nothing(
    change, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with open(rewritten(tiny_model, tmp_path, change), "rb") as file:
        data = file.read()
    found = confined(doors.network, data, memory=512 * MIB)
    assert found.error == "CheckpointError", found
    assert len(found.text) < 1000
    assert found.memory < 256 * MIB


class Running:
    """A pickle that leaves a mark if it is loaded as one."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_runs_nothing_by_whatever_door_it_comes(tmp_path):
    data = pickle.dumps({"a": Running(tmp_path / "marker")}, protocol=2)
    for door in (doors.tensors, doors.network):
        found = confined(door, data)
        assert found.error == "CheckpointError", found
    assert not (tmp_path / "marker").exists()
    pickle.loads(data)
    assert (tmp_path / "marker").exists()
