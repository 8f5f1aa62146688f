"""What the device waited for, as ``timings/`` tells it."""

import threading
import time
from dataclasses import replace

import pytest

from jobs.predict import predict
from unet_core.images import decoder
from unet_core.inference import shard_segmenter
from unet_core.inference.lanes import Lanes
from unet_core.runs.timings import Seconds, Stopwatch, recent_seconds
from unet_core.storage.store import Store

SLOW_S = 0.25  # far above what the device takes, also on a busy machine


def slow_reading(monkeypatch):
    real = shard_segmenter.read_shard

    def read_shard(source, shard):
        for sample in real(source, shard):
            time.sleep(SLOW_S)
            yield sample

    monkeypatch.setattr(shard_segmenter, "read_shard", read_shard)


def slow_objects(monkeypatch):
    """Loose images are read by the threads that decode them."""
    real = shard_segmenter.read_shard

    def read_shard(source, shard):
        for sample in real(source, shard):
            yield replace(sample, read=lambda sample=sample: (time.sleep(SLOW_S), sample.read())[1])

    monkeypatch.setattr(shard_segmenter, "read_shard", read_shard)


def slow_decoding(monkeypatch):
    real = decoder.decode_images
    monkeypatch.setattr(
        decoder, "decode_images", lambda *args: (time.sleep(SLOW_S), real(*args))[1]
    )


@pytest.mark.parametrize(
    ("slow", "what"),
    [(slow_reading, "reading"), (slow_objects, "reading"), (slow_decoding, "decoding")],
)
def test_the_device_says_what_it_waited_for(slow, what, make_config, monkeypatch, tmp_path):
    slow(monkeypatch)
    predict(make_config())
    seconds = recent_seconds(Store(str(tmp_path / "run")))
    assert getattr(seconds, what) >= 12 * SLOW_S
    other = {"reading": "decoding", "decoding": "reading"}[
        what
    ]  # the wait for a shard has the start
    assert getattr(seconds, f"waiting_for_{what}") > getattr(seconds, f"waiting_for_{other}")
    shares = seconds.shares
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[f"waiting for {what}"] > 0.2
    assert 0 < shares["busy"] < 0.8


def test_a_device_without_a_shard_waits_for_one(make_config, monkeypatch, tmp_path):
    real = Lanes.ticket

    def place(self):
        if not seen:
            time.sleep(1.0)
        seen.append(self)
        return real(self)

    seen = []
    monkeypatch.setattr(Lanes, "ticket", place)
    predict(make_config("workers.cpus=1"))
    assert recent_seconds(Store(str(tmp_path / "run"))).waiting_for_shard >= 0.95


def test_a_stopwatch_sums_threads_and_pauses_the_stage_around():
    stopwatch = Stopwatch()

    def decode():
        with stopwatch("decoding"):
            time.sleep(0.2)
            stopwatch("reading", inside="decoding")(time.sleep)(0.1)

    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert stopwatch.threads["decoding"] == 3
    for thread in threads:
        thread.join()
    assert stopwatch.seconds.decoding == pytest.approx(0.6, rel=0.3)
    assert stopwatch.seconds.reading == pytest.approx(0.3, rel=0.3)
    assert not any(stopwatch.threads[stage] for stage in ("reading", "decoding"))


def test_seconds_add_up():
    both = Seconds(reading=1, device=2) + Seconds(device=3, waiting_for_shard=5)
    assert both == Seconds(reading=1, device=5, waiting_for_shard=5)
    assert both.shares["busy"] == 0.5
    assert Seconds().shares == {}
