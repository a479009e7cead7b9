"""A problem written to a file is the problem that is read, and what is none is named."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import posed

import partition as pt
from partition import instances, records, suites
from partition.errors import InstanceError, OutputError
from partition.evaluation import evaluate
from partition.pipeline import place
from partition.problem import Problem


def unlike(problem: Problem) -> Problem:
    """With something in every field that a file keeps."""
    seconds = problem.seconds.copy()
    seconds[1, 0] = np.inf
    return dataclasses.replace(problem, seconds=seconds, pins={0: 1}, together=((2, 3),), contiguous=True, limits={"throughput": 1e-9}, backward=frozenset({4}))


@pytest.mark.parametrize("make", [lambda: posed("trn2_efa_4cs3")[0], lambda: suites.layered(12, 1), lambda: unlike(suites.chain(6, 0))])
def test_what_is_written_is_read(make: Callable[[], Problem], tmp_path: Path) -> None:
    problem = make()
    again = instances.read(pt.write_problem(problem, tmp_path / "p.json"))
    assert records.to_values(again) == json.loads((tmp_path / "p.json").read_text()) | {"names": problem.names, "meshes": problem.meshes, "kinds": problem.kinds, "region": problem.region,
        "together": problem.together} | {k: records.to_values(problem)[k] for k in ("flows", "residents")}  # fmt: skip
    mesh = place(problem, "order_dp").mesh
    assert evaluate(again, again.placement(mesh)).throughput == evaluate(problem, problem.placement(mesh)).throughput


def test_a_plan_is_a_problem_too(tmp_path: Path) -> None:
    from models import llama

    fn, args = llama.generation("tiny", batch=1, prompt=8, new_tokens=4)
    plan = pt.plan(fn, args, cluster="trn2_efa_cs3", keep=("layers",), limits={"crossings": 50})
    plan.save(tmp_path)
    read = instances.read(tmp_path / "plan.json")
    assert len(read) == len(plan.problem) and read.together == plan.problem.together and read.limits == {"crossings": 50}
    assert pt.Plan.load(tmp_path).problem.together == plan.problem.together


@pytest.mark.parametrize(("change", "says"), [
    (lambda raw: raw | {"format": "partition problem 9"}, "its format is not"), (lambda raw: raw | {"names": ["a"] * len(raw["names"])}, "two nodes are called 'a'"),
    (lambda raw: raw | {"capacity": [-1.0] * len(raw["capacity"])}, "capacity holds a number below 0"), (lambda raw: raw | {"price": "much"}, "price|convert|float"),
    (lambda raw: raw | {"workload": {"batch": 0, "trips": 0}}, r"workload\.batch"), (lambda raw: raw | {"workload": {"batch": float("nan"), "trips": 0}}, "not JSON"),
    (lambda raw: raw | {"together": "x"}, "together"), (lambda raw: raw | {"ports": [None] * 3}, r"ports\.0"), (lambda raw: raw | {"more": 1}, "more"),
    (lambda raw: raw | {"flows": [raw["flows"][0] | {"src": 99}]}, r"flows\[0\] names a node"), (lambda raw: {k: v for k, v in raw.items() if k != "seconds"}, "seconds"),
    (lambda raw: raw | {"flows": [raw["flows"][0] | {"src": 5, "dst": [1]}, *raw["flows"]]}, "wait for each other|stands before"),
])  # fmt: skip
def test_what_is_no_problem(change: Callable[[dict[str, Any]], dict[str, Any]], says: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(change(json.loads(pt.write_problem(suites.chain(6, 0), path).read_text()))))
    with pytest.raises(InstanceError, match=says) as caught:
        instances.read(path)
    assert str(path) in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write the problem"):
        pt.write_problem(suites.chain(6, 0), tmp_path / "no" / "p.json")
