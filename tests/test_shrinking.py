"""A plan of a large model, carried over to its small sibling and checked there."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

import partition as pt
from models import llama
from models.generate import shrunken
from partition import pipeline
from partition.errors import PartitionError, PlacementError
from partition.problem import pose
from partition.sharding import narrowed


@pytest.mark.parametrize(("name", "cluster"), [("llama-3.2-1b", "trn2_efa_4cs3"), ("mamba-130m", "trn2_efa_cs3"), ("t5-base", "trn2_efa_cs3"),
                                               *(pytest.param(n, "trn2_efa_4cs3", marks=pytest.mark.slow) for n in ("gemma-2-2b", "deepseek-v2-lite"))])
def test_every_family_has_a_sibling_of_the_same_structure(name: str, cluster: str) -> None:
    fn, args = pipeline.request(name, batch=1, prompt=64, new_tokens=16)
    plan = dataclasses.replace(pt.plan(fn, args, cluster=cluster, policy="random"), request={"prompt": 64, "new_tokens": 16})
    small, own, told = pipeline.sibling(plan, name)
    assert small.problem.names == plan.problem.names and (small.placement.mesh == plan.placement.mesh).all() and "not its numbers" in told[0]
    assert sum(np.size(leaf) for leaf in jax.tree_util.tree_leaves(own)) < 0.2 * sum(leaf.size for leaf in jax.tree_util.tree_leaves(args))
    pt.cut(small.problem.phases.program, small.placement)  # type: ignore[union-attr]


@pytest.mark.parametrize("stand_in", [2, 3])
def test_the_sibling_is_split_as_the_whole_model_is(stand_in: int) -> None:
    """Of 3,072 columns, three devices hold a third each; of the sibling's 64 they cannot, which is said."""
    whole = pt.cluster("trn2_efa_cs3")
    machines = dataclasses.replace(whole, meshes=tuple(dataclasses.replace(m, stand_in=stand_in) for m in whole.meshes))
    fn, args = pipeline.request("gpt2", batch=1, prompt=64, new_tokens=16)
    plan = dataclasses.replace(pt.plan(fn, args, cluster=machines, policy="phase_split", sharding="tensor"), request={"prompt": 64, "new_tokens": 16})
    small, _, told = pipeline.sibling(plan, "gpt2")
    assert [layout.tensors for layout in small.problem.layouts] == [layout.tensors for layout in plan.problem.layouts] and small.problem.layouts[0].tensors
    graph = small.problem.phases.program.graph  # type: ignore[union-attr]
    split = {t for t in narrowed(small.problem.layouts[0], graph, stand_in).tensors if "mlp.up.kernel" in (graph.tensors[t].name or "")}
    assert len(split) == (12 if stand_in == 2 else 0)
    assert any("mlp.up.kernel on trn2: 3 ways at full width, 1 in the sibling (12 of them)" in line for line in told) == (stand_in == 3), told


def test_the_sibling_is_checked() -> None:
    done = subprocess.run([sys.executable, "-m", "partition", "check", "tiny", "--shrink", "--cluster", "trn2_efa_4cs3", "--policy", "random"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "a sibling with small widths was run" in done.stdout, done.stderr


def test_what_cannot_be_carried_over() -> None:
    fn, args = llama.generation("tiny", prompt=8, new_tokens=4)
    plan = pt.plan(fn, args, cluster="trn2_efa_cs3", policy="single")
    other, more = llama.generation("tiny", prompt=8, new_tokens=4, sample=True)
    with pytest.raises(PlacementError, match=r"the sibling has|the program"):
        pose(pt.tag(pt.trace(other, *more)), plan.problem.cluster, like=plan.problem)  # type: ignore[arg-type]
    with pytest.raises(PlacementError, match="a loaded problem"):
        pose(pt.tag(pt.trace(fn, *args)), plan.problem.cluster, like=dataclasses.replace(plan.problem, phases=None))  # type: ignore[arg-type]
    with pytest.raises(PartitionError, match="known by name"):
        pipeline.sibling(plan, "mine:model")


def test_widths_shrink_and_structure_stays() -> None:
    whole = llama.CONFIGS["llama-3.1-70b"]
    small = shrunken(whole)
    assert (small.layers, small.heads, small.kv_heads) == (80, 64, 8) and (small.vocab, small.dim, small.ffn, small.head_dim) == (256, 64, 64, 8)


def test_a_plan_that_one_wafer_does_not_hold_is_made_for_the_next_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    from partition.checking import on_first_that_holds
    from partition.errors import InfeasibleError

    def make(cluster: str) -> Any:
        if cluster != "large":
            raise InfeasibleError("too much", where=cluster, mend="take a larger one")
        return cluster

    assert on_first_that_holds(make, ("small", "large")) == "large" and "small does not hold it" in capsys.readouterr().err
    with pytest.raises(InfeasibleError):
        on_first_that_holds(make, ("small",))  # one that was named is kept
