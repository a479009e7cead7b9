"""What users bring by name: policies and models of any wrong form are refused in three lines; outputs are written whole or not at all."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import posed

from partition import pipeline
from partition.errors import NameUnknownError, OutputError, PartitionError, PlacementError, WorkError
from partition.outputs import write
from partition.phases import tag
from partition.pipeline import place, request
from partition.problem import Placement, Problem, pose
from partition.profiles import cluster
from partition.program import trace

MODULES = {
    "mine_raises": "raise RuntimeError('at import')",
    "mine_exits": "import sys\nsys.exit(0)",
    "mine_broken": "def (:",
    "mine": "number = 3\n"
            "def needs(x): return x\n"
            "def key(): return {}['a']\n"
            "def none(): return None\n"
            "def array(): return (lambda x: x, [1])\n"
            "def leaves(): raise SystemExit(0)\n",
}  # fmt: skip


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["mine_raises:x", "mine_exits:x", "mine_broken:x", "mine_absent:x", "mine:absent", ":x", "mine:", "mine:number.real.none"])
@pytest.mark.parametrize("find", [pipeline.policy, request], ids=["policy", "model"])
def test_a_module_that_does_not_give_the_name(own: Path, name: str, find: object) -> None:
    before = list(sys.path)
    with pytest.raises(NameUnknownError, match="cannot be imported") as error:
        find(name)  # type: ignore[operator]
    assert len(str(error.value).splitlines()) == 3 and sys.path == before


@pytest.mark.parametrize(("attr", "says"), [
    ("number", "cannot be called"), ("needs", "TypeError"), ("key", "KeyError"), ("none", "gave NoneType"), ("array", r"not \(fn, args\)"),
    ("leaves", "SystemExit"),
])  # fmt: skip
def test_a_model_of_another_form(own: Path, attr: str, says: str) -> None:
    with pytest.raises(PartitionError, match=says) as error:
        request(f"mine:{attr}")
    assert len(str(error.value).splitlines()) == 3 and "(fn, args)" in error.value.mend


def test_the_models_own_error_keeps_its_three_parts() -> None:
    with pytest.raises(PartitionError, match="batch 0") as error:
        request("tiny", batch=0)
    assert "batch >= 1" in error.value.mend


def raises(problem: Problem) -> None:
    raise ValueError("first line\nsecond line")


def exits(problem: Problem) -> None:
    sys.exit(0)


@pytest.mark.parametrize(("policy", "says"), [
    (raises, "ValueError: first line$"), (exits, "SystemExit: 0"), (lambda p: None, "returned NoneType"),
    (lambda p: p.placement(np.zeros(len(p))), "whole numbers, the placement holds float64"),
    (lambda p: p.placement(np.full(len(p), np.nan)), "float64"), (lambda p: p.placement(["a"] * len(p)), "whole numbers"),
    (lambda p: p.placement([0] * (len(p) - 1)), "entries"), (lambda p: p.placement([99] * len(p)), "does not have"),
    (lambda p: p.placement([-1] * len(p)), "does not have"),
], ids=range(9))  # fmt: skip
def test_policies_that_fail(policy: pipeline.Policy, says: str) -> None:
    with pytest.raises(PlacementError) as error:
        place(posed()[0], policy)
    import re

    assert re.search(says, error.value.what) and len(str(error.value).splitlines()) == 3


def test_a_policy_that_cannot_be_called(own: Path) -> None:
    with pytest.raises(PlacementError, match="cannot be called"):
        pipeline.policy("mine:number")


def test_pose_holds_its_arguments() -> None:
    phases = posed()[0].phases
    assert phases is not None
    with pytest.raises(NameUnknownError, match="level called 'ops'"):
        pose(phases, cluster("trn2_only"), level="ops")  # type: ignore[arg-type]
    with pytest.raises(WorkError, match="-1 times"):
        pose(tag(trace(lambda x: x + 1, np.zeros(3))), cluster("trn2_only"), trips=-1)


def test_a_policy_cannot_change_the_problem() -> None:
    def cheats(problem: Problem) -> object:
        problem.seconds[:] = 0
        return problem.placement([0] * len(problem))

    with pytest.raises(PlacementError, match="read-only"):
        place(posed()[0], cheats)  # type: ignore[arg-type]


@pytest.mark.parametrize("also", [{0: ("x",)}, {0: 1}, {0: (0,)}])
def test_further_meshes_are_held_too(also: dict[int, object]) -> None:
    with pytest.raises(PlacementError, match="further meshes"):
        place(posed()[0], lambda p: dataclasses.replace(p.placement([0] * len(p)), also=also))


def test_a_placement_without_its_problem_is_given_it() -> None:
    problem, _ = posed()
    assert place(problem, lambda p: Placement(mesh=np.zeros(len(p), np.int64))).problem is problem


@pytest.mark.parametrize("change", [lambda raw: [1], lambda raw: raw | {"format": 0}, lambda raw: raw | {"problem": raw["problem"] | {"seconds": [[1.0]]}},
                                    lambda raw: raw | {"placement": {"mesh": [0.5] * len(raw["problem"]["names"]), "also": {}}},
                                    lambda raw: raw["problem"].update(price=[-1.0, 1.0]) or raw, lambda raw: raw["problem"]["flows"][0].update(src=999) or raw])  # fmt: skip
def test_a_plan_of_another_form_is_refused(tmp_path: Path, change: object) -> None:
    made = pipeline.plan(*request("tiny", prompt=4, new_tokens=3), cluster="trn2_efa_cs3")
    raw = change(json.loads((made.save(tmp_path) / "plan.json").read_text()))  # type: ignore[operator]
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    with pytest.raises(PartitionError) as error:
        pipeline.Plan.load(tmp_path)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("change, other", [(lambda raw: raw["request"].update(new_tokens=9), "give other workload than its problem has"), (lambda raw: raw["request"].update(prompt=9), "another program"),
                                           (lambda raw: raw["machines"]["meshes"].reverse(), "give other meshes than its problem has")])  # fmt: skip
def test_a_request_that_was_written_into_a_plan_is_refused(tmp_path: Path, change: Callable[[Any], None], other: str) -> None:
    made = pipeline.plan(*request("tiny", prompt=4, new_tokens=3), cluster="trn2_efa_cs3")
    dataclasses.replace(made, request={"model": "tiny", "prompt": 4, "new_tokens": 3}).save(tmp_path)
    assert pipeline.again(pipeline.Plan.load(tmp_path))[0].problem.names == made.problem.names
    change(raw := json.loads((tmp_path / "plan.json").read_text()))
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    with pytest.raises(PlacementError, match=other):
        pipeline.again(pipeline.Plan.load(tmp_path))


def test_files_are_written_all_or_none(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("old")
    with pytest.raises(OutputError, match="b is a folder"):
        write(tmp_path, {"a": "new", "b": "new", "c": "new"})
    assert (tmp_path / "a").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a", "b"]
    write(tmp_path, {"a": "new", "c": "new"})
    assert (tmp_path / "a").read_text() == "new" and sorted(os.listdir(tmp_path)) == ["a", "b", "c"]
    with pytest.raises(OutputError, match="it is a file, not a folder"):
        write(tmp_path / "a", {"x": ""})
    with pytest.raises(OutputError, match="it is a file, not a folder"):
        write(tmp_path / "a" / "deeper", {"x": ""})
