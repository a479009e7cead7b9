"""Results as tables of pandas, each with what made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import posed

pytest.importorskip("pandas", reason="pandas is an extra")

import partition as pt
from partition.cli import as_rows
from partition.errors import OutputError


def test_plans_verdicts_and_lists(tmp_path: Path) -> None:
    problem, args = posed()
    results = pt.compare({"tiny": problem}, ["single", "phase_split", "random"])
    table = pt.frame(results)
    assert list(table["policy"]) == [r.policy for r in results] and list(table["e2e"]) == [r.estimate.e2e for r in results if r.estimate is not None]
    made = pt.plan(problem.phases.program, cluster="trn2_efa_cs3", policy="phase_split")  # type: ignore[union-attr]
    stages = pt.frame(made)
    assert set(stages["mesh"]) == {"trn2", "cs3"} and (stages["seconds"] >= 0).all()
    assert stages.attrs["made"]["profiles"].keys() >= {"trn2", "cs3"} and stages.attrs["made"]["versions"]["jax"]
    assert list(pt.frame(made.save(tmp_path / "p") / "plan.json")["seconds"]) == list(stages["seconds"])
    checked = pt.check(made.stages, *args)
    assert pt.frame(checked)["bitwise"].all() and len(pt.frame(checked)) == len(checked.outputs) + len(checked.boundaries)


def test_files_of_the_command_line_and_what_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(as_rows([{"a": 1, "b": {"c": 2}}, {"a": 3, "b": {"c": 4}}]))
    table = pt.frame(tmp_path / "r.json")
    assert list(table["b.c"]) == [2, 4] and table.attrs["made"]["versions"]
    (tmp_path / "x.json").write_text(json.dumps([1]))
    for wrong in (tmp_path / "x.json", tmp_path / "none.json", 3):
        with pytest.raises(OutputError, match="rows"):
            pt.frame(wrong)
