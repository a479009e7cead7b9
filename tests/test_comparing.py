"""Bench, ranks, fronts, sweeps, and the verbs that show them."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import posed

from partition import bench, suites
from partition.errors import InfeasibleError, NameUnknownError, PlacementError
from partition.evaluation import evaluate
from partition.fronts import front
from partition.phases import Phase
from partition.pipeline import place
from partition.problem import Placement, Problem, on
from partition.ranks import rank
from partition.sweeps import sweep, wins


def run(*args: str) -> Any:
    return subprocess.run([sys.executable, "-m", "partition", *args], capture_output=True, text=True, timeout=280)


def test_profile_by_hand() -> None:
    results = [bench.Result(problem=p, policy=who, seconds=0.0, estimate=None, score=s) for p, who, s in (("a", "x", 1.0), ("a", "y", 1.1), ("b", "x", -2.0), ("b", "y", -1.0))]
    assert bench.profile(results, (1.0, 1.2, 2.0)) == {"x": (1.0, 1.0, 1.0), "y": (0.0, 0.5, 1.0)}  # a rate of 1 is half of 2


def test_a_policys_proof_counts_for_all() -> None:
    problem = dataclasses.replace(suites.layered(16, 3, (3,)), contiguous=True)
    results = {r.policy: r for r in bench.compare({"p": problem}, ["ideal_dp", "order_dp", "random"])}
    assert results["ideal_dp"].gap == pytest.approx(0.0, abs=1e-9) and "ideals" in results["ideal_dp"].proof and results["order_dp"].proof == results["ideal_dp"].proof
    assert results["random"].estimate is None or (results["random"].gap or 0) >= 0


def test_ranks_are_those_of_draws_priced_in_full() -> None:
    problem, _ = posed("trn2_efa_cs3", "e2e")
    found = rank(problem, {n: place(problem, n) for n in ("single", "phase_split", "random")}, draws=200)
    assert found.pairs[0].first != "random" and all(0 <= p.share <= 1 for p in found.pairs) and found.agree > 0.8 and "of 200 draws" in str(found)
    assert found == rank(problem, {n: place(problem, n) for n in ("single", "phase_split", "random")}, draws=200)
    with pytest.raises(PlacementError, match="two placements"):
        rank(problem, {"single": place(problem, "single")})


def test_a_number_that_reverses_two_does_so_there() -> None:
    problem, _ = posed("trn2_efa_cs3", "usd_per_mtok")
    both = {n: place(problem, n) for n in ("single", "phase_split")}
    for turn in (r for r in rank(problem, both, draws=10).pairs if r.number is not None):
        assert problem.cluster is not None and turn.at is not None
        for factor, sign in ((1.03, 1), (0.97, -1)):
            there = on(problem, problem.cluster.replace({turn.number: turn.at * factor}))
            ahead = evaluate(there, dataclasses.replace(both[turn.second], problem=there)).usd_per_mtok - evaluate(there, dataclasses.replace(both[turn.first], problem=there)).usd_per_mtok
            assert (ahead > 0) == ((sign > 0) == turn.below) or abs(ahead) < 1e-2 * evaluate(there, both[turn.first]).usd_per_mtok


def test_no_point_of_a_front_beats_another() -> None:
    problem, _ = posed("trn2_efa_4cs3")
    points = front(problem, ("usd_per_mtok", "ttft"), points=2)
    assert points and all(a.estimate.usd_per_mtok < b.estimate.usd_per_mtok and a.estimate.ttft > b.estimate.ttft for a, b in itertools.pairwise(points))
    for wrong in (("ttft",), ("ttft", "ttft"), ("ttft", "tpot", "e2e", "throughput")):
        with pytest.raises(PlacementError, match="two or three"):
            front(problem, wrong)
    with pytest.raises(NameUnknownError):
        front(problem, ("ttft", "beauty"))
    with pytest.raises(InfeasibleError, match="limits on ttft"):
        front(dataclasses.replace(problem, limits={"ttft": 1e-9}), ("usd_per_mtok", "tpot"))


def test_a_sweep_has_a_row_for_each_cell_and_its_rows_are_plans() -> None:
    pytest.importorskip("pandas")
    over = {"prompt": [8, 16], "cs3.price": ["10 $/h", "900 $/h"]}
    frame = sweep("tiny", over, cluster="trn2_efa_cs3", objective="usd_per_mtok", how="order_dp", new_tokens=4)
    assert list(frame["prompt"]) == [8, 8, 16, 16] and list(frame["cs3.price"]) == over["cs3.price"] * 2 and (frame["why_not"] == "").all()
    assert frame["usd_per_mtok"].iloc[0] <= frame["usd_per_mtok"].iloc[1] and all(frame["wins"])
    again = sweep("tiny", over, cluster="trn2_efa_cs3", objective="usd_per_mtok", how="order_dp", new_tokens=4, jobs=2)
    assert frame.equals(again)  # whoever runs the cells
    with pytest.raises(PlacementError, match="no cells"):
        sweep("tiny", {}, cluster="trn2_efa_cs3")
    with pytest.raises(NameUnknownError):
        sweep("tiny", {"cs3.beauty": [1]}, cluster="trn2_efa_cs3")


def test_the_picture_of_a_sweep(tmp_path: Path) -> None:
    pd, _ = pytest.importorskip("pandas"), pytest.importorskip("matplotlib")
    from partition.sweeps import picture

    frame = pd.DataFrame([{"a": a, "b": b, "wins": "x" if a < b else ""} for a in (1, 2) for b in (1.5, 3.0)])
    assert picture(frame, "a", "b", tmp_path / "m.png").stat().st_size > 1000
    with pytest.raises(NameUnknownError):
        picture(frame, "a", "c", tmp_path / "m.png")
    with pytest.raises(NameUnknownError, match="no input called 'wins'"):
        picture(frame, "a", "wins", tmp_path / "m.png")
    with pytest.raises(PlacementError, match="no cells to draw"):
        picture(frame.head(0), "a", "b", tmp_path / "m.png")
    with pytest.raises(PlacementError, match="batch cannot be '2'"):
        sweep("tiny", {"prompt": [8]}, cluster="trn2_efa_cs3", batch="2")  # type: ignore[arg-type]
    with pytest.raises(PlacementError, match="a map has two inputs"):
        picture(frame, "a", "a", tmp_path / "m.png")


def test_wins_names_machines_by_phase() -> None:
    problem, _ = posed()
    split = problem.placement([0 if phase is Phase.PREFILL else 1 for phase in problem.phase])
    assert wins(problem, split) == "prefill trn2, decode cs3" and wins(problem, problem.placement(np.zeros(len(problem), int))) == "all on trn2"


def test_policies_compared_in_several_processes_are_as_in_one() -> None:
    problems = {"chain": suites.chain(12, 3), "tiny": posed("trn2_efa_4cs3")[0]}

    def first(problem: Problem) -> Placement:  # from a notebook: nothing that could be imported
        return problem.placement(np.zeros(len(problem), int))

    def told(results: list[bench.Result]) -> list[tuple[object, ...]]:
        return [(r.problem, r.policy, r.score, r.gap, r.why_not) for r in results]

    assert told(bench.compare(problems, ["heft", "milp", first])) == told(bench.compare(problems, ["heft", "milp", first], jobs=2))


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_sweep_elsewhere_has_the_same_rows(backend: str) -> None:
    pytest.importorskip("distributed" if backend == "dask" else "ray", reason=f"{backend} is an extra")
    script = f"""
import joblib, pandas as pd, partition as pt
def rows(jobs):
    return pt.sweep("tiny", {{"cs3.price": [5.0, 50.0]}}, cluster="trn2_efa_cs3", how="order_dp", objective="usd_per_mtok", jobs=jobs, prompt=8, new_tokens=4)
if __name__ == "__main__":
    one = rows(1)
    if {backend!r} == "dask":
        from dask.distributed import Client
        client = Client(n_workers=1, threads_per_worker=1, dashboard_address=None)
    else:
        import ray
        from ray.util.joblib import register_ray
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
        register_ray()
    with joblib.parallel_config(backend={backend!r}):
        pd.testing.assert_frame_equal(one, rows(2))
    print("the same rows")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "the same rows" in done.stdout, done.stderr[-2000:]


def test_the_verbs(tmp_path: Path) -> None:
    done = run("bench", "--suite", "v1", "--policy", "m_topo", "--policy", "equal_split", "--jobs", "2", "--picture", str(tmp_path / "p.svg"), "--json")
    assert "factor" not in done.stdout and (tmp_path / "p.svg").stat().st_size > 1000
    found = json.loads(done.stdout)["rows"]
    assert done.returncode == 0 and len(found) == 24 and {r["policy"] for r in found} == {"m_topo", "equal_split"} and all(len(r["digest"]) == 12 for r in found)
    done = run("compare", "tiny", "--prompt", "8", "--new-tokens", "4", "--policy", "single", "--policy", "phase_split", "--bands", "--draws", "50")
    assert done.returncode == 0 and "of 50 draws" in done.stdout
    done = run("front", "tiny", "--prompt", "8", "--new-tokens", "4", "--objective", "usd", "--objective", "tpot", "--points", "1", "--policy", "order_dp", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["rows"][0]["usd_per_mtok"] > 0
    done = run("explain", "tiny", "--prompt", "8", "--new-tokens", "4", "--cluster", "trn2_efa_cs3")
    assert done.returncode == 0 and "best found" in done.stdout


@pytest.mark.parametrize(("args", "code", "says"), [
    (("bench",), 2, "--suite v1"), (("bench", "none.json"), 2, "cannot be read"), (("bench", "--suite", "v9"), 2, "no suite called"),
    (("plan", "tiny", "--prompt", "8", "--new-tokens", "4", "--limit", "beauty=1"), 2, "no limit called"), (("plan", "tiny", "--prompt", "8", "--new-tokens", "4", "--ttft", "soon"), 2, "no limit of ttft"),
    (("plan", "tiny", "--prompt", "8", "--new-tokens", "4", "--policy", "portfolio", "--ttft", "1 ns"), 3, "ttft is"),
    (("bench", "--suite", "v1", "--seconds", "0"), 0, "cannot run for 0 s"), (("bench", "--suite", "v1", "--jobs", "0"), 2, "0 processes cannot run"),
])  # fmt: skip
def test_wrong_use(args: tuple[str, ...], code: int, says: str) -> None:
    done = run(*args)
    assert done.returncode == code and says in done.stdout + done.stderr, done.stdout + done.stderr
