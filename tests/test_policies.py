"""Every policy of the registry keeps the contract; exhaustive is the oracle."""

import dataclasses

import numpy as np
import pytest
from conftest import posed

from partition import pipeline
from partition.bench import compare
from partition.errors import InfeasibleError, NameUnknownError, PlacementError
from partition.evaluation import evaluate, verify
from partition.phases import Phase
from partition.policies import POLICIES
from partition.problem import OBJECTIVES, Problem


def small(cluster: str, objective: str) -> Problem:
    """A problem that the oracle can solve: one layer."""
    import dataclasses as dc

    from conftest import tagged

    from models import llama
    from partition import profiles
    from partition.problem import pose

    cfg = dc.replace(llama.CONFIGS["tiny"], layers=1)
    phases, _ = tagged(cfg)
    return pose(phases, profiles.cluster(cluster), objective=objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_conformance(name: str, objective: str) -> None:
    problem = small("trn2_efa_cs3", objective)
    placement = verify(problem, POLICIES[name](problem))
    again = POLICIES[name](problem)
    assert np.array_equal(placement.mesh, again.mesh) and placement.also == again.also
    best = evaluate(problem, POLICIES["exhaustive"](problem)).score(objective)
    assert evaluate(problem, placement).score(objective) >= best - 1e-12 * abs(best)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"exhaustive"}))
@pytest.mark.parametrize("cluster", ["cs3_only", "trn2_only", "h100_only", "trn2_efa_4cs3"])
def test_every_policy_on_every_cluster_fits_or_says_why(name: str, cluster: str) -> None:
    problem, _ = posed(cluster)
    try:
        verify(problem, POLICIES[name](problem))
    except PlacementError as error:
        assert name in ("phase_split", "min_cut") and len(problem.meshes) == 1 and "single" in error.mend
    else:
        assert not (name in ("phase_split", "min_cut") and len(problem.meshes) == 1)


def test_phase_split_puts_prefill_on_trainium_and_decode_on_wafers_in_order() -> None:
    problem, _ = posed("trn2_efa_4cs3", name="llama-3.1-70b", prompt=2048, new_tokens=16, seed=None)
    placement = verify(problem, POLICIES["phase_split"](problem))
    assert {problem.kinds[placement.mesh[n]] for n in problem.nodes(Phase.PREFILL)} == {"trn2"}
    body = [int(placement.mesh[n]) for n in problem.nodes(Phase.DECODE)]
    assert {problem.kinds[m] for m in body} == {"cs3"} and body == sorted(body) and len(set(body)) == 4
    estimate, capacity = evaluate(problem, placement), problem.capacity
    assert all(used <= cap for used, cap in zip(estimate.memory, capacity, strict=True))


def test_405b_fits_on_twenty_four_wafers() -> None:
    problem, _ = posed("trn2_efa_24cs3", name="llama-3.1-405b", prompt=2048, new_tokens=16, seed=None)
    placement = verify(problem, POLICIES["phase_split"](problem))
    assert {problem.kinds[m] for m in set(placement.mesh.tolist())} == {"trn2", "cs3"} and len(set(placement.mesh.tolist())) >= 20


def test_single_chooses_the_kind_by_the_objective() -> None:
    problem, _ = posed(name="llama-3.1-8b", prompt=2048, new_tokens=16, seed=None)
    cheap = POLICIES["single"](dataclasses.replace(problem, objective="ttft"))
    fast = POLICIES["single"](dataclasses.replace(problem, objective="tpot"))
    assert set(cheap.mesh.tolist()) == {0} and set(fast.mesh.tolist()) == {1}
    with pytest.raises(InfeasibleError, match="no tpu"):
        POLICIES["single"](problem, kind="tpu")  # type: ignore[call-arg]


def test_random_differs_by_seed_and_exhaustive_refuses_large_problems() -> None:
    problem, _ = posed()
    draws = {tuple(pipeline.place(problem, "random", seed=s).mesh.tolist()) for s in range(5)}
    assert len(draws) == 5
    big, _ = posed("trn2_efa_4cs3")
    with pytest.raises(PlacementError, match="too many"):
        POLICIES["exhaustive"](big)


def test_policies_of_ones_own() -> None:
    problem, _ = posed()
    mine = pipeline.place(problem, lambda p: p.placement(p.seconds.argmin(axis=1)))
    assert {int(mine.mesh[n]) for n in problem.nodes(Phase.PREFILL, Phase.DECODE)} == {1}
    assert pipeline.policy("partition.policies.heft:heft") is POLICIES["heft"]
    with pytest.raises(NameUnknownError, match="phase_split"):
        pipeline.policy("phase_spilt")
    with pytest.raises(NameUnknownError, match="cannot be imported"):
        pipeline.policy("no.such.module:f")

    def broken(p: Problem) -> None:
        raise ZeroDivisionError("oh")

    with pytest.raises(PlacementError, match="ZeroDivisionError: oh"):
        pipeline.place(problem, broken)  # type: ignore[arg-type]
    results = compare(problem, ["single", "random", broken])  # type: ignore[list-item]
    assert [r.policy for r in results] == ["single", "random", "broken"] and results[-1].why_not
