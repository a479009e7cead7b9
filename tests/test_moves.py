"""A placement that changes a node at a time is worth what `evaluate` says of it."""

import dataclasses

import numpy as np
import pytest
from conftest import posed

from partition import suites
from partition.errors import InfeasibleError, PlacementError
from partition.evaluation import evaluate, verify
from partition.moves import LOADS, Moves


@pytest.mark.parametrize("cluster", ["trn2_efa_cs3", "trn2_efa_4cs3", "cs3_only", "h100_disagg"])
@pytest.mark.parametrize("level", ["block", "op"])
def test_every_move_is_what_a_whole_evaluation_gives(cluster: str, level: str) -> None:
    problem, _ = posed(cluster, level=level)
    rng = np.random.default_rng(0)
    moves = Moves(problem.placement(rng.integers(len(problem.meshes), size=len(problem))))
    for turn in range(60):
        moves.move(int(rng.integers(len(problem))), int(rng.integers(len(problem.meshes))))
        if turn % 6 and level == "op":
            continue
        placement = moves.placement()
        assert moves.memory() == pytest.approx(problem.memory(placement).tolist())
        try:
            verify(problem, placement)
        except InfeasibleError:
            assert all(moves.score(o) == np.inf for o in LOADS)
            continue
        estimate = evaluate(problem, placement)
        for o in LOADS:
            assert moves.score(o) == pytest.approx(estimate.score(o), rel=1e-9), o


def test_a_mesh_that_cannot_run_a_node_is_left_again() -> None:
    problem, _ = posed()
    seconds = problem.seconds.copy()
    seconds[3, 1] = np.inf
    problem = dataclasses.replace(problem, seconds=seconds)
    moves = Moves(problem.placement(np.zeros(len(problem), int)))
    before = moves.score("throughput")
    moves.move(3, 1)
    assert moves.score("throughput") == np.inf
    moves.move(3, 0)
    assert moves.score("throughput") == pytest.approx(before, rel=1e-12)


def test_what_moves_are_not_for() -> None:
    problem, _ = posed()
    moves = Moves(problem.placement(np.zeros(len(problem), int)))
    with pytest.raises(PlacementError, match="not counted for e2e"):
        moves.score("e2e")
    with pytest.raises(PlacementError, match="cannot move to mesh 7"):
        moves.move(0, 7)
    host = suites.chain(6, 0)
    with pytest.raises(PlacementError, match="over links"):
        Moves(host.placement(np.zeros(len(host), int)))
