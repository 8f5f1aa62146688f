"""The board: what is handed out, who is charged, and who is overdue."""

import pytest

from jobs.scheduler.scheduler import Died, Heartbeat, Patience, Ready, Refused
from tests.support.runs import board_of, shard
from unet_core.config.predict import ErrorsConfig


def test_patience_follows_the_size_of_a_shard_and_the_rate_of_the_run():
    patience, small, large = Patience(100.0), shard("s", 10), shard("l", 10**9)
    assert patience.limit_s(large) == 100
    patience.learn(shard("m", 10**7), 10.0)
    patience.learn(shard("m", 10**7), 2.0)
    assert patience.limit_s(small) == pytest.approx(100, abs=1)
    assert patience.limit_s(large) == pytest.approx(100 + 6 * 100, rel=0.15)


def board_of_one():
    now = [0.0]
    board = board_of([shard("a"), shard("b")], deadline_s=1e-6)
    board.clock = lambda: now[0]
    board.note(Ready("first"))
    board.next_for("first"), board.next_for("first")
    return board, now


def test_slow_work_that_makes_steps_is_never_given_up():
    board, now = board_of_one()
    for step in range(50):
        now[0] += 100
        board.note(Heartbeat("first", {"a": step + 1, "b": 7}))
        assert list(board.overdue()) == []
    now[0] += 121
    board.note(Heartbeat("first", {"a": 50, "b": 8}))  # the next one is read, this one stands still
    ((actor, reason),) = board.overdue()
    assert (actor, reason) == ("first", "shard a has made no step for 120 s")


def test_a_shard_that_comes_to_its_end_excuses_no_older_one():
    board, now = board_of_one()
    now[0] = 100
    board.done("first", "b")
    now[0] = 121
    assert [actor for actor, _ in board.overdue()] == ["first"]


def test_a_driver_that_was_stopped_blames_nobody_for_it():
    board, now = board_of_one()
    now[0] = 2000
    board.forgive(2000)
    assert list(board.overdue()) == []


def test_a_trial_that_comes_to_no_end_is_held_once_more_and_a_lost_node_does_not_count():
    board = board_of([shard("a")], ErrorsConfig(max_attempts=1))
    deaths = [False, True, True, False, False]  # alone; nodes lost on trial; deaths on trial
    for number, blameless in enumerate(deaths):
        board.note(Ready(f"actor-{number}"))
        attempt = board.next_for(f"actor-{number}")
        assert (attempt.trial_s is not None) == (number > 0)
        assert not board.set_aside
        board.note(Died(f"actor-{number}", "it died", blameless))
    assert board.set_aside == {"a": "its images were tried one by one, and even so: it died"}


def test_a_stopped_board_begins_nothing_and_keeps_what_is_under_way():
    board = board_of([shard(name) for name in "abcd"])
    board.in_flight = {"first": []}
    assert board.next_for("first") is not None
    board.stop()
    assert board.next_for("first") is None
    assert (board.is_done, board.open) == (False, 1)
    board.died(Died("first", "died"))
    assert board.is_done
    assert board.set_aside == {}


def test_a_refused_shard_is_set_aside_at_once():
    board = board_of([shard("a")])
    board.in_flight = {"first": []}
    board.next_for("first")
    board.note(Refused("first", "a", "it is gone"))
    assert board.is_done
    assert (board.set_aside, board.charged) == ({"a": "it is gone"}, {})


def test_a_lost_node_charges_nobody():
    board = board_of([shard("a")])
    for actor in ("first", "second", "third"):
        board.in_flight[actor] = []
        assert board.next_for(actor) is not None
        board.died(Died(actor, "node lost", blameless=True))
    assert board.charged == {}
    assert [s.shard_id for s in board.waiting] == ["a"]


def test_the_last_shards_are_shared_out_rather_than_held_by_one():
    board = board_of([shard(name) for name in "abcd"])
    board.in_flight = {"first": [], "second": []}
    for actor in ("first", "second"):
        while board.next_for(actor) is not None:
            pass
    assert [len(held) for held in board.in_flight.values()] == [2, 1]
    assert (board.open, len(board.waiting)) == (4, 1)


def test_an_actor_holds_no_shard_that_one_still_starting_could_begin():
    board = board_of([shard(name) for name in "ab"])
    board.in_flight = {"first": []}
    assert board.next_for("first", actors=2) is not None
    assert board.next_for("first", actors=2) is None
    assert board.next_for("first", actors=1) is not None


def test_what_an_actor_holds_makes_no_other_useful():
    board = board_of([shard(name) for name in "abc"])
    board.in_flight = {"first": []}
    while board.next_for("first") is not None:
        pass
    board.in_flight["second"] = []
    assert board.next_for("second") is not None
    assert (board.open, board.useful) == (3, 2)
    board.died(Died("first", "died"))
    assert (board.open, board.useful) == (3, 3)
