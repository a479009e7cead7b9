"""Opaque calls: shard_map, Pallas, FFI, host callbacks. One op each, with a cost; what can run on CPU runs and matches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

import partition as pt
from partition.errors import ExecutionError
from partition.phases import Phase
from partition.work import RULES, work

W = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
TOKENS = np.array([1, 2], np.int32)


def request(through: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A greedy request whose every step goes through an opaque call on (w, h [2, 8])."""

    def fn(w: Any, tokens: Any) -> Any:
        def step(token: Any, _: Any) -> Any:
            token = jnp.argmax(through(w, w[token]) @ w, -1).astype(jnp.int32)
            return token, token

        return jax.lax.scan(step, step(tokens, None)[0], None, length=3)[1]

    return fn


def kernel(x: Any, o: Any) -> None:
    o[...] = jnp.tanh(x[...])


def pallas(estimate: Any = None) -> Callable[[Any, Any], Any]:
    shape = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    return lambda w, h: pl.pallas_call(kernel, out_shape=shape, interpret=True, cost_estimate=estimate)(h)


def sharded(w: Any, h: Any) -> Any:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    part = jax.shard_map(lambda a, b: jax.lax.psum(a @ b, "x"), mesh=mesh, in_specs=(P(None, "x"), P("x", None)), out_specs=P())
    return part(h, w)


def callback(w: Any, h: Any) -> Any:
    return jax.pure_callback(lambda x: np.tanh(x), jax.ShapeDtypeStruct((2, 8), jnp.float32), h)


def foreign(w: Any, h: Any) -> Any:
    return jax.ffi.ffi_call("no_such_target", jax.ShapeDtypeStruct((2, 8), jnp.float32))(h)


CALLS = {"pallas_call": pallas(), "shard_map": sharded, "pure_callback": callback, "ffi_call": foreign}


@pytest.mark.parametrize("name", CALLS)
def test_an_opaque_call_is_one_op_with_a_phase_and_a_cost(name: str) -> None:
    program = pt.trace(request(CALLS[name]), W, TOKENS)
    phases = pt.tag(program)
    found = [op for op in program.graph.walk() if op.primitive == name]
    assert [phases.of[op.id] for op in found] == [Phase.PREFILL, Phase.DECODE]
    costs = work(program.graph)
    assert all(costs[op.id].bytes >= 2 * 2 * 8 * 4 and costs[op.id].total_flops > 0 for op in found)
    assert pt.plan(program, cluster="trn2_efa_cs3").estimate.e2e > 0


@pytest.mark.parametrize("name", ["pallas_call", "pure_callback"])
def test_what_runs_on_cpu_runs_and_matches(name: str) -> None:
    program = pt.trace(request(CALLS[name]), W, TOKENS)
    assert pt.check(pt.plan(program, cluster="trn2_efa_cs3").stages, W, TOKENS).equal


@pytest.mark.parametrize("name", ["shard_map", "ffi_call"])
def test_what_does_not_run_there_is_said_to(name: str) -> None:
    plan = pt.plan(pt.trace(request(CALLS[name]), W, TOKENS), cluster="trn2_efa_cs3")
    with pytest.raises(ExecutionError, match="cannot be compiled for CPU") as error:
        pt.check(plan.stages, W, TOKENS)
    assert name in error.value.where


def test_a_kernel_that_declares_its_cost_is_taken_at_its_word() -> None:
    estimate = pl.CostEstimate(flops=12345, transcendentals=0, bytes_accessed=678)
    program = pt.trace(request(pallas(estimate)), W, TOKENS)
    op = next(o for o in program.graph.walk() if o.primitive == "pallas_call")
    assert work(program.graph)[op.id].total_flops == 12345 and work(program.graph)[op.id].bytes == 678


def test_the_work_of_a_shard_map_is_that_of_all_its_devices() -> None:
    program = pt.trace(lambda w, h: sharded(w, h), W, np.ones((2, 8), np.float32))
    (op,) = program.graph.ops
    assert work(program.graph)[op.id].total_flops == 2 * (2 * 2 * 4 * 8 + 2 * 8)  # [2, 4] @ [4, 8] and a sum, on each of two devices


def test_one_ffi_target_may_have_a_rule_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "ffi_call:no_such_target", lambda op, ins, outs: pt.Work(flops={"float32": 7}))
    program = pt.trace(request(foreign), W, TOKENS)
    op = next(o for o in program.graph.walk() if o.primitive == "ffi_call")
    assert work(program.graph)[op.id].total_flops == 7
