import gc
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from unet_core.inference.lanes import Lanes


def lanes_of(count, run=lambda batch: []):
    return Lanes(SimpleNamespace(lanes=count, run=run))


def test_the_device_goes_to_who_came_first_however_late():
    lanes, had = lanes_of(1), []

    def take(name, ticket):
        with lanes.taken(ticket):
            had.append(name)

    with lanes.ticket() as first, lanes.ticket() as second:
        thread = threading.Thread(target=take, args=("second", second))
        thread.start()  # it is ready sooner
        thread.join(0.2)
        assert had == []
        take("first", first)
        thread.join(60)
    assert had == ["first", "second"]


def test_who_fails_in_line_lets_the_next_one_have_the_device():
    lanes = lanes_of(2)
    try:
        with lanes.ticket():
            raise OSError
    except OSError:
        pass
    with lanes.ticket() as ticket, lanes.taken(ticket):
        pass


def test_idle_lanes_are_charged_to_what_is_under_way(monkeypatch):
    monkeypatch.setattr("unet_core.inference.lanes.SAMPLE_S", 60)  # samples are taken here
    begun, may_end, batch = threading.Event(), threading.Event(), Future()

    def run(batch):
        begun.set()
        assert may_end.wait(30)
        return []

    lanes = lanes_of(3, run)
    with lanes.ticket() as ticket:
        lanes.count_idle(1)
        with lanes.taken(ticket):
            with ticket("reading"):
                lanes.count_idle(2)
                with ticket("decoding"):
                    lanes.count_idle(2)
            batch.set_result(None)
            running = lanes.submit(batch, ticket)
            assert begun.wait(30)
            lanes.count_idle(5)
            may_end.set()
            running.result()
        lanes.count_idle(100)  # of the next shard
    seconds = ticket.seconds
    assert seconds.waiting_for_shard == pytest.approx(3 * 1, abs=0.1)
    assert seconds.waiting_for_reading == 3 * 2 + 3 * 1
    assert seconds.waiting_for_decoding == 3 * 1 + 2 * 5
    assert seconds.device > 0


def test_lanes_that_nobody_uses_any_more_are_no_longer_sampled():
    before = set(threading.enumerate())
    lanes = lanes_of(1)
    (sampler,) = set(threading.enumerate()) - before
    del lanes
    gc.collect()
    sampler.join(10)
    assert not sampler.is_alive()
