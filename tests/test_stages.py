"""Cutting: convex stages, few of them, and a plan of what crosses."""

import itertools

import pytest
from conftest import POLICIES, posed, tagged

from partition.dispatch import transfers
from partition.errors import PlacementError
from partition.evaluation import evaluate
from partition.graph import reads, writes
from partition.stages import cut, order

FORMS = [{}, {"layers": "scanned"}, {"loop": "while", "eos": 5}, {"layers": "scanned", "loop": "while", "sample": True}]


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("level", ["block", "op"])
def test_planned_bytes_equal_the_estimates(options: dict[str, object], policy: str, level: str) -> None:
    problem, _ = posed("trn2_efa_4cs3", level=level, **options)
    placement = POLICIES[policy](problem)
    stages = cut(problem.phases.program, placement)  # type: ignore[union-attr]
    planned: dict[tuple[int, int], float] = {}
    for t in transfers(stages):
        planned[t.src, t.dst] = planned.get((t.src, t.dst), 0.0) + t.nbytes * t.times
    assert planned == evaluate(problem, placement).link_bytes


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_op_runs_once_in_an_order_that_works(policy: str) -> None:
    problem, _ = posed("trn2_efa_4cs3")
    stages = cut(problem.phases.program, POLICIES[policy](problem))  # type: ignore[union-attr]
    ops = [op.id for s in stages.all for op, _ in s.items]
    loop = problem.phases.token_loop  # type: ignore[union-attr]
    whole = {o.id for o in problem.phases.program.graph.ops} - {loop.id}  # type: ignore[union-attr]
    inside = {o.id for o in loop.loop.body.ops}  # type: ignore[union-attr]
    assert len(ops) == len(set(ops)) and set(ops) in (whole | {loop.id}, whole | inside)  # type: ignore[union-attr]
    for s in stages.all:
        own = {v for op, span in s.items for v in writes(op, span)}
        made: set[object] = set()
        for op, span in s.items:
            assert made >= own & set(reads(op, span))
            made.update(writes(op, span))


def test_a_loop_on_one_mesh_stays_one_op_and_a_cut_one_has_a_stage_a_wafer() -> None:
    problem, _ = posed("trn2_efa_cs3")
    assert len(cut(problem.phases.program, POLICIES["phase_split"](problem)).all) == 2  # type: ignore[union-attr]
    big, _ = posed("trn2_efa_4cs3", name="llama-3.1-70b", prompt=64, new_tokens=4, seed=None)
    stages = cut(big.phases.program, POLICIES["phase_split"](big))  # type: ignore[union-attr]
    body = [s for s in stages.all if s.region == "body"]
    assert [big.meshes[s.mesh] for s in body] == ["cs3.0", "cs3.1", "cs3.2", "cs3.3"]
    assert all(s.donated for s in body)  # the caches are updated in place


def test_a_scan_of_layers_is_cut_by_ranges() -> None:
    problem, _ = posed("trn2_efa_4cs3", layers="scanned")
    stages = cut(problem.phases.program, POLICIES["alternating"](problem))  # type: ignore[union-attr]
    spans = sorted(span for s in stages.all if s.region == "body" for op, span in s.items if span is not None)
    assert spans == [(0, 1), (1, 2), (2, 3)]


def test_runs_are_as_few_as_can_be_on_two_meshes() -> None:
    """On two meshes, taking all that can run in turn is optimal from one of the two starts."""
    problem, _ = posed("trn2_efa_cs3", level="op")
    units = [((op, span), n % 2) for n, b in enumerate(problem.blocks[:40]) for op, span in b.items]
    runs = order(units)
    assert sorted(u for _, run in runs for u in run) == list(range(len(units)))
    assert all(a[0] != b[0] for a, b in itertools.pairwise(runs))
    maker = {v: u for u, ((op, span), _) in enumerate(units) for v in writes(op, span)}
    needs = [{maker[v] for v in reads(op, span) if v in maker} for (op, span), _ in units]

    def alternate(mesh: int) -> int:
        done: set[int] = set()
        count = 0
        while len(done) < len(units):
            before = len(done)
            while able := {u for u, (_, m) in enumerate(units) if m == mesh and u not in done and needs[u] <= done}:
                done |= able
            count, mesh = count + (len(done) > before), 1 - mesh
        return count

    assert len(runs) == min(alternate(0), alternate(1))


def test_a_placement_of_another_program_is_refused() -> None:
    problem, _ = posed()
    other, _ = tagged(prompt=9)
    with pytest.raises(PlacementError, match="not made for this program"):
        cut(other.program, POLICIES["single"](problem))
