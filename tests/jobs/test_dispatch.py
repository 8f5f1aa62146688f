"""The dispatcher against scripted workers: what each shard does to its actor on each attempt."""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.board import PREFETCH, Board, Died, Done, Heartbeat, Patience, Ready, Refused
from jobs.dispatch import dispatch
from jobs.placement import Placement, settle, wanted
from unet_core.config import ErrorsConfig, StorageConfig, WorkersConfig
from unet_core.errors import WorkersError
from unet_core.inputs.shards import Shard
from unet_core.runs.timings import Seconds, ShardResult
from unet_core.scores.metrics import Totals


def shard(name: str, size: int = 1) -> Shard:
    return Shard(name, name, size, None, None, None)


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
        self.started.append((attempt.shard.shard_id, attempt.alone))
        assert attempt.alone or attempt.trial_s is None
        assert len(self.held[actor]) <= PREFETCH
        assert not (attempt.alone and len(self.held[actor]) > 1)

    def want(self, actors, shards) -> int:
        self.wanted = actors
        return len(self.held)

    def kills(self, attempt) -> bool:
        name = attempt.shard.shard_id
        is_cured = attempt.trial_s is not None and name not in self.incurable
        return bool(self.killers.get(name)) and not is_cured

    def pressure(self, actor) -> int:
        held = self.held[actor]
        return len(held) if held and not self.hangs(held[0]) else 0

    def hangs(self, attempt) -> bool:
        return attempt.shard.shard_id in self.hanging and attempt.trial_s is None

    def give_up(self, actor, reason):
        self.given_up.append(reason)
        del self.held[actor]
        self.replace()
        return Died(actor, reason, is_overdue=True)

    def release(self, actor) -> None:
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
            name = self.held[actor].pop(0).shard.shard_id
            yield Done(actor, name, ShardResult(name, Totals(), Seconds()))


def board_of(plan, errors=None, deadline_s=300):
    return Board.of(plan, errors or ErrorsConfig(), StorageConfig(deadline_s=deadline_s))


def run(names, actors=2, killers=None, **script):
    workers = ScriptedWorkers(actors, killers or {}, **script)
    board = board_of([shard(name) for name in names], ErrorsConfig(stall_s=50), deadline_s=50)
    board.clock = lambda: workers.now
    done: list[str] = []
    dispatch(board, workers, lambda result, attempt, actor: done.append(result.shard_id))
    return board, workers, done


def test_every_shard_is_done_once_the_largest_first():
    board = board_of([shard("small", 1), shard("large", 9), shard("middle", 5)])
    assert [s.shard_id for s in board.waiting] == ["large", "middle", "small"]
    _, workers, done = run("abcdefgh", actors=3)
    assert sorted(done) == list("abcdefgh")
    assert len(workers.started) == 8


def test_a_single_death_charges_nobody_and_suspects_run_alone():
    board, workers, done = run("abcdef", actors=1, killers={"b": 1})
    assert sorted(done) == list("abcdef")
    assert board.charged == {}
    again = Counter(name for name, _ in workers.started)
    assert {name for name, count in again.items() if count == 2} == {"a", "b"}
    assert all(alone for name, alone in workers.started[2:4])


def test_a_poisoned_shard_goes_on_trial_after_two_deaths_alone_and_its_neighbour_does_not():
    board, workers, done = run("abcdef", actors=2, killers={"c": 99})
    assert sorted(done) == list("abcdef")
    assert (board.set_aside, board.charged) == ({}, {"c": 2})
    assert Counter(name for name, _ in workers.started)["c"] == 4


def test_a_shard_that_kills_even_on_trial_is_set_aside():
    board, workers, done = run("abcdef", killers={"c": 99}, incurable=frozenset("c"))
    assert sorted(done) == list("abdef")
    assert board.set_aside == {"c": "its images were tried one by one, and even so: killed by c"}
    assert Counter(name for name, _ in workers.started)["c"] == 5


def test_what_does_not_come_to_an_end_goes_on_trial_after_hanging_once_alone():
    board, workers, done = run("abcdef", actors=2, hanging=frozenset("c"))
    assert sorted(done) == list("abcdef")
    assert (set(board.charged), board.set_aside) == ({"c"}, {})
    assert len(workers.given_up) == 2
    assert workers.now > 2 * 100
    assert "shard c has made no step for" in workers.given_up[0]


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


def test_actors_that_never_become_ready_stop_the_run():
    with pytest.raises(WorkersError, match="3 actors died while starting: cannot load"):
        run("abc", actors=1, dead_on_arrival=3)
    _, _, done = run("abc", actors=1, dead_on_arrival=2)
    assert sorted(done) == list("abc")


def test_actors_lost_with_their_node_while_starting_stop_nothing():
    board, workers = board_of([shard("a")]), ScriptedWorkers(1, {})
    deaths = [Died(f"lost-{n}", "node lost", blameless=True) for n in range(5)]
    events = workers.events
    workers.events = lambda: iter([deaths.pop()]) if deaths else events()
    done: list[str] = []
    dispatch(board, workers, lambda result, attempt, actor: done.append(result.shard_id))
    assert done == ["a"]


@pytest.mark.parametrize(
    ("keys", "nodes", "placed"),
    [
        ({}, [(0, 64), (1, 8), (1, 8)], Placement(2, 1, 8)),
        ({}, [(8, 96)], Placement(8, 1, 12)),
        ({}, [(0, 16), (0, 16)], Placement(2, 0, 16)),
        ({"count": 4}, [(0, 8), (0, 8)], Placement(4, 0, 4)),
        ({"gpus": 0.3}, [(2, 12)], Placement(6, 0.3, 1)),
        ({"gpus": 0.5, "cpus": 1}, [(2, 12)], Placement(4, 0.5, 1)),
        ({"count": 2, "gpus": 0, "cpus": 1}, [(4, 4)], Placement(2, 0, 1)),
        ({"max": 16}, [(1, 8), (1, 8)], Placement(16, 1, 8)),
        ({"max": 16}, [], Placement(16, 1, 1)),
        ({"max": 16}, [(0, 0)], Placement(16, 1, 1)),
        ({"max": 3}, [(0, 8)], Placement(3, 0, 8)),
        ({"max": 2, "accelerator_type": "L4"}, [], Placement(2, 1, 1)),
        ({"count": 2}, [(0, 0), (0, 8), (0, 8)], Placement(2, 0, 8)),
        ({"gpus": 0.1, "cpus": 0.1}, [(4, 16)], Placement(40, 0.1, 0.1)),
    ],
)
def test_actors_are_placed_on_nodes_that_can_hold_them(keys, nodes, placed):
    assert settle(WorkersConfig(**keys), nodes) == placed


@pytest.mark.parametrize(
    ("keys", "room", "actors"),
    [({}, 7, 7), ({}, 0, 1), ({"max": 5}, 0, 5), ({"max": 5}, 9, 5), ({"count": 3}, 0, 3)],
)
def test_as_many_actors_are_wanted_as_nodes_can_hold_or_the_config_asks_for(keys, room, actors):
    assert wanted(WorkersConfig(**keys), room) == actors


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


def test_ranks_may_wait_for_nodes_and_get_their_share_of_those_there_are():
    workers = WorkersConfig(count=2)
    assert settle(workers, [(0, 8)], may_wait=True) == Placement(2, 0, 4)
    assert settle(workers, [], may_wait=True) == Placement(2, 1, 1)


def test_actors_that_nothing_is_left_for_are_released():
    _, workers, done = run("abcde", actors=4)
    assert sorted(done) == list("abcde")
    assert set(workers.released) <= {f"actor-{n}" for n in range(4)}
    assert len(workers.released) >= 3
    assert workers.wanted == 0


def test_actors_that_fit_no_node_are_refused_with_what_there_is():
    with pytest.raises(WorkersError, match=r"room for 2; lower"):
        settle(WorkersConfig(count=3, gpus=1, cpus=8), [(1, 8), (1, 8), (1, 4)])


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
    board, _, done = run(names, actors, scripted, **script)
    assert sorted([*done, *board.set_aside]) == names
    assert set(board.charged) <= set(scripted) | script["hanging"]
    forever = {name for name, times in scripted.items() if times == 99}
    assert forever & script["incurable"] <= set(board.set_aside)
    assert set(board.set_aside) <= set(scripted) & script["incurable"]
