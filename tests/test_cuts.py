"""The bound of minimum cuts holds against every placement, and is what a cut by hand says."""

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import shortest_load
from hypothesis import given, settings
from hypothesis import strategies as st

from partition import suites
from partition.bounds import lower_bound
from partition.chain import reduced
from partition.cuts import split, two_kinds
from partition.evaluation import evaluate
from partition.pipeline import place


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["chain", "series_parallel", "layered"]), st.integers(0, 10_000), st.sampled_from([(1, 1), (2, 1)]), st.booleans())
def test_no_placement_is_better(maker: str, seed: int, counts: tuple[int, ...], lacking: bool) -> None:
    problem = getattr(suites, maker)(6, seed, counts)
    if len(problem) > 8:
        return
    if lacking:
        seconds = problem.seconds.copy()
        seconds[2, -1] = np.inf
        problem = dataclasses.replace(problem, seconds=seconds)
    best = shortest_load(problem)
    assert two_kinds(problem) <= best
    assert lower_bound(problem).score <= -problem.workload.tokens / best * (1 - 1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_a_cut_is_the_least_mean_of_all_placements(seed: int) -> None:
    problem = dataclasses.replace(suites.series_parallel(8, seed, (1, 1)), capacity=np.full(2, np.inf))
    chain, weights = reduced(problem, ordered=False), np.array([0.3, 0.7])
    means = [weights @ np.array(evaluate(problem, problem.placement(mesh)).occupied) for mesh in itertools.product(range(2), repeat=len(problem))]
    value, second = split(chain, weights)
    assert value == pytest.approx(min(means), rel=1e-6) and value <= min(means)
    mesh = np.zeros(len(problem), int)
    for g, nodes in enumerate(chain.groups):
        mesh[list(nodes)] = second[g]
    assert weights @ np.array(evaluate(problem, problem.placement(mesh)).occupied) == pytest.approx(value, rel=1e-6)


def test_other_problems_have_none() -> None:
    assert two_kinds(suites.chain(6, 0, (3,))) == 0.0 == two_kinds(suites.chain(6, 0, (1, 1, 1)))


def test_kind_cut_comes_near_the_bound_on_ten_thousand_nodes() -> None:
    problem = suites.chain(10_000, 1, (4, 4))
    placement = place(problem, "kind_cut")
    assert lower_bound(problem).gap(evaluate(problem, placement).score("throughput")) < 0.05
