"""What differs between two plans, and what caused it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import partition as pt
from partition.errors import PlacementError
from partition.pipeline import plan, request


def planned(prompt: int = 32, cluster: Any = "trn2_efa_cs3", policy: str = "phase_split", **more: Any) -> pt.Plan:
    fn, args = request("tiny", batch=1, prompt=prompt, new_tokens=8)
    made = plan(fn, args, cluster=cluster, policy=policy, sharding="tensor", **more)
    return dataclasses.replace(made, request={"model": "tiny", "prompt": prompt, "new_tokens": 8, "batch": 1, "trips": None, "sharding": "tensor"})


def test_the_same_plan_has_no_changes() -> None:
    assert str(pt.diff(planned(), planned())) == "the plans are the same"


def test_a_cause_alone_gives_the_whole_change() -> None:
    slow = pt.cluster("trn2_efa_cs3").replace({"efa_v3.beta": "1 MB/s"})
    found = pt.diff(planned(), planned(cluster=slow))
    assert [c.what for c in found.inputs] == ["efa_v3.beta"] and found.causes[0].alone == found.after != found.before
    assert found.kept == found.after and not found.moved  # the placement is the same: all of it are the numbers


def test_placements_and_numbers_are_told_apart() -> None:
    found = pt.diff(planned(), planned(prompt=48, policy="single"))
    assert {c.what for c in found.inputs} == {"prompt", "policy"} and len(found.causes) == 2
    assert found.kept is not None and found.kept != found.after and sum(found.moved.values()) > 0
    assert all(count > 0 and a != b for (_, a, b), count in found.moved.items())
    text = str(found)
    assert "Inputs that differ, each alone" in text and "Nodes that moved" in text


def test_limits_versions_and_other_machines() -> None:
    one, other = planned(), planned(cluster="trn2_efa_4cs3", limits={"ttft": 1.0})
    other = dataclasses.replace(other, versions={**other.versions, "jax": "another"})
    found = pt.diff(one, other)
    named = {c.what: c for c in found.inputs}
    assert named["limit ttft"].after == 1.0 and named["meshes"].alone and named["version of jax"].after == "another" and not named["version of jax"].alone
    assert found.kept is None and not found.moved  # the nodes have no common meshes
    assert not any(c.alone for c in pt.diff(one, other, again=False).inputs)


def test_saved_plans_and_the_verb(tmp_path: Path) -> None:
    planned().save(tmp_path / "a")
    planned(prompt=40).save(tmp_path / "b")
    done = subprocess.run([sys.executable, "-m", "partition", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"], capture_output=True, text=True, timeout=120)
    raw = json.loads(done.stdout)
    assert [c["what"] for c in raw["inputs"]] == ["prompt"] and raw["inputs"][0]["alone"]["ttft"] == pytest.approx(raw["after"]["ttft"]) and raw["made"]["versions"]["jax"]
    with pytest.raises(PlacementError, match="both are the same file"):
        from partition.changes import load_both

        load_both(tmp_path / "a", tmp_path / "a")
