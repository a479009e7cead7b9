"""Layers that several machines hold: flows by hand, the covering program, and a published model."""

from pathlib import Path

import numpy as np
import pytest

from partition import instances
from partition.errors import InfeasibleError, InstanceError, PlacementError
from partition.evaluation import evaluate, verify
from partition.flood import flow, placed
from partition.policies import POLICIES
from partition.problem import Problem

FACTS = Path(__file__).parents[2] / "shared" / "facts" / "instances" / "helix"


def model(rates: dict[int, dict[int, float]], layers: int, lane: float) -> str:
    """The parts of a Helix model that are read."""
    names = [*map(str, rates), "source", "sink"]
    lines = [f" end_constraint_{i}: start_{i} + hold_{i}_1 <= {layers}" for i in rates]
    lines += [f" node_throughput_constraint_{i}: " + " ".join(f"- {t} hold_{i}_{h}" for h, t in row.items()) + f"\n + flow_source_{i} <= 0" for i, row in rates.items()]
    lines += [f" edge_flow_constr_{a}_{b}: flow_{a}_{b} - {lane} switch_{a}_{b} <= 0" for a in names for b in names if a != b and a != "sink" and b != "source"]
    return "\n".join(lines)


@pytest.fixture
def two(tmp_path: Path) -> Problem:
    """Two machines that pass 10 tokens/s with two layers or 24 with one, and one that passes 8 with all three."""
    path = tmp_path / "m.lp"
    path.write_text(model({0: {1: 24.0, 2: 10.0}, 1: {1: 24.0, 2: 10.0}, 2: {1: 30.0, 2: 14.0, 3: 8.0}}, 3, 1000.0))
    return instances.read(path)


def test_flow_by_hand(two: Problem) -> None:
    assert len(two) == 3 and two.meshes == ("machine 0", "machine 1", "machine 2")
    assert flow(two, [(0, 2), (2, 3), (0, 0)]) == pytest.approx(10.0)  # the first is the narrow one
    assert flow(two, [(0, 2), (2, 3), (0, 3)]) == pytest.approx(18.0)  # and 8 more by the third alone
    assert flow(two, [(0, 1), (1, 2), (0, 0)]) == 0.0  # nobody holds the last layer
    estimate = evaluate(two, placed(two, [(0, 2), (2, 3), (0, 3)]))
    assert estimate.throughput == pytest.approx(18.0)


def test_cover_finds_the_best_rows(two: Problem) -> None:
    placement = verify(two, POLICIES["cover"](two))
    value = evaluate(two, placement).throughput
    best = 0.0
    rows = [(s, s + h) for h in (1, 2, 3) for s in range(4 - h)] + [(0, 0)]
    for a in rows:
        for b in rows:
            for c in rows:
                if a[1] - a[0] < 3 and b[1] - b[0] < 3:
                    best = max(best, flow(two, [a, b, c]))
    assert value == pytest.approx(best) and placement.bound is not None and -placement.bound[0] >= best * (1 - 1e-6)


def test_narrow_links_move_rows(tmp_path: Path) -> None:
    path = tmp_path / "m.lp"
    path.write_text(model({0: {1: 24.0, 2: 10.0}, 1: {1: 24.0, 2: 10.0}, 2: {1: 30.0, 2: 14.0, 3: 8.0}}, 3, 6.0))
    problem = instances.read(path)
    placement = verify(problem, POLICIES["cover"](problem))
    assert 6.0 <= evaluate(problem, placement).throughput <= 18.0


def test_rows_are_rows_and_not_too_long(two: Problem) -> None:
    with pytest.raises(InfeasibleError, match="no row"):
        verify(two, two.placement(np.array([0, 1, 0])))
    with pytest.raises(InfeasibleError, match="cannot hold 3 layers"):
        verify(two, two.placement(np.zeros(3, int)))
    with pytest.raises(InfeasibleError, match="nobody holds layer 2"):
        placed(two, [(0, 2), (0, 0), (0, 0)])
    with pytest.raises(PlacementError, match="layers with rates"):
        from partition import suites

        POLICIES["cover"](suites.chain(4, 0))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.lp"
    path.write_text("Maximize\n x\nEnd\n")
    with pytest.raises(InstanceError, match="no model of Helix"):
        instances.read(path)


@pytest.mark.skipif(not FACTS.is_dir(), reason="the published instances are not beside the repository")
@pytest.mark.parametrize(("case", "published", "best"), [("llama70b-24", 1289.56, 2045.64), ("llama30b-a100", 1044.53, 1044.53)])
def test_published_cases(case: str, published: float, best: float) -> None:
    problem = instances.read(FACTS / case / "ilp_model.lp")
    placement = verify(problem, POLICIES["cover"](problem))
    value = evaluate(problem, placement).throughput
    assert value >= published * (1 - 1e-5) and value == pytest.approx(best, rel=1e-5)
    assert placement.bound is not None and -placement.bound[0] == pytest.approx(value, rel=1e-4)  # proved
