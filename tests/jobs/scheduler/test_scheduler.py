"""The scheduler: what is handed out, which failures count, and who is overdue."""

import pytest

from jobs.scheduler.events import Died, Heartbeat, Ready, Refused
from jobs.scheduler.scheduler import StallTimeout
from tests.support.runs import board_of, shard
from unet_core.config.predict import ErrorsConfig


def test_patience_follows_the_size_of_a_shard_and_the_rate_of_the_run():
    stall_timeout, small, large = StallTimeout(100.0), shard("s", 10), shard("l", 10**9)
    assert stall_timeout.limit_s(large) == 100
    stall_timeout.record_duration(shard("m", 10**7), 10.0)
    stall_timeout.record_duration(shard("m", 10**7), 2.0)
    assert stall_timeout.limit_s(small) == pytest.approx(100, abs=1)
    assert stall_timeout.limit_s(large) == pytest.approx(100 + 6 * 100, rel=0.15)


def board_of_one():
    now = [0.0]
    scheduler = board_of([shard("a"), shard("b")], deadline_s=1e-6)
    scheduler.clock = lambda: now[0]
    scheduler.handle(Ready("first"))
    scheduler.next_for("first"), scheduler.next_for("first")
    return scheduler, now


def test_slow_work_that_makes_steps_is_never_given_up():
    scheduler, now = board_of_one()
    for step in range(50):
        now[0] += 100
        scheduler.handle(Heartbeat("first", {"a": step + 1, "b": 7}))
        assert list(scheduler.overdue()) == []
    now[0] += 121
    scheduler.handle(
        Heartbeat("first", {"a": 50, "b": 8})
    )  # the next one is read, this one stands still
    ((actor, reason),) = scheduler.overdue()
    assert (actor, reason) == ("first", "shard a has made no step for 120 s")


def test_a_shard_that_comes_to_its_end_excuses_no_older_one():
    scheduler, now = board_of_one()
    now[0] = 100
    scheduler.done("first", "b")
    now[0] = 121
    assert [actor for actor, _ in scheduler.overdue()] == ["first"]


def test_a_driver_that_was_stopped_blames_nobody_for_it():
    scheduler, now = board_of_one()
    now[0] = 2000
    scheduler.exclude_pause(2000)
    assert list(scheduler.overdue()) == []


def test_a_trial_that_comes_to_no_end_is_held_once_more_and_a_lost_node_does_not_count():
    scheduler = board_of([shard("a")], ErrorsConfig(max_attempts=1))
    deaths = [False, True, True, False, False]  # alone; nodes lost on trial; deaths on trial
    for number, node_lost in enumerate(deaths):
        scheduler.handle(Ready(f"actor-{number}"))
        attempt = scheduler.next_for(f"actor-{number}")
        assert (attempt.isolation_timeout_s is not None) == (number > 0)
        assert not scheduler.set_aside
        scheduler.handle(Died(f"actor-{number}", "it died", node_lost))
    assert scheduler.set_aside == {
        "a": "it still crashes workers after its images were isolated: it died"
    }


def test_a_stopped_board_begins_nothing_and_keeps_what_is_under_way():
    scheduler = board_of([shard(name) for name in "abcd"])
    scheduler.in_flight = {"first": []}
    assert scheduler.next_for("first") is not None
    scheduler.stop()
    assert scheduler.next_for("first") is None
    assert scheduler.open == 1
    scheduler.died(Died("first", "died"))
    assert not scheduler.open
    assert scheduler.set_aside == {}


def test_a_refused_shard_is_set_aside_at_once():
    scheduler = board_of([shard("a")])
    scheduler.in_flight = {"first": []}
    scheduler.next_for("first")
    scheduler.handle(Refused("first", "a", "it is gone"))
    assert not scheduler.open
    assert (scheduler.set_aside, scheduler.failure_count) == ({"a": "it is gone"}, {})


def test_a_lost_node_charges_nobody():
    scheduler = board_of([shard("a")])
    for actor in ("first", "second", "third"):
        scheduler.in_flight[actor] = []
        assert scheduler.next_for(actor) is not None
        scheduler.died(Died(actor, "node lost", node_lost=True))
    assert scheduler.failure_count == {}
    assert [s.shard_id for s in scheduler.waiting] == ["a"]


def test_the_last_shards_are_shared_out_rather_than_held_by_one():
    scheduler = board_of([shard(name) for name in "abcd"])
    scheduler.in_flight = {"first": [], "second": []}
    for actor in ("first", "second"):
        while scheduler.next_for(actor) is not None:
            pass
    assert [len(held) for held in scheduler.in_flight.values()] == [2, 1]
    assert (scheduler.open, len(scheduler.waiting)) == (4, 1)


def test_an_actor_holds_no_shard_that_one_still_starting_could_begin():
    scheduler = board_of([shard(name) for name in "ab"])
    scheduler.in_flight = {"first": []}
    assert scheduler.next_for("first", workers=2) is not None
    assert scheduler.next_for("first", workers=2) is None
    assert scheduler.next_for("first", workers=1) is not None


def test_what_an_actor_holds_makes_no_other_useful():
    scheduler = board_of([shard(name) for name in "abc"])
    scheduler.in_flight = {"first": []}
    while scheduler.next_for("first") is not None:
        pass
    scheduler.in_flight["second"] = []
    assert scheduler.next_for("second") is not None
    assert (scheduler.open, scheduler.max_useful_workers) == (3, 2)
    scheduler.died(Died("first", "died"))
    assert (scheduler.open, scheduler.max_useful_workers) == (3, 3)
