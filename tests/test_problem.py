"""The problem as numbers, its one evaluation, and what a placement is held to."""

import dataclasses

import numpy as np
import pytest
from conftest import POLICIES, alternating, posed, tagged
from hypothesis import given, settings
from hypothesis import strategies as st

from partition import profiles
from partition.bounds import lower_bound
from partition.errors import InfeasibleError, NameUnknownError, PlacementError
from partition.evaluation import crossings, evaluate, verify
from partition.phases import Phase
from partition.problem import OBJECTIVES, Placement, pose
from partition.timeline import schedule

PROBLEM, _ = posed("trn2_efa_4cs3")
MESHES = st.lists(st.integers(0, len(PROBLEM.meshes) - 1), min_size=len(PROBLEM), max_size=len(PROBLEM))


@settings(max_examples=60, deadline=None)
@given(MESHES)
def test_no_placement_beats_the_bound_and_the_timeline_agrees(meshes: list[int]) -> None:
    placement = verify(PROBLEM, PROBLEM.placement(meshes))
    timeline = schedule(PROBLEM, placement)
    estimate = evaluate(PROBLEM, placement)
    assert timeline.makespan == estimate.e2e
    for objective in OBJECTIVES:
        problem = dataclasses.replace(PROBLEM, objective=objective)
        assert estimate.score(objective) >= lower_bound(problem).score * (1 - 1e-9 * np.sign(lower_bound(problem).score)), objective
    assert estimate.e2e >= max(estimate.busy) * (1 - 1e-9)
    assert estimate.ttft <= estimate.e2e


@settings(max_examples=40, deadline=None)
@given(MESHES)
def test_slots_never_overlap_on_a_mesh_or_a_link(meshes: list[int]) -> None:
    tracks: dict[tuple[int, int | None], list[tuple[float, float]]] = {}
    for s in schedule(PROBLEM, PROBLEM.placement(meshes)).slots:
        pause = float(PROBLEM.alpha[s.mesh, s.to]) if s.to is not None else 0.0  # alpha is a delay, the link is free again
        tracks.setdefault((s.mesh, s.to), []).append((s.start, s.end - pause))
    for slots in tracks.values():
        for (_, end), (start, _) in zip(sorted(slots), sorted(slots)[1:], strict=False):
            assert start >= end - 1e-12


@settings(max_examples=20, deadline=None)
@given(MESHES, st.permutations(range(len(PROBLEM.meshes))))
def test_renaming_meshes_changes_nothing(meshes: list[int], order: list[int]) -> None:
    o = np.array(order)
    renamed = dataclasses.replace(
        PROBLEM, meshes=tuple(PROBLEM.meshes[i] for i in o), kinds=tuple(PROBLEM.kinds[i] for i in o), seconds=PROBLEM.seconds[:, o],
        resident=PROBLEM.resident[:, o], activation=PROBLEM.activation[:, o], capacity=PROBLEM.capacity[o], price=PROBLEM.price[o], power=PROBLEM.power[o], depth=PROBLEM.depth[o],
        alpha=PROBLEM.alpha[np.ix_(o, o)], beta=PROBLEM.beta[np.ix_(o, o)], wire=PROBLEM.wire[np.ix_(o, o)], link_price=PROBLEM.link_price[np.ix_(o, o)],
    )  # fmt: skip
    a = evaluate(PROBLEM, PROBLEM.placement(meshes))
    b = evaluate(renamed, renamed.placement([order.index(m) for m in meshes]))
    assert [a.score(x) for x in OBJECTIVES] == pytest.approx([b.score(x) for x in OBJECTIVES])


def test_more_bandwidth_never_hurts_a_placement() -> None:
    placement = POLICIES["phase_split"](PROBLEM)
    times = []
    for factor in (0.001, 0.1, 1, 10):
        faster = dataclasses.replace(PROBLEM, beta=PROBLEM.beta * factor, wire=PROBLEM.wire * factor)
        times.append(evaluate(faster, placement).e2e)
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_handoff_streams_while_prefill_goes_on() -> None:
    problem, _ = posed(name="llama-3.1-8b", prompt=2048, new_tokens=8, seed=None)
    placement = POLICIES["phase_split"](problem)
    e = evaluate(problem, placement)
    ((pair, took),) = [(k, v) for k, v in e.link_busy.items() if k == (0, 1)]
    assert took > 0.001 and e.exposed < took / 10, pair
    cache = 2 * 32 * (2048 + 8) * 8 * 128 * 2  # k and v, layers, positions, KV heads, head size, bfloat16
    assert e.link_bytes[0, 1] == pytest.approx(cache, rel=1e-6)


def test_weights_are_counted_once_a_mesh_and_once_for_each_phase_that_is_apart() -> None:
    problem, _ = posed(name="llama-3.1-8b", prompt=128, new_tokens=8, seed=None)
    both = evaluate(problem, problem.placement([1] * len(problem))).memory
    split = evaluate(problem, POLICIES["phase_split"](problem)).memory
    weights = 8.03e9 * 2
    assert weights < both[1] < weights * 1.05
    assert weights * 0.9 < split[1] < weights * 1.05  # decode reads every weight
    assert split[0] > weights * 0.9  # and so does prefill, norms and small ones on every chip


def test_capacity_is_a_hard_limit() -> None:
    problem, _ = posed(name="llama-3.1-70b", prompt=128, new_tokens=8, seed=None)
    with pytest.raises(InfeasibleError, match="more than its capacity") as error:
        verify(problem, problem.placement([1] * len(problem)))
    assert "cs3" in error.value.where and error.value.exit_code == 3
    with pytest.raises(InfeasibleError, match="too much"):
        POLICIES["phase_split"](problem)


@pytest.mark.parametrize(("made", "says"), [
    (lambda p: Placement(mesh=np.zeros(len(p) - 1, int), problem=p), "entries"),
    (lambda p: Placement(mesh=np.full(len(p), 99), problem=p), "does not have"),
    (lambda p: Placement(mesh=np.full(len(p), -1), problem=p), "does not have"),
    (lambda p: Placement(mesh=np.zeros(len(p), int), also={len(p) + 3: (0,)}, problem=p), "does not have"),
    (lambda p: [0] * len(p), "not a Placement"),
])  # fmt: skip
def test_missing_and_foreign_nodes_are_refused(made, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlacementError, match=says):
        verify(PROBLEM, made(PROBLEM))
    with pytest.raises(PlacementError, match="entries"):
        PROBLEM.placement([0])


def test_pins_hold_for_every_policy() -> None:
    phases, _ = tagged()
    problem = pose(phases, profiles.cluster("trn2_efa_cs3"), pins={"decode/head": "trn2"})
    n = problem.names.index("decode/head")
    for name, policy in POLICIES.items():
        assert policy(problem).mesh[n] == 0, name
    with pytest.raises(NameUnknownError, match="head2"):
        pose(phases, profiles.cluster("trn2_efa_cs3"), pins={"head2": "trn2"})
    with pytest.raises(NameUnknownError, match="tpot"):
        pose(phases, profiles.cluster("trn2_efa_cs3"), objective="tpott")


def test_dag_is_acyclic_and_every_value_crosses_once_a_mesh() -> None:
    import networkx as nx

    assert nx.is_directed_acyclic_graph(PROBLEM.dag)
    placement = alternating(PROBLEM)
    keys = [(PROBLEM.flows[i].value, PROBLEM.flows[i].src, b) for i, _, b in crossings(PROBLEM, placement)]
    assert len(keys) == len(set(keys)) > 0
    assert set(PROBLEM.phase) >= {Phase.PREFILL, Phase.DECODE}


def test_a_wafer_works_on_as_many_batches_as_it_has_layers_and_memory_for() -> None:
    problem, _ = posed("cs3_only")
    layers = 3  # of the tiny model, over 4 wafers: no wafer is full, and the cluster counts on one layer each
    assert sorted(set(problem.layer) - {-1}) == list(range(layers))
    deep = dataclasses.replace(problem, depth=np.full(len(problem.meshes), 3.0))
    here = deep.placement(np.zeros(len(problem), int))
    alone, e = evaluate(dataclasses.replace(problem, depth=np.ones(len(problem.meshes))), here), evaluate(deep, here)
    assert (e.ttft, e.tpot, e.e2e, e.busy) == (alone.ttft, alone.tpot, alone.e2e, alone.busy)
    parts = {}
    for n, layer in enumerate(problem.layer):
        key = int(layer) if layer >= 0 else f"node {n}"
        parts[key] = parts.get(key, 0.0) + problem.seconds[n, 0] * problem.times[n]
    assert e.occupied[0] == pytest.approx(max(e.busy[0] / 3, *parts.values()))
    assert e.throughput == pytest.approx(alone.throughput * e.busy[0] / e.occupied[0]) and e.throughput > 1.5 * alone.throughput
    assert e.usd_per_mtok < alone.usd_per_mtok and e.usd_reserved == alone.usd_reserved and e.joules_per_token < alone.joules_per_token
    weights, batch = (float(part[0]) for part in deep.held(here))
    tight = dataclasses.replace(deep, capacity=np.full(len(problem.meshes), weights + 1.5 * batch))
    assert evaluate(tight, here).occupied[0] == e.busy[0]  # room for one batch beside the weights
    assert evaluate(dataclasses.replace(deep, capacity=np.full(len(problem.meshes), weights + 2.5 * batch)), here).occupied[0] == pytest.approx(max(e.busy[0] / 2, *parts.values()))


def test_chips_without_regions_work_on_one_batch_at_a_time() -> None:
    problem, _ = posed("trn2_efa_cs3")
    assert dict(zip(problem.kinds, problem.depth, strict=True)) == {"trn2": 1, "cs3": 3}  # a wafer has the three layers side by side
