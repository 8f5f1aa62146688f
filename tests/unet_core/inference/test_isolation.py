import time
from pathlib import Path

import numpy as np
import pytest

from jobs.job import prepare
from tests.support import poison
from tests.support.data import write_checkpoint, write_tar
from unet_core.errors import ShardError
from unet_core.images.decoder import Decoder
from unet_core.inference.isolation import Isolation
from unet_core.inference.replica import Replica
from unet_core.inference.shard_segmenter import ShardSegmenter
from unet_core.inputs.formats import list_shards, open_source
from unet_core.runs.compute import RunSettings
from unet_core.synthetic import nuclei, png

pytestmark = pytest.mark.slow


@pytest.fixture
def segmenter(make_config, tmp_path, monkeypatch):
    """A segmenter in this process, which itself stays unharmed, and the shard of a tar."""
    good = png(nuclei(40, 50, np.random.default_rng(0))[0])
    names = ["a", "b-eats", "c", "d-kills", "e", "bad", "f-hangs", "g-creeps"]
    (tmp_path / "in").mkdir()
    files = {f"{name}.png": good if name != "bad" else b"bad" for name in names}
    write_tar(tmp_path / "in" / "t.tar", files)
    model = write_checkpoint(tmp_path / "model.safetensors", poison.SPEC, poison.network())
    monkeypatch.setattr(Decoder, "decode", poison.harmless)
    config = make_config(
        input={"uri": str(tmp_path / "in"), "masks": ""},
        model={"checkpoint": model, "factory": "tests.support.poison:network"},
    )
    source = open_source(config.input)
    spec = prepare(config).replica_spec(1)
    replica = Replica(spec)
    made = ShardSegmenter(replica, RunSettings(replica.probe(), {}))
    monkeypatch.setattr(Decoder, "decode", poison.harmless)
    return made, next(iter(list_shards(source))), names


def isolation(segmenter, shard, image_timeout_s):
    return Isolation(segmenter.replica.spec, segmenter.settings, shard, image_timeout_s)


def test_images_that_kill_hang_or_eat_memory_are_found_and_their_neighbours_are_not(segmenter):
    segmenter, shard, names = segmenter
    start = time.monotonic()
    poison = isolation(segmenter, shard, image_timeout_s=4.0).find_poison()
    assert {names[place]: failure.code for place, failure in poison.items()} == {
        "b-eats": "out_of_memory",
        "d-kills": "worker_died",
        "f-hangs": "timeout",
    }
    assert "killed its process (SIGKILL)" in str(poison[3])
    assert "half of what was free" in str(poison[1])
    assert time.monotonic() - start < 120
    totals = segmenter.segment(shard, poison).totals
    assert (totals.ok, totals.failed) == (4, 4)
    assert totals.errors == {"decode": 1, "out_of_memory": 1, "timeout": 1, "worker_died": 1}


def test_a_shard_that_changed_is_refused_on_trial_too(segmenter):
    segmenter, shard, _ = segmenter
    path = segmenter.replica.spec.source.root.uri(shard.uri)
    write_tar(Path(path), {"new.png": b""})
    with pytest.raises(ShardError, match=r"t\.tar was written again since the run began"):
        isolation(segmenter, shard, image_timeout_s=60.0).find_poison()
