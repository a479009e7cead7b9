"""Any shape from one trace: what is evaluated at many sizes at once is what a plan at each of them gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import partition as pt
from models import llama
from models.generate import generate, of_nnx, shapes
from partition.errors import TraceError
from partition.program import sized
from partition.scaling import curves

FIELDS = ("ttft", "tpot", "e2e", "usd_per_mtok", "joules_per_token", "throughput")


def symbolic() -> pt.Program:
    weights, steps = of_nnx(llama.Llama(llama.config("llama-3.2-1b"), shapes("bfloat16"), scanned=True))
    batch, prompt = export.symbolic_shape("batch, prompt")
    return pt.trace(lambda w, t: generate(*steps(w), t, 16), weights, jax.ShapeDtypeStruct((batch, prompt), jnp.int32))


def maker(batch: int, prompt: int) -> Any:
    return llama.generation("llama-3.2-1b", batch=batch, prompt=prompt, new_tokens=16, layers="scanned")


@pytest.mark.parametrize("cluster", ["trn2_efa_cs3", "h100_disagg"])
def test_many_sizes_at_once_are_each_of_them(cluster: str) -> None:
    program, at = symbolic(), [(1, 256), (2, 300), (4, 1024)]
    made = curves(program, {"batch": 2, "prompt": 512}, cluster=cluster, sharding="tensor")
    found = made.at(batch=[b for b, _ in at], prompt=[s for _, s in at])
    for i, (batch, prompt) in enumerate(at):
        plan = pt.plan(sized(program, {"batch": batch, "prompt": prompt}), cluster=cluster, sharding="tensor")
        same = pt.evaluate(plan.problem, plan.problem.placement(made.plan.placement.mesh))
        for field in FIELDS:
            assert getattr(found, field)[i] == pytest.approx(getattr(same, field), rel=2e-3), (field, batch, prompt)
        for (pair, moved), (pair2, moved2) in zip(sorted(found.link_bytes.items()), sorted(same.link_bytes.items()), strict=True):
            assert pair == pair2 and moved[i] == pytest.approx(moved2)
    assert "symbols" in made.how


def test_where_the_plan_was_made_it_gives_what_the_plan_gives() -> None:
    made = curves(symbolic(), {"batch": 2, "prompt": 512}, cluster="trn2_efa_cs3")
    found = made.at()
    for field in FIELDS:
        assert getattr(found, field) == pytest.approx(getattr(made.plan.estimate, field), rel=1e-12)


def test_without_symbols_polynomials_of_a_few_traces_give_the_same() -> None:
    by_traces = curves(maker, {"batch": 2, "prompt": 512}, cluster="trn2_efa_cs3", sharding="tensor")
    by_symbols = curves(symbolic(), {"batch": 2, "prompt": 512}, cluster="trn2_efa_cs3", sharding="tensor")
    sizes = {"batch": np.array([1, 3, 8]), "prompt": np.array([128, 700, 2048])}
    a, b = by_traces.at(**sizes), by_symbols.at(**sizes)
    for field in FIELDS:
        np.testing.assert_allclose(getattr(a, field), getattr(b, field), rtol=1e-3)  # ops that read a size as a value are the difference
    assert by_traces.how == "exact polynomials from 6 traces"


def test_makers_whose_programs_differ_are_refused() -> None:
    def odd(n: int) -> Any:
        return (lambda w, x: (x @ w if n % 2 else x + 1.0)), (np.ones((4, 4), np.float32), jax.ShapeDtypeStruct((n, 4), jnp.float32))

    with pytest.raises(TraceError, match="more than their sizes"):
        curves(odd, {"n": 8}, cluster="trn2_only", policy="single")

    def root(n: int) -> Any:
        return (lambda w, x: x @ w), (np.ones((4, 4), np.float32), jax.ShapeDtypeStruct((int(n**0.5) + 1, 4), jnp.float32))

    with pytest.raises(TraceError, match="no polynomial"):
        curves(root, {"n": 100}, cluster="trn2_only", policy="single")


@pytest.mark.parametrize("sizes", [{"tokens": 3}, {"batch": 0}, {"batch": [1, 2], "prompt": [1, 2, 3]}, {"batch": 1.5}])
def test_sizes_that_are_none(sizes: Any) -> None:
    made = curves(symbolic(), {"batch": 1, "prompt": 64}, cluster="trn2_efa_cs3")
    with pytest.raises(TraceError):
        made.at(**sizes)
