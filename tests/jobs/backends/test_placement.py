"""Where actors are placed, and how many are wanted."""

import pytest

from jobs.backends.placement import Placement, resolve_placement, wanted
from unet_core.config.predict import WorkersConfig
from unet_core.errors import WorkersError


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
    assert resolve_placement(WorkersConfig(**keys), nodes) == placed


@pytest.mark.parametrize(
    ("keys", "room", "actors"),
    [({}, 7, 7), ({}, 0, 1), ({"max": 5}, 0, 5), ({"max": 5}, 9, 5), ({"count": 3}, 0, 3)],
)
def test_as_many_actors_are_wanted_as_nodes_can_hold_or_the_config_asks_for(keys, room, actors):
    assert wanted(WorkersConfig(**keys), room) == actors


def test_ranks_may_wait_for_nodes_and_get_their_share_of_those_there_are():
    workers = WorkersConfig(count=2)
    assert resolve_placement(workers, [(0, 8)], may_wait=True) == Placement(2, 0, 4)
    assert resolve_placement(workers, [], may_wait=True) == Placement(2, 1, 1)


def test_actors_that_fit_no_node_are_refused_with_what_there_is():
    with pytest.raises(WorkersError, match=r"room for 2; lower"):
        resolve_placement(WorkersConfig(count=3, gpus=1, cpus=8), [(1, 8), (1, 8), (1, 4)])
