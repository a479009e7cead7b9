"""Shapes that hold symbols: their values, the tags of such programs, and what plans them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import partition as pt
from models import gpt2, llama
from models.generate import generate, of_nnx, shapes
from partition import symbols
from partition.errors import TraceError
from partition.loops import CONTRACTIONS


def test_values() -> None:
    a, b = export.symbolic_shape("a,b")
    wanted = {2 * a * b + 3: 27, (a + 1) // 2: 2, b % 3: 1, a**3 - b: 23, export.symbolic_shape("max(a,b) + min(a,7)")[0]: 7, 5: 5}
    for expression, number in wanted.items():
        assert symbols.value(expression, {"a": 3, "b": 4}) == number
    many = symbols.value(a * b + 1, {"a": np.array([1, 2, 3]), "b": 10})
    assert many.tolist() == [11, 21, 31]
    assert symbols.symbols(a * b + a) == {"a", "b"}


def test_stand_ins_are_unlike_and_make_every_size_positive() -> None:
    a, b = export.symbolic_shape("a,b", constraints=["a >= 500"])
    sizes = symbols.stand_ins([a - 400, b, a])
    assert sizes["a"] > 400 and sizes["b"] > 0 and sizes["a"] != sizes["b"]


def llama_request() -> tuple[Any, Any]:
    weights, steps = of_nnx(llama.Llama(llama.config("tiny"), shapes("float32")))
    batch, prompt = export.symbolic_shape("batch, prompt")
    return lambda w, t: generate(*steps(w), t, 8), (weights, jax.ShapeDtypeStruct((batch, prompt), jnp.int32))


def test_a_model_of_any_size_is_tagged_as_it_is_at_one() -> None:
    fn, args = llama_request()
    program = pt.trace(fn, *args)
    assert set(program.sizes) == {"batch", "prompt"}
    phases = pt.tag(program)
    at = pt.tag(program.at(batch=2, prompt=12))
    for phase in pt.Phase:  # a size that is read as a value is an op more
        assert [o.primitive for o in phases.ops(phase) if o.primitive in CONTRACTIONS] == [o.primitive for o in at.ops(phase) if o.primitive in CONTRACTIONS]
    assert "stand in for the program's symbols" in str(phases) and at.program.sizes == {}
    assert phases.anatomy.layers.counts == at.anatomy.layers.counts


def test_two_callables_of_any_size() -> None:
    weights, _ = args = llama_request()[1]
    batch, prompt = args[1].shape
    model = llama.Llama(llama.config("tiny"), shapes("float32"))
    _, steps = of_nnx(model)

    def prefill(w: Any, tokens: Any) -> Any:
        return steps(w)[0](tokens, tokens.shape[1] + 4)

    def decode(w: Any, token: Any, cache: Any, position: Any) -> Any:
        return steps(w)[1](token, cache, position)

    cache = jax.eval_shape(prefill, weights, jax.ShapeDtypeStruct((batch, prompt), jnp.int32))[1]
    token, position = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    program = pt.trace(prefill=(prefill, args), decode=(decode, (weights, token, cache, position)), new_tokens=4)
    assert pt.tag(program).loop is not None
    assert pt.plan(program.at(batch=2, prompt=12), cluster="trn2_efa_cs3").problem.workload.batch == 2


def test_a_program_with_symbols_is_planned_at_sizes() -> None:
    fn, args = llama_request()
    program = pt.trace(fn, *args)
    with pytest.raises(TraceError, match=r"symbols batch, prompt.*\n.*\n.*program.at\(batch=..., prompt=...\)"):
        pt.plan(program, cluster="trn2_efa_cs3")
    plan = pt.plan(program.at(batch=2, prompt=12), cluster="trn2_efa_cs3")
    assert plan.problem.workload.batch == 2


@pytest.mark.parametrize("sizes", [{}, {"batch": 2}, {"batch": 2, "prompt": 0}, {"batch": 2, "prompt": 8, "other": 1}, {"batch": 2.5, "prompt": 8}])
def test_sizes_that_do_not_fit_are_named(sizes: Any) -> None:
    fn, args = llama_request()
    with pytest.raises(TraceError, match="batch, prompt"):
        pt.trace(fn, *args).at(**sizes)
    plain, given = gpt2.generation("tiny", batch=1, prompt=8, new_tokens=2)
    with pytest.raises(TraceError, match="no symbols"):
        pt.trace(plain, *given).at(batch=1)


def test_a_comparison_that_symbols_leave_open_asks_for_a_constraint() -> None:
    (n,) = export.symbolic_shape("n")
    with pytest.raises(TraceError, match=r"inconclusive.*\n.*\n.*constraints="):
        pt.trace(lambda w, x: w[: x.shape[0]] + x if x.shape[0] <= 4 else x, np.ones(4, np.float32), jax.ShapeDtypeStruct((n,), jnp.float32))


def test_shapes_that_values_decide_are_refused() -> None:
    with pytest.raises(TraceError, match="cannot be traced"):
        pt.trace(lambda w, x: w[jnp.nonzero(x)], np.ones((4, 4), np.float32), np.arange(4))
