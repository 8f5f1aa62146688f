"""The dispatcher against scripted workers: what each shard does to its actor on each attempt."""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.scheduler.dispatch import dispatch
from jobs.scheduler.events import MAX_SHARDS_PER_WORKER, Died, Done, Ready
from tests.support.runs import failures, scheduler_of, shard
from unet_core.config.predict import ErrorsConfig
from unet_core.errors import WorkersError
from unet_core.metrics import Totals
from unet_core.runs.timings import Seconds, ShardResult


class ScriptedWorkers:
    """Actors that finish the older shard they hold, unless a script says that it kills them.

    On trial a killer's guilty images are found, unless it is incurable.
    """

    def __init__(
        self,
        actors: int,
        killers: dict[str, int],
        dead_on_arrival: int = 0,
        incurable: frozenset[str] = frozenset(),
        hanging: frozenset[str] = frozenset(),
    ) -> None:
        self.killers = dict(killers)
        self.incurable, self.hanging = incurable, hanging
        self.now = 0.0
        self.given_up: list[str] = []
        self.dead_on_arrival = dead_on_arrival
        self.held: dict[str, list] = {}
        self.fresh = [f"actor-{n}" for n in range(actors)]
        self.placed = actors
        self.started: list[tuple[str, bool]] = []
        self.released: list[str] = []

    def submit(self, actor, attempt) -> None:
        self.held[actor].append(attempt)
        self.started.append((attempt.shard.shard_id, attempt.is_alone))
        assert attempt.is_alone or not attempt.is_isolation
        assert len(self.held[actor]) <= MAX_SHARDS_PER_WORKER
        assert not (attempt.is_alone and len(self.held[actor]) > 1)

    def scale(self, actors, shards) -> int:
        self.wanted = actors
        return len(self.held)

    def kills(self, attempt) -> bool:
        name = attempt.shard.shard_id
        is_cured = attempt.is_isolation and name not in self.incurable
        return bool(self.killers.get(name)) and not is_cured

    def pressure(self, actor) -> int:
        held = self.held[actor]
        return len(held) if held and not self.hangs(held[0]) else 0

    def hangs(self, attempt) -> bool:
        return attempt.shard.shard_id in self.hanging and not attempt.is_isolation

    def kill_stalled(self, actor, reason):
        self.given_up.append(reason)
        del self.held[actor]
        self.replace()
        return Died(actor, reason, is_overdue=True)

    def stop_idle(self, actor) -> None:
        assert not self.held.pop(actor)
        self.released.append(actor)

    def replace(self) -> None:
        self.fresh.append(f"actor-{self.placed}")
        self.placed += 1

    def events(self) -> Iterator[object]:
        if self.fresh:
            actor = self.fresh.pop()
            if self.dead_on_arrival:
                self.dead_on_arrival -= 1
                self.replace()
                yield Died(actor, "cannot load")
            else:
                self.held[actor] = []
                yield Ready(actor)
            return
        actor = max(self.held, key=self.pressure)
        self.now += 1.0
        killer = next((a for a in self.held[actor] if self.kills(a)), None)
        if self.held[actor] and self.hangs(self.held[actor][0]):
            return
        if killer is not None:
            self.killers[killer.shard.shard_id] -= 1
            del self.held[actor]
            self.replace()
            yield Died(actor, f"killed by {killer.shard.shard_id}")
        elif self.held[actor]:
            attempt = self.held[actor].pop(0)
            yield Done(actor, attempt, ShardResult(attempt.shard.shard_id, Totals(), Seconds()))


def run(names, actors=2, killers=None, **script):
    workers = ScriptedWorkers(actors, killers or {}, **script)
    scheduler = scheduler_of(
        [shard(name) for name in names], ErrorsConfig(stall_s=50), deadline_s=50
    )
    scheduler.clock = lambda: workers.now
    done: list[str] = []
    dispatch(scheduler, workers, lambda event: done.append(event.result.shard_id))
    return scheduler, workers, done


def test_every_shard_is_done_once_the_largest_first():
    scheduler = scheduler_of([shard("small", 1), shard("large", 9), shard("middle", 5)])
    assert [s.shard_id for s in scheduler.waiting] == ["large", "middle", "small"]
    _, workers, done = run("abcdefgh", actors=3)
    assert sorted(done) == list("abcdefgh")
    assert len(workers.started) == 8


def test_a_single_death_charges_nobody_and_suspects_run_alone():
    scheduler, workers, done = run("abcdef", actors=1, killers={"b": 1})
    assert sorted(done) == list("abcdef")
    assert failures(scheduler) == {}
    again = Counter(name for name, _ in workers.started)
    assert {name for name, count in again.items() if count == 2} == {"a", "b"}
    assert all(alone for name, alone in workers.started[2:4])


def test_a_poisoned_shard_goes_on_trial_after_two_deaths_alone_and_its_neighbour_does_not():
    scheduler, workers, done = run("abcdef", actors=2, killers={"c": 99})
    assert sorted(done) == list("abcdef")
    assert (scheduler.set_aside, failures(scheduler)) == ({}, {"c": 2})
    assert Counter(name for name, _ in workers.started)["c"] == 4


def test_a_shard_that_kills_even_on_trial_is_set_aside():
    scheduler, workers, done = run("abcdef", killers={"c": 99}, incurable=frozenset("c"))
    assert sorted(done) == list("abdef")
    assert scheduler.set_aside == {
        "c": "it still crashes workers after its images were isolated: killed by c"
    }
    assert Counter(name for name, _ in workers.started)["c"] == 5


def test_what_does_not_come_to_an_end_goes_on_trial_after_hanging_once_alone():
    scheduler, workers, done = run("abcdef", actors=2, hanging=frozenset("c"))
    assert sorted(done) == list("abcdef")
    assert (set(failures(scheduler)), scheduler.set_aside) == ({"c"}, {})
    assert len(workers.given_up) == 2
    assert workers.now > 2 * 100
    assert "shard c has made no step for" in workers.given_up[0]


def test_actors_that_never_become_ready_stop_the_run():
    with pytest.raises(WorkersError, match="3 workers died while starting: cannot load"):
        run("abc", actors=1, dead_on_arrival=3)
    _, _, done = run("abc", actors=1, dead_on_arrival=2)
    assert sorted(done) == list("abc")


def test_actors_lost_with_their_node_while_starting_stop_nothing():
    scheduler, workers = scheduler_of([shard("a")]), ScriptedWorkers(1, {})
    deaths = [Died(f"lost-{n}", "node lost", node_lost=True) for n in range(5)]
    events = workers.events
    workers.events = lambda: iter([deaths.pop()]) if deaths else events()
    done: list[str] = []
    dispatch(scheduler, workers, lambda event: done.append(event.result.shard_id))
    assert done == ["a"]


def test_actors_that_nothing_is_left_for_are_released():
    _, workers, done = run("abcde", actors=4)
    assert sorted(done) == list("abcde")
    assert set(workers.released) <= {f"actor-{n}" for n in range(4)}
    assert len(workers.released) >= 3
    assert workers.wanted == 0


@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.dictionaries(st.integers(0, 11), st.sampled_from([1, 2, 99]), max_size=3),
    st.frozensets(st.integers(0, 11), max_size=3),
    st.frozensets(st.integers(0, 11), max_size=2),
)
def test_whatever_kills_or_stalls_actors_every_shard_is_done_or_set_aside(
    shards, actors, killers, incurable, hanging
):
    names = [f"s{n:02d}" for n in range(shards)]
    scripted = {names[n]: times for n, times in killers.items() if n < shards}
    script = {
        key: frozenset(names[n] for n in chosen if n < shards)
        for key, chosen in (("incurable", incurable), ("hanging", hanging))
    }
    scheduler, _, done = run(names, actors, scripted, **script)
    assert sorted([*done, *scheduler.set_aside]) == names
    assert set(failures(scheduler)) <= set(scripted) | script["hanging"]
    forever = {name for name, times in scripted.items() if times == 99}
    assert forever & script["incurable"] <= set(scheduler.set_aside)
    assert set(scheduler.set_aside) <= set(scripted) & script["incurable"]
