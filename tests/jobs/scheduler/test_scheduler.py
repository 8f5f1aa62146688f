"""The scheduler: what is handed out, which failures count, and who is overdue."""

from itertools import islice

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jobs.scheduler.events import (
    MAX_SHARDS_PER_WORKER,
    Died,
    Done,
    Heartbeat,
    Ready,
    Refused,
)
from jobs.scheduler.scheduler import MAX_ISOLATIONS, StallTimeout
from tests.support.runs import failures, scheduler_of, shard
from unet_core.config.predict import ErrorsConfig
from unet_core.metrics import Totals
from unet_core.runs.timings import Seconds, ShardResult


def ready(scheduler, *names):
    for name in names:
        scheduler.handle(Ready(name))


def held(scheduler):
    """Ids of the shards in flight, by worker."""
    return {
        name: [attempt.shard.shard_id for attempt in worker.held]
        for name, worker in scheduler.workers.items()
    }


def done(worker, attempt):
    return Done(worker, attempt, ShardResult(attempt.shard.shard_id, Totals(), Seconds()))


def test_patience_follows_the_size_of_a_shard_and_the_rate_of_the_run():
    stall_timeout, small, large = StallTimeout(100.0), shard("s", 10), shard("l", 10**9)
    assert stall_timeout.limit_s(large) == 100
    stall_timeout.record_duration(shard("m", 10**7), 10.0)
    stall_timeout.record_duration(shard("m", 10**7), 2.0)
    assert stall_timeout.limit_s(small) == pytest.approx(100, abs=1)
    assert stall_timeout.limit_s(large) == pytest.approx(100 + 6 * 100, rel=0.15)


def scheduler_of_one():
    now = [0.0]
    scheduler = scheduler_of([shard("a"), shard("b"), shard("c")], deadline_s=1e-6)
    scheduler.clock = lambda: now[0]
    ready(scheduler, "first")
    assert [attempt.shard.shard_id for _, attempt in scheduler.assign()] == ["a", "b"]
    return scheduler, now


def test_slow_work_that_makes_steps_is_never_given_up():
    scheduler, now = scheduler_of_one()
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
    scheduler, now = scheduler_of_one()
    now[0] = 100
    scheduler.handle(done("first", scheduler.workers["first"].held[1]))
    now[0] = 121
    assert [actor for actor, _ in scheduler.overdue()] == ["first"]


def test_a_driver_that_was_stopped_blames_nobody_for_it():
    scheduler, now = scheduler_of_one()
    now[0] = 2000
    scheduler.exclude_pause(2000)
    assert list(scheduler.overdue()) == []


def test_a_trial_that_comes_to_no_end_is_held_once_more_and_a_lost_node_does_not_count():
    scheduler = scheduler_of([shard("a")], ErrorsConfig(max_attempts=1))
    deaths = [False, True, True, False, False]  # alone; nodes lost on trial; deaths on trial
    for number, node_lost in enumerate(deaths):
        ready(scheduler, f"actor-{number}")
        ((_, attempt),) = scheduler.assign()
        assert attempt.is_isolation == (number > 0)
        assert not scheduler.set_aside
        scheduler.handle(Died(f"actor-{number}", "it died", node_lost))
    assert scheduler.set_aside == {
        "a": "it still crashes workers after its images were isolated: it died"
    }


def test_a_stopped_scheduler_begins_nothing_and_keeps_what_is_under_way():
    scheduler = scheduler_of([shard(name) for name in "abcd"])
    ready(scheduler, "first")
    next(scheduler.assign())
    scheduler.stop()
    assert list(scheduler.assign()) == []
    assert scheduler.open_shards == 1
    scheduler.handle(Died("first", "died"))
    assert not scheduler.open_shards
    assert scheduler.set_aside == {}


def test_a_refused_shard_is_set_aside_at_once():
    scheduler = scheduler_of([shard("a")])
    ready(scheduler, "first")
    ((worker, attempt),) = scheduler.assign()
    scheduler.handle(Refused(worker, attempt, "it is gone"))
    assert not scheduler.open_shards
    assert (scheduler.set_aside, failures(scheduler)) == ({"a": "it is gone"}, {})


def test_a_lost_node_counts_as_no_failure():
    scheduler = scheduler_of([shard("a")])
    for actor in ("first", "second", "third"):
        ready(scheduler, actor)
        assert len(list(scheduler.assign())) == 1
        scheduler.handle(Died(actor, "node lost", node_lost=True))
    assert failures(scheduler) == {}
    assert [s.shard_id for s in scheduler.waiting] == ["a"]


def test_the_last_shards_are_shared_out_rather_than_held_by_one():
    scheduler = scheduler_of([shard(name) for name in "abcd"])
    ready(scheduler, "first", "second")
    list(scheduler.assign())
    assert held(scheduler) == {"first": ["a", "b"], "second": ["c"]}
    assert (scheduler.open_shards, len(scheduler.waiting)) == (4, 1)


def test_a_worker_holds_no_shard_that_one_still_starting_could_begin():
    scheduler = scheduler_of([shard(name) for name in "ab"])
    ready(scheduler, "first")
    assert len(list(scheduler.assign(started_workers=2))) == 1
    assert list(scheduler.assign(started_workers=2)) == []
    assert len(list(scheduler.assign(started_workers=1))) == 1


def test_shards_that_a_worker_holds_make_no_other_useful():
    scheduler = scheduler_of([shard(name) for name in "abc"])
    ready(scheduler, "first")
    list(scheduler.assign())
    ready(scheduler, "second")
    list(scheduler.assign())
    assert held(scheduler) == {"first": ["a", "b"], "second": ["c"]}
    assert (scheduler.open_shards, scheduler.max_useful_workers) == (3, 2)
    scheduler.handle(Died("first", "died"))
    assert (scheduler.open_shards, scheduler.max_useful_workers) == (3, 3)


def test_only_workers_without_use_are_released():
    scheduler = scheduler_of([shard("a")])
    ready(scheduler, "first", "second")
    assert scheduler.release_idle() == []
    list(scheduler.assign())
    assert scheduler.release_idle() == ["second"]
    assert held(scheduler) == {"first": ["a"]}


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Workers that are ready, commit, refuse, die and hang in any order that a backend may report:
    after each event every shard is in exactly one place, and only a shard that was alone on a
    worker that died is counted.
    """

    @initialize(shards=st.integers(1, 8), max_attempts=st.integers(1, 3))
    def begin(self, shards, max_attempts):
        self.names = [f"s{n}" for n in range(shards)]
        plan = [shard(name, size) for size, name in enumerate(self.names)]
        errors = ErrorsConfig(max_attempts=max_attempts, stall_s=50)
        self.scheduler = scheduler_of(plan, errors, deadline_s=50)
        self.now, self.started, self.committed, self.counted = 0.0, 0, set(), {}
        self.scheduler.clock = lambda: self.now

    @rule(workers=st.integers(0, 4), begun=st.integers(0, 9))
    def assign(self, workers, begun):
        for name, attempt in islice(self.scheduler.assign(workers), begun):
            assert attempt in self.scheduler.workers[name].held
            assert attempt.is_alone or not attempt.is_isolation

    @precondition(lambda self: len(self.scheduler.workers) < 4)
    @rule()
    def start(self):
        self.started += 1
        ready(self.scheduler, f"w{self.started}")
        assert not self.scheduler.failed_starts

    @rule(node_lost=st.booleans())
    def die_while_starting(self, node_lost):
        before = self.scheduler.failed_starts
        self.scheduler.handle(Died("new", "it died", node_lost))
        counts = not node_lost and not self.scheduler.workers
        assert self.scheduler.failed_starts == before + counts

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def commit(self, data):
        name, attempt = self.any_attempt(data)
        self.scheduler.handle(done(name, attempt))
        self.committed.add(attempt.shard.shard_id)

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def refuse(self, data):
        name, attempt = self.any_attempt(data)
        self.scheduler.handle(Refused(name, attempt, "refused"))
        assert self.scheduler.set_aside[attempt.shard.shard_id] == "refused"

    @precondition(lambda self: self.scheduler.workers)
    @rule(data=st.data(), node_lost=st.booleans(), is_overdue=st.booleans())
    def die(self, data, node_lost, is_overdue):
        name = data.draw(st.sampled_from(sorted(self.scheduler.workers)))
        lost = self.scheduler.workers[name].held
        self.scheduler.handle(Died(name, "it died", node_lost, is_overdue and not node_lost))
        if len(lost) == 1 and not node_lost and not self.scheduler.is_stopped:
            (attempt,) = lost
            self.counted.setdefault(attempt.shard.shard_id, []).append(attempt)

    @rule(seconds=st.floats(0, 500), steps=st.dictionaries(st.integers(0, 7), st.integers(0, 3)))
    def wait(self, seconds, steps):
        self.now += seconds
        for name in self.scheduler.workers:
            self.scheduler.handle(Heartbeat(name, {f"s{n}": count for n, count in steps.items()}))
        overdue = dict(self.scheduler.overdue())
        assert overdue.keys() <= set(self.busy())
        assert not dict(self.scheduler.overdue())
        assert not overdue or self.now > 100  # the shortest timeout

    @rule()
    def release(self):
        s = self.scheduler
        released = s.release_idle()
        assert not (s.waiting or s.retry_alone or s.isolating) or not released
        assert set(released).isdisjoint(s.workers)

    @precondition(lambda self: self.started > 5)
    @rule()
    def stop(self):
        self.scheduler.stop()

    def busy(self):
        return [name for name, worker in self.scheduler.workers.items() if worker.held]

    def any_attempt(self, data):
        name = data.draw(st.sampled_from(self.busy()))
        return name, data.draw(st.sampled_from(self.scheduler.workers[name].held))

    @invariant()
    def every_shard_is_in_one_place(self):
        s = self.scheduler
        queued = [x.shard_id for queue in (s.waiting, s.retry_alone, s.isolating) for x in queue]
        in_flight = [name for names in held(s).values() for name in names]
        found = [*queued, *in_flight, *s.set_aside, *self.committed]
        assert len(found) == len(set(found))
        assert s.is_stopped or sorted(found) == self.names
        assert s.open_shards == len(queued) + len(in_flight)

    @invariant()
    def a_worker_holds_what_it_may(self):
        for worker in self.scheduler.workers.values():
            assert len(worker.held) <= MAX_SHARDS_PER_WORKER
            assert len(worker.held) == 1 or not any(attempt.is_alone for attempt in worker.held)

    @invariant()
    def only_what_was_alone_is_counted(self):
        assert set(failures(self.scheduler)) <= set(self.counted)
        for name, reason in self.scheduler.set_aside.items():
            if reason != "refused":
                isolated = [a for a in self.counted[name] if a.is_isolation]
                assert len(isolated) == MAX_ISOLATIONS


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
