"""Many placements at once are what `evaluate` gives for each."""

import numpy as np
import pytest
from conftest import posed

from partition import suites
from partition.batch import Batch
from partition.errors import InfeasibleError
from partition.evaluation import crossings, evaluate, verify
from partition.problem import LIMITS, OBJECTIVES, Problem


def held(problem: Problem, seed: int, count: int) -> int:
    rng = np.random.default_rng(seed)
    mesh = rng.integers(0, len(problem.meshes), (count, len(problem)))
    mesh[: count // 2] = np.sort(mesh[: count // 2], axis=1)
    found, fits = Batch(problem).values(mesh, LIMITS), 0
    for b in range(count):
        placement = problem.placement(mesh[b])
        try:
            verify(problem, placement)
        except InfeasibleError:
            assert all(found[o][b] == (0.0 if o == "throughput" else np.inf) for o in OBJECTIVES)
            continue
        estimate, fits = evaluate(problem, placement), fits + 1
        assert found["crossings"][b] == estimate.crossings == len(crossings(problem, placement))
        for o in ("throughput", "usd_per_mtok", "joules_per_token") if problem.ports is not None else OBJECTIVES:
            assert found[o][b] == pytest.approx(getattr(estimate, o), rel=1e-9), o
    return fits


@pytest.mark.parametrize("cluster", ["trn2_efa_cs3", "trn2_efa_4cs3", "cs3_only", "h100_disagg"])
@pytest.mark.parametrize("level", ["block", "op"])
def test_all_objectives_over_links(cluster: str, level: str) -> None:
    problem, _ = posed(cluster, level=level)
    assert held(problem, 0, 30 if level == "block" else 6)


def test_through_a_host_and_where_memory_is_short() -> None:
    assert held(suites.layered(40, 1, (2, 2)), 0, 40)
    assert held(suites.transformer(3, 2), 1, 40)


def test_scores_are_those_of_one_objective() -> None:
    problem, _ = posed(objective="throughput")
    mesh = np.zeros((3, len(problem)), int)
    scores = Batch(problem).scores(mesh)
    assert (scores < 0).all() and scores[0] == pytest.approx(-evaluate(problem, problem.placement(mesh[0])).throughput)
