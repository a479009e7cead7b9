"""Ordered stages: groups, merges that lose nothing, and the shortest path over ideals, held to brute force and to published optima."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import shortest_load
from hypothesis import given, settings
from hypothesis import strategies as st

from partition import instances, suites
from partition.chain import reduced
from partition.errors import InfeasibleError
from partition.evaluation import evaluate, verify
from partition.ideals import _took, best_stages, compromises, ideals, prefixes
from partition.policies import POLICIES
from partition.problem import Problem

FACTS = Path(__file__).parents[2] / "shared" / "facts" / "instances" / "dnn-partitioning"
here = pytest.mark.skipif(not FACTS.is_dir(), reason="the published instances are not beside the repository")


def made(maker: str, n: int, seed: int, counts: tuple[int, ...] = (2, 1)) -> Problem:
    return getattr(suites, maker)(n, seed, counts)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["chain", "series_parallel", "layered"]), st.integers(0, 10_000), st.sampled_from([(2,), (2, 1), (1, 1)]))
def test_ideal_dp_is_the_best_of_all_ordered_stages(maker: str, seed: int, counts: tuple[int, ...]) -> None:
    problem = dataclasses.replace(made(maker, 6, seed, counts), contiguous=True)
    if len(problem) > 9:
        return
    placement = verify(problem, POLICIES["ideal_dp"](problem))
    value = max(evaluate(problem, placement).occupied)
    assert value == pytest.approx(shortest_load(problem), rel=1e-9)
    assert placement.bound is not None and -problem.workload.tokens / placement.bound[0] == pytest.approx(value)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["series_parallel", "layered"]), st.integers(0, 10_000))
def test_merging_groups_loses_no_optimum(maker: str, seed: int) -> None:
    problem = made(maker, 14, seed, (3,))
    plain = reduced(problem)
    first = best_stages(plain, prefixes(plain))
    assert first is not None
    merged = reduced(problem, best=first.value)
    every, fewer = ideals(plain, 10**6), ideals(merged, 10**6)
    assert every is not None and fewer is not None
    exact, found = best_stages(plain, every), best_stages(merged, fewer)
    assert exact is not None and found is not None and found.value == pytest.approx(exact.value, rel=1e-9)
    assert sorted(n for group in merged.groups for n in group) == list(range(len(problem)))


def test_ideals_of_a_chain_and_of_nodes_side_by_side() -> None:
    chain = reduced(suites.chain(5, 0))
    found = ideals(chain, 100)
    assert found is not None and len(found) == 6 and found[0].sum() == 0 and found[-1].all()  # a chain of n has n + 1
    side = suites.posed(np.ones((4, 1)), {}, np.zeros(4), np.zeros(4), (2,), 1.0)
    assert len(ideals(reduced(side), 100)) == 2**4  # type: ignore[arg-type]
    assert ideals(reduced(side), 15) is None


def test_stages_by_hand() -> None:
    # three nodes of 3, 1 and 2 s in a row, moving a value takes 0.5 s: 3 + 0.5 | 0.5 + 1 + 2 is 3.5 against 3 + 1 + 0.5 | 0.5 + 2
    problem = suites.posed(np.array([[3.0], [1.0], [2.0]]), {0: [1], 1: [2]}, np.full(3, 0.5), np.zeros(3), (2,), 1.0)
    placement = POLICIES["order_dp"](problem)
    assert placement.mesh.tolist() == [0, 1, 1] and evaluate(problem, placement).occupied == (3.5, 3.5)


def test_a_full_mesh_forces_another_cut() -> None:
    problem = suites.posed(np.array([[3.0], [1.0], [2.0]]), {0: [1], 1: [2]}, np.full(3, 0.5), np.array([1.0, 1.0, 1.0]), (2,), 2.0)
    tight = dataclasses.replace(problem, resident=np.array([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]))
    assert POLICIES["order_dp"](tight).mesh.tolist() == [0, 0, 1]  # the last fills a mesh by itself
    with pytest.raises(InfeasibleError, match="no ordered stages fit"):
        POLICIES["order_dp"](dataclasses.replace(problem, resident=np.full((3, 2), 3.0)))


@here
@pytest.mark.parametrize(("name", "best"), [
    ("LayerGraphs/bert24_inference", 17.7899), ("LayerGraphs/bert24_training", 41.7458), ("LayerGraphs/gnmt_inference", 32.9107), ("LayerGraphs/resnet50_inference", 33.7747),
    ("OperatorGraphs/bert_l-3_inference", 27.9186), ("OperatorGraphs/bert_l-3_training", 65.3031), ("OperatorGraphs/resnet50_inference", 124.349),
])  # fmt: skip
def test_published_optima_of_ordered_stages(name: str, best: float) -> None:
    problem = dataclasses.replace(instances.read(FACTS / "throughput" / f"{name}.json"), contiguous=True)
    placement = verify(problem, POLICIES["ideal_dp"](problem))
    assert max(evaluate(problem, placement).occupied) == pytest.approx(best, rel=1e-5)


@here
@pytest.mark.parametrize(("name", "best"), [("LayerGraphs/bert24_inference", 100.219), ("LayerGraphs/gnmt_inference", 225.648), ("OperatorGraphs/bert_l-3_inference", 414.43)])
def test_published_latencies(name: str, best: float) -> None:
    problem = dataclasses.replace(instances.read(FACTS / "latency" / f"{name}.json"), objective="e2e")
    assert evaluate(problem, verify(problem, POLICIES["order_dp"](problem))).e2e <= best * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_compromises_are_those_of_all_stages(seed: int) -> None:
    """Against every way to cut a chain of six into stages on three meshes."""
    problem = suites.chain(6, seed, (2, 1))
    chain = reduced(problem)
    members = prefixes(chain)

    def worth(stages: tuple[tuple[int, tuple[int, ...]], ...]) -> tuple[float, float]:
        took = _took(chain, stages)
        return max(took), sum(took)

    every = set()
    for cuts in itertools.chain(*(itertools.combinations(range(1, 6), n) for n in range(3))):
        ends = [0, *cuts, 6]
        for kinds in itertools.product((0, 1), repeat=len(ends) - 1):
            if kinds.count(0) <= 2 and kinds.count(1) <= 1:
                stages = tuple((k, tuple(range(a, b))) for k, a, b in zip(kinds, ends, ends[1:], strict=False))
                if all(chain.size[list(groups), k].sum() <= chain.capacity[k] for k, groups in stages):
                    every.add(worth(stages))
    best = {p for p in every if not any(q[0] <= p[0] * (1 + 1e-12) and q[1] <= p[1] * (1 + 1e-12) and q != p for q in every)}
    found = [worth(stages) for stages in compromises(chain, members, points=100)]
    assert [pytest.approx(p) for p in sorted(best, key=lambda p: p[1])] == found
