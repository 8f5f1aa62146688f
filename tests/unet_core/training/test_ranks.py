"""DDP without Ray: processes with a rendezvous file train the same network as a single one."""

import functools
import io
import shutil
import signal
import uuid

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load, load_file

from tests.support.confined import PATIENCE
from tests.support.rank import start
from tests.support.s3 import BUCKET
from tests.support.scenes import config_of

pytestmark = pytest.mark.slow
NO_NORM = ("model.preset=plain", "train.batch=8", "train.learning_rate=1e-3", "loss.boundary=5",
           "loss.class_weights=balanced", "augment.elastic=3")  # fmt: skip
OFTEN = "train.checkpoint_minutes=0.0001"
KILLED = ("train.epochs=3", "train.ema=0.5", OFTEN)


def run(folder, place, out, ranks, *overrides, dies=""):
    """Train on ranks to the end, or until one of them dies and the others are killed."""
    config = config_of(folder, out if "://" in str(out) else place / out, *overrides)
    meeting = place / uuid.uuid4().hex
    guilty = 0 if ":" in dies else ranks - 1  # the first rank is the one that writes
    errors = [place / f"{meeting.name}-{rank}" for rank in range(ranks)]
    processes = [
        start(rank, ranks, meeting, config, errors[rank], dies if rank == guilty else "")
        for rank in range(ranks)
    ]
    if dies:
        processes[guilty].join(PATIENCE)
        for process in processes:
            process.kill()
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    assert not any(codes) or dies, "\n".join(path.read_text() for path in errors)
    return codes[guilty]


@pytest.fixture
def train(folder, tmp_path):
    return functools.partial(run, folder, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """The output folder of the same training without deaths."""
    place = tmp_path_factory.mktemp("undisturbed")
    run(folder, place, "whole", 1, *KILLED)
    return place / "whole"


def weights(out):
    return load_file(out / "last.safetensors")


def difference(a, b):
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def losses(out):
    rows = pq.read_table(out / "history").to_pylist()
    return [row["value"] for row in rows if row["name"] == "loss"]


def test_any_number_of_ranks_and_micro_batches_trains_the_same_network(train, tmp_path):
    """1 rank × 8, 2 × 4, 4 × 2, an uneven 3, and accumulation: 10 steps."""
    # 7 images, 5 steps an epoch; in the last, the first of three ranks has no crop, the last two
    options = (*NO_NORM, "train.crops_per_image=5", "train.epochs=2")
    train("one", 1, *options)
    assert len(losses(tmp_path / "one")) == 2
    others = {"two": (2, ()), "four": (4, ()), "three": (3, ("train.accumulate=2",)),
              "micro-batches": (1, ("train.accumulate=3",))}  # fmt: skip
    for out, (ranks, more) in others.items():
        train(out, ranks, *options, *more)
        assert difference(weights(tmp_path / "one"), weights(tmp_path / out)) < 1e-5, out
        np.testing.assert_allclose(losses(tmp_path / out), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.parametrize(
    "deaths",
    [
        ("5", "checkpoint:2", "3"),
        ("manifest:1", "history:1", "best:1", "9"),
        ("inside:9", "success:1"),
    ],
    ids=" ".join,
)
def test_one_process_killed_anywhere_ends_with_the_same_bits(train, undisturbed, tmp_path, deaths):
    for death in deaths:
        assert train("killed", 1, *KILLED, dies=death) == -signal.SIGKILL, death
    train("killed", 1, *KILLED)
    for name in ("last.safetensors", "best.safetensors"):
        a, b = (load_file(out / name) for out in (undisturbed, tmp_path / "killed"))
        assert all((a[key] == b[key]).all() for key in a), name
    whole, killed = (pq.read_table(out / "history") for out in (undisturbed, tmp_path / "killed"))
    assert whole.equals(killed)


def test_ranks_killed_together_go_on_as_fewer_from_the_object_store(train, tmp_path, s3):
    options = (*NO_NORM, "train.epochs=3", f"storage.endpoint_url={s3.url}")
    prefix = f"training-{uuid.uuid4().hex}"
    train("whole", 1, *options)
    out = f"s3://{BUCKET}/{prefix}"
    train(out, 2, *options, OFTEN, dies="4")
    train(out, 2, *options, OFTEN, dies="history:1")
    train(out, 1, *options)
    found = s3.objects(prefix)
    assert difference(weights(tmp_path / "whole"), load(found["last.safetensors"])) < 1e-5
    whole = pq.read_table(tmp_path / "whole" / "history").to_pylist()
    names = sorted(name for name in found if name.startswith("history/"))
    tables = [pq.read_table(io.BytesIO(found[name])) for name in names]
    rows = [row for table in tables for row in table.to_pylist()]
    keys = ("step", "epoch", "split", "name", "class")
    assert [[row[k] for k in keys] for row in rows] == [[row[k] for k in keys] for row in whole]


def test_an_error_on_one_rank_ends_all_of_them_at_once(train, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data/images/cell03.png").write_bytes(b"no image")
    overrides = (f"data.train.uri={tmp_path}/data/images", "model.preset=plain")
    with pytest.raises(AssertionError, match=r"cell03\.png(.|\n)*cell03\.png"):
        train("m", 2, *overrides)
