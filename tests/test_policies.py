"""Every policy of the registry keeps the contract; exhaustive is the oracle."""

import dataclasses
import sys

import numpy as np
import pytest
from conftest import posed

from partition import pipeline, suites
from partition.bench import compare
from partition.bounds import lower_bound
from partition.errors import InfeasibleError, NameUnknownError, PlacementError
from partition.evaluation import evaluate, verify
from partition.phases import Phase
from partition.policies import POLICIES
from partition.problem import OBJECTIVES, Problem, pose


def small(cluster: str, objective: str) -> Problem:
    """A problem that the oracle can solve: one layer."""
    import dataclasses as dc

    from conftest import tagged

    from models import llama
    from partition import profiles

    cfg = dc.replace(llama.CONFIGS["tiny"], layers=1)
    phases, _ = tagged(cfg)
    return pose(phases, profiles.cluster(cluster), objective=objective)


OF_THEIR_OWN = {"cover", "cpsat", "kind_cut", "milp"}
"""Policies of other problems than programs on meshes; their own tests hold them to their oracle."""


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_conformance(name: str, objective: str) -> None:
    problem = small("trn2_efa_cs3", objective)
    if name in OF_THEIR_OWN:
        with pytest.raises(PlacementError, match="is for") as caught:
            POLICIES[name](problem)
        assert "use the policy" in caught.value.mend
        return
    placement = verify(problem, POLICIES[name](problem))
    again = POLICIES[name](problem)
    assert np.array_equal(placement.mesh, again.mesh) and placement.also == again.also
    best = evaluate(problem, POLICIES["exhaustive"](problem)).score(objective)
    assert lower_bound(problem).score <= best + 1e-9 * abs(best)
    assert evaluate(problem, placement).score(objective) >= best - 1e-12 * abs(best)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"exhaustive"} - OF_THEIR_OWN))
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


HOSTED = sorted(set(POLICIES) - {"cover", "exhaustive"})


@pytest.mark.parametrize("name", HOSTED)
@pytest.mark.parametrize("maker", ["chain", "layered"])
def test_conformance_through_a_host(name: str, maker: str) -> None:
    """No policy beats the oracle, and the bounds hold, where values pass through a host; nodes that must share a mesh do."""
    problem = getattr(suites, maker)(8, 5, (2, 1))
    problem = dataclasses.replace(problem, together=((1, 4),))
    best = evaluate(problem, POLICIES["exhaustive"](problem)).score("throughput")
    assert lower_bound(problem).score <= best * (1 - 1e-9)
    try:
        placement = verify(problem, POLICIES[name](problem))
    except InfeasibleError:
        assert name in ("equal_split", "min_cut", "phase_split", "single", "m_topo", "pipedream")  # these look at no memory
        return
    score = evaluate(problem, placement).score("throughput")
    assert score >= best * (1 + 1e-9) and placement.mesh[1] == placement.mesh[4]
    if name in ("local_search", "portfolio"):
        assert score == pytest.approx(best)


def test_a_limit_is_kept_or_said() -> None:
    problem, _ = posed("trn2_efa_4cs3", "usd_per_mtok")
    free = evaluate(problem, POLICIES["portfolio"](problem))
    fast = evaluate(problem, POLICIES["portfolio"](dataclasses.replace(problem, objective="tpot")))
    held = dataclasses.replace(problem, limits={"tpot": (fast.tpot + free.tpot) / 2 if free.tpot > fast.tpot else free.tpot})
    found = evaluate(held, pipeline.place(held, "portfolio"))
    assert found.tpot <= held.limits["tpot"] * (1 + 1e-9) and found.usd_per_mtok >= free.usd_per_mtok * (1 - 1e-9)
    with pytest.raises(InfeasibleError, match=r"tpot is .* its limit"):
        pipeline.place(dataclasses.replace(problem, limits={"tpot": fast.tpot / 2}), "portfolio")


def test_a_policy_that_never_ends_is_stopped_with_its_best() -> None:
    problem, _ = posed()

    def endless(problem: Problem) -> object:
        evaluate(problem, problem.placement(np.zeros(len(problem), int)))
        while True:
            pass

    placement = pipeline.place(problem, endless, seconds=0.3)  # type: ignore[arg-type]
    assert (placement.mesh == 0).all()

    def idle(problem: Problem) -> object:
        while True:
            pass

    with pytest.raises(PlacementError, match=r"longer than 0\.2 s"):
        pipeline.place(problem, idle, seconds=0.2)  # type: ignore[arg-type]


@pytest.mark.parametrize(("change", "says"), [
    (lambda p: {"seconds": np.where(np.arange(len(p))[:, None] == 1, -1.0, p.seconds)}, r"seconds\[1, 0\] is -1.0"),
    (lambda p: {"seconds": np.where(np.arange(len(p))[:, None] == 1, np.nan, p.seconds)}, r"seconds\[1, 0\] is nan"),
    (lambda p: {"seconds": p.seconds[:2]}, "has the shape"),
    (lambda p: {"flows": (*p.flows, dataclasses.replace(p.flows[0], src=3, dst=(1,)))}, "wait for each other|stands before"),
    (lambda p: {"flows": (dataclasses.replace(p.flows[0], nbytes=-1.0), *p.flows[1:])}, "moves -1.0 B"),
    (lambda p: {"pins": {0: 9}}, "pinned to mesh 9"),
    (lambda p: {"together": ((0, 1),), "pins": {0: 0, 1: 1}}, "they must share a mesh"),
    (lambda p: {"pins": {0: 0, 1: 0, 2: 0, 4: 1}, "capacity": p.resident.max(axis=1)[:3].sum() - 1e-6 + 0 * p.capacity}, "pins contradict each other: node 0 to kind0.0, node 1 to kind0.0, node 2 to kind0.0; they need"),
    (lambda p: {"pins": {0: 0, 1: 0, 2: 0}, "residents": (), "resident": np.zeros((0, 4)), "activation": np.array([0.3, 0.9, 1.1, 0, 0, 0])[:, None] + np.zeros((1, 4)), "capacity": np.ones(4)},
     "pins contradict each other: node 2 to kind0.0; they need"),
    (lambda p: {"pins": {0: 0, 2: 1, 5: 0}, "contiguous": True}, "node 0 to kind0.0, node 2 to kind0.1, node 5 to kind0.0; meshes would stand before each other"),
    (lambda p: {"pins": {0: 0, 1: 1, 4: 0}, "ports": None, "beta": np.diag([np.inf] * len(p.meshes))}, "node 0 to kind0.0, node 1 to kind0.1; no link joins"),
    (lambda p: {"seconds": np.full_like(p.seconds, np.inf)}, "no mesh can run"),
    (lambda p: {"capacity": p.capacity * 1e-6}, "and no mesh lacks less"),
])  # fmt: skip
def test_what_no_policy_could_place(change, says: str) -> None:  # type: ignore[no-untyped-def]
    problem = suites.chain(6, 0)
    with pytest.raises((PlacementError, InfeasibleError), match=says):
        pipeline.place(dataclasses.replace(problem, **change(problem)), "order_dp")


SUITE_V1 = {"chain-12-3": "0748ba05635f", "chain-100-4": "37cfd5a32b77", "chain-1000-4+4": "211db88ef0e2", "series_parallel-12-3": "30ffe8654a61", "series_parallel-60-4": "db0e862d5929", "series_parallel-200-2+2": "bfd3594550b6", "layered-12-3": "38e28355e4a9", "layered-60-4": "dbc6091976f5", "layered-200-2+2": "53eb498ff8b2", "transformer-2-3": "9b23beb92266", "transformer-12-4": "9f5ec93698e0", "transformer-80-4+4": "01ec6d7a3bdd"}


def test_the_suite_that_papers_cite_stays_as_it_is() -> None:
    assert {name: suites.digest(p) for name, p in suites.suite("v1").items()} == SUITE_V1
    with pytest.raises(NameUnknownError):
        suites.suite("v0")


@pytest.mark.parametrize("name", ["ideal_dp", "milp", "order_dp", "pipedream", "portfolio"])
def test_a_node_that_a_kind_cannot_run_goes_elsewhere(name: str) -> None:
    problem = suites.chain(6, 3, (2, 1))
    seconds = problem.seconds.copy()
    seconds[2, :2] = np.inf
    problem = dataclasses.replace(problem, seconds=seconds, contiguous=True)
    best = evaluate(problem, POLICIES["exhaustive"](problem)).throughput
    assert evaluate(problem, pipeline.place(problem, name)).throughput >= best * (1 - 1e-9) or name == "pipedream"


def test_a_limit_and_a_time_limit_go_together() -> None:
    problem, _ = posed()
    held = dataclasses.replace(problem, limits={"e2e": 1e6})
    assert evaluate(held, pipeline.place(held, "single", seconds=5)).e2e < 1e6
    with pytest.raises(PlacementError, match="cannot be held to nan"):
        pipeline.place(dataclasses.replace(problem, limits={"e2e": float("nan")}), "single")
    with pytest.raises(PlacementError, match="cannot run for nan"):
        pipeline.place(problem, "single", seconds=float("nan"))


def test_shared_residents_never_make_milp_infeasible() -> None:
    problem = suites.chain(6, 5, (3,))
    shared = dataclasses.replace(problem.residents[0], blocks=(0, 2, 4), nbytes=1.0)
    problem = dataclasses.replace(problem, residents=(*problem.residents, shared), resident=np.vstack([problem.resident, np.ones((1, 3))]), contiguous=True, capacity=problem.capacity + 0.7)
    assert verify(problem, POLICIES["milp"](problem)) and verify(problem, POLICIES["ideal_dp"](problem))


def loop_of(flows: list[tuple[int, int, float, str]], seconds: list[float], region: list[str], trips: int) -> Problem:
    """A small problem over a slow link of 1 B/s, of nodes in a loop or not."""
    base, n = suites.chain(len(seconds), 0, (2,)), len(seconds)
    link = np.ones((2, 2)) + np.diag([np.inf, np.inf])
    made = tuple(dataclasses.replace(base.flows[0], value=(i, None), src=s, dst=(d,), nbytes=b, kind=kind, times=1 if kind == "handoff" else trips) for i, (s, d, b, kind) in enumerate(flows))
    return dataclasses.replace(base, seconds=np.repeat(np.array(seconds)[:, None], 2, axis=1), region=tuple(region), phase=tuple(Phase.PREFILL if r == "top" else Phase.DECODE for r in region),
                               times=np.array([1 if r == "top" else trips for r in region]), flows=made, ports=None, beta=link, wire=link, residents=(), resident=np.zeros((0, 2)),
                               workload=dataclasses.replace(base.workload, trips=trips), capacity=np.full(2, np.inf), activation=np.zeros((n, 2)))  # fmt: skip


def test_a_late_hand_off_hides_no_work() -> None:
    # D1 and D2 take 3 s each on one mesh in every trip, whatever D3, which waits for 100 B at 1 B/s, does elsewhere
    problem = loop_of([(0, 1, 0.0, "handoff"), (1, 2, 0.0, "forward"), (2, 1, 0.0, "carry"), (0, 3, 100.0, "handoff")], [1.0, 3.0, 3.0, 1.0], ["top", "body", "body", "body"], 100)
    for mesh in ([0, 0, 0, 1], [0, 0, 0, 0]):
        e = evaluate(problem, problem.placement(mesh))
        assert e.tpot >= 6.0 and e.e2e >= max(e.busy) * (1 - 1e-9)
        assert e.e2e >= lower_bound(dataclasses.replace(problem, objective="e2e")).score * (1 - 1e-9)


def test_a_loop_does_not_wait_for_what_does_not_feed_it() -> None:
    problem = loop_of([(0, 2, 0.0, "handoff"), (2, 3, 0.0, "forward"), (3, 2, 0.0, "carry")], [1.0, 10.0, 1.0, 1.0], ["top", "top", "body", "body"], 10)
    problem = dataclasses.replace(problem, objective="e2e")
    assert lower_bound(problem).score <= evaluate(problem, POLICIES["exhaustive"](problem)).e2e * (1 + 1e-9)


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"cover", "cpsat", "exhaustive", "ideal_dp", "kind_cut", "milp"}))
@pytest.mark.parametrize("keep", [("layers",), ("phases",), ("weights",), ("layers", "order"), ("phases", "weights")])
def test_what_is_kept_whole(name: str, keep: tuple[str, ...]) -> None:
    made, _ = posed("trn2_efa_4cs3")
    assert made.phases is not None and made.cluster is not None
    problem = pose(made.phases, made.cluster, keep=keep, objective="e2e")
    if name == "phase_split" and "weights" in keep:
        with pytest.raises(InfeasibleError, match="must share a mesh"):
            pipeline.place(problem, name)
        return
    try:
        mesh = pipeline.place(problem, name).mesh
    except InfeasibleError as error:
        assert "order" in keep and name in ("heft", "random", "m_etf", "m_sct", "m_topo", "gradient", "min_cut"), error  # these know no order
        return
    wholes: dict[object, set[int]] = {}
    for n, phase in enumerate(problem.phase):
        for kind, key in (("layers", (phase, problem.layer[n]) if problem.layer[n] >= 0 else None), ("phases", phase if phase in (Phase.PREFILL, Phase.DECODE) else None)):
            if kind in keep and key is not None:
                wholes.setdefault((kind, key), set()).add(int(mesh[n]))
    for r in problem.residents:
        if "weights" in keep and r.kind == "weights":
            wholes[r.value] = {int(mesh[n]) for n in r.blocks if problem.phase[n] is not Phase.BOTH}
    assert wholes and all(len(meshes) <= 1 for meshes in wholes.values())


def test_no_more_crossings_than_are_allowed() -> None:
    made, _ = posed("h100_disagg", objective="throughput")
    found = []
    for most in (0, 2, 6, 100):
        problem = dataclasses.replace(made, limits={"crossings": most})
        estimate = evaluate(problem, pipeline.place(problem, "portfolio"))
        assert estimate.crossings <= most
        found.append(estimate.throughput)
    assert found == sorted(found) and found[0] < found[-1]


@pytest.mark.parametrize(("maker", "n", "counts"), [("chain", 12, (3,)), ("layered", 30, (2, 1)), ("series_parallel", 40, (4,)), ("transformer", 4, (3,))])
def test_cpsat_proves_what_ideal_dp_does(maker: str, n: int, counts: tuple[int, ...]) -> None:
    pytest.importorskip("ortools", reason="ortools is an extra")
    problem = dataclasses.replace(getattr(suites, maker)(n, 7, counts), contiguous=True)
    exact, found = POLICIES["ideal_dp"](problem), pipeline.place(problem, "cpsat", limit=60)
    best = evaluate(problem, exact).throughput
    assert evaluate(problem, found).throughput == pytest.approx(best, rel=1e-6)
    assert found.bound is not None and best <= -found.bound[0] <= best * (1 + 1e-5)


def test_cpsat_without_ortools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    with pytest.raises(PlacementError, match="needs ortools") as caught:
        POLICIES["cpsat"](suites.chain(6, 0))
    assert "partition-planner[cpsat]" in caught.value.mend


@pytest.mark.parametrize("name", ["ideal_dp", "order_dp", "cpsat", "milp", "portfolio"])
def test_pins_and_an_order_go_together(name: str) -> None:
    if name == "cpsat":
        pytest.importorskip("ortools", reason="ortools is an extra")
    for seed in range(6):
        problem = suites.chain(4, seed, (1, 1))
        problem = dataclasses.replace(problem, pins={3: 0}, contiguous=True, capacity=problem.capacity * 0.75)
        best = evaluate(problem, POLICIES["exhaustive"](problem)).throughput
        assert evaluate(problem, pipeline.place(problem, name)).throughput == pytest.approx(best, rel=1e-6)


def test_cpsat_needs_no_start() -> None:
    pytest.importorskip("ortools", reason="ortools is an extra")
    problem = suites.layered(5, 0, (3,))
    problem = dataclasses.replace(problem, capacity=problem.capacity * 0.7, contiguous=True)
    assert evaluate(problem, pipeline.place(problem, "cpsat")).throughput == pytest.approx(evaluate(problem, pipeline.place(problem, "ideal_dp")).throughput)


def test_bounds_where_nothing_can_run_or_nothing_runs() -> None:
    problem = dataclasses.replace(suites.chain(3, 1, (1, 1)), seconds=np.array([[1, np.inf], [np.inf, 1], [1, 1.0]]), together=((0, 1),))
    assert lower_bound(problem).score == 0.0
    idle = dataclasses.replace(suites.chain(3, 1, (1, 1)), times=np.array([0, 0, 1]), objective="e2e")
    assert lower_bound(idle).score <= evaluate(idle, POLICIES["exhaustive"](idle)).e2e
    never = dataclasses.replace(suites.chain(3, 1, (1, 1)), seconds=np.array([[1, np.inf], [1, 1], [1, 1.0]]), times=np.array([0, 1, 1]), contiguous=True)
    assert pipeline.place(never, "order_dp").mesh.tolist() == pipeline.place(never, "exhaustive").mesh.tolist()


def test_the_list_of_policies_is_that_of_the_registry() -> None:
    from partition.catalogue import own_policies

    assert {r["name"]: r["about"] for r in own_policies()} == {name: (p.__doc__ or "").strip().splitlines()[0] for name, p in POLICIES.items()}
