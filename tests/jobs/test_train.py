"""``unet-jobs train`` in this process, and on ranks of the suite's Ray session."""

import os
import signal
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from safetensors.numpy import load, load_file

from jobs.backends.ddp import Mailbox, Reporter
from jobs.train import train
from tests.support.processes import is_ours
from tests.support.s3 import BUCKET
from tests.support.scenes import config_of
from unet_core.errors import ConfigError, StoppedError, WorkersError
from unet_core.storage.store import Store
from unet_core.training.fit import Started

NO_NORM = ("model.preset=plain", "train.batch=4", "train.optimiser=sgd", "train.learning_rate=0.01")
LONG = (*NO_NORM, "train.epochs=6", "train.crops_per_image=20")
TWO_RANKS = ("workers.count=2", "workers.gpus=0", "workers.cpus=1", "storage.shared=true")


def on_ray(test):
    """A test that needs the suite's Ray session; its warnings are Ray's own."""
    for mark in (
        pytest.mark.ray,
        pytest.mark.usefixtures("ray_session"),
        pytest.mark.filterwarnings("ignore"),
    ):
        test = mark(test)
    return test


def rank_pids():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"RayTrainWorker" in path.read_bytes() and is_ours(int(path.parent.name)):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def after(epochs, store, act):
    """Call a function on a thread once a training has the history of this number of epochs."""

    def watch():
        while len(store.list("history")) < epochs:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def difference(a, b):
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def test_a_training_in_this_process_tells_what_it_left(folder, tmp_path):
    config = config_of(folder, tmp_path / "m", "train.epochs=2")
    done = train(config)
    assert (done.position.step, done.was_finished) == (14, False)
    assert Path(done.best).exists()
    again = train(config)
    assert again.was_finished
    assert again.position == done.position


@pytest.mark.slow
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(folder, tmp_path):
    train(config_of(folder, tmp_path / "whole"))
    config = config_of(folder, tmp_path / "m")
    store = Store(str(tmp_path / "m"))
    handler = signal.getsignal(signal.SIGTERM)
    thread = after(1, store, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match="stopped after step"):
        train(config)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == handler
    train(config)
    a, b = (load_file(tmp_path / out / "last.safetensors") for out in ("whole", "m"))
    assert difference(a, b) == 0


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """The output folder of a training in one process, which ranks must reproduce."""
    out = tmp_path_factory.mktemp("undisturbed") / "m"
    train(config_of(folder, out, *LONG))
    return out


@on_ray
@pytest.mark.parametrize("place", ["local", "s3"])
def test_ranks_that_die_begin_again_at_the_last_checkpoint(
    folder, undisturbed, tmp_path, request, place
):
    out, more = str(tmp_path / "m"), TWO_RANKS
    if place == "s3":
        s3, prefix = request.getfixturevalue("s3"), f"ddp-{uuid.uuid4().hex}"
        out, more = f"s3://{BUCKET}/{prefix}", (*TWO_RANKS, f"storage.endpoint_url={s3.url}")
    config = config_of(folder, out, *LONG, *more)
    killed = []

    def kill_one():
        for pid in rank_pids()[-1:]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    thread = after(2, Store(out, config.storage), kill_one)
    done = train(config)
    thread.join()
    assert killed
    whole = load_file(undisturbed / "last.safetensors")
    last = Store(out, config.storage).read("last.safetensors")
    assert difference(whole, load(last)) < 1e-4
    assert done.position.step == 6 * 35


@on_ray
@pytest.mark.parametrize("kind", ["bad image", "stop", "too many"])
def test_what_stops_ranks_is_told_as_in_one_process(folder, tmp_path, kind):
    if kind == "too many":
        with pytest.raises(ConfigError, match=r"train\.batch is 1, but there are 2 ranks"):
            train(config_of(folder, tmp_path / "m", "train.batch=1", *TWO_RANKS))
        with pytest.raises(WorkersError, match="do not fit"):
            train(config_of(folder, tmp_path / "m", *TWO_RANKS, "workers.count=99"))
    elif kind == "bad image":
        (tmp_path / "images").mkdir()
        for path in (folder / "images").iterdir():
            (tmp_path / "images" / path.name).write_bytes(path.read_bytes()[:200])
        config = config_of(folder, tmp_path / "m", f"data.train.uri={tmp_path}/images", *TWO_RANKS)
        with pytest.raises(ConfigError, match=r"data\.train: cell00\.png"):
            train(config)
    else:
        options = ("train.epochs=500", "train.batch=4", "workers.count=[2, 3]", *TWO_RANKS[1:])
        config = config_of(folder, tmp_path / "m", *options)
        store = Store(str(tmp_path / "m"))
        thread = after(1, store, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(StoppedError, match=r"stopped (after step|while validating)"):
            train(config)
        thread.join()
        assert store.list("checkpoints")


@on_ray
def test_a_rank_hears_that_it_is_to_stop_before_it_has_taken_a_step():
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    reporter = Reporter(mailbox)
    ray.get(mailbox.hear.remote(False))
    assert not reporter.wants_stop()
    ray.get(mailbox.hear.remote(True))
    deadline = time.monotonic() + 60
    while not reporter.wants_stop():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    other = Reporter(mailbox)
    other.say(Started(("a", "b"), 1, 1, 1, 1, 0))
    assert other.wants_stop()


def test_a_rank_asks_at_most_twice_a_second_whether_to_stop(monkeypatch):
    now, answer = [0.0], [False]
    asked = []

    class Remote:
        @staticmethod
        def remote(*events):
            asked.append(now[0])
            return answer[0]

    monkeypatch.setattr("jobs.backends.ddp.ray.get", lambda answer: answer)
    monkeypatch.setattr("jobs.backends.ddp.time.monotonic", lambda: now[0])
    reporter = Reporter(SimpleNamespace(say=Remote))
    for tick in range(1001):  # ten seconds, as of a rank that looks at images
        now[0] = tick / 100
        answer[0] = tick >= 500
        if reporter.wants_stop():
            break
    assert 5 <= now[0] <= 5.6
    assert 8 <= len(asked) <= 11
    assert min(np.diff(asked)) >= 0.5
