"""Faults planted in cut programs: equations of stages changed, transfers dropped or corrupted, caches left stale, shards exchanged.

An equation is changed wherever it stands, bodies of loops included. Each mutant knows what a check has to name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from partition import _jax, dispatch, execution
from partition.stages import Stages

Change = Callable[[Any], Any]
"""An equation -> another one, or None where this mutation is none of it."""


def rounded(eqn: Any) -> Any:
    """A cast on the way: one operand loses bits."""
    at = next((i for i, v in enumerate(eqn.invars) if str(v.aval.dtype) == "float32" and v.aval.shape and not isinstance(v, jex.Literal)), None)
    if at is None or eqn.primitive.name not in ("dot_general", "mul", "add"):
        return None
    v = eqn.invars[at]
    narrow, wide = jex.Var(jax.core.ShapedArray(v.aval.shape, jnp.bfloat16)), jex.Var(v.aval)

    def cast(x: Any, y: Any, dtype: Any) -> Any:
        return eqn.replace(primitive=jax.lax.convert_element_type_p, invars=[x], outvars=[y], params={"new_dtype": jnp.dtype(dtype), "weak_type": False, "sharding": None}, effects=set())

    return [cast(v, narrow, jnp.bfloat16), cast(narrow, wide, jnp.float32), eqn.replace(invars=[wide if i == at else x for i, x in enumerate(eqn.invars)])]


def other(names: str, primitive: Any) -> Change:
    """An equation of some primitives computes another one."""
    return lambda eqn: [eqn.replace(primitive=primitive, params={} if primitive in (jax.lax.sub_p, jax.lax.max_p) else eqn.params)] if eqn.primitive.name == names else None


def shifted(eqn: Any) -> Any:
    """Off by one: an integer literal of an addition or a comparison is one more."""
    if eqn.primitive.name not in ("add", "lt", "sub", "mul"):
        return None
    at = next((i for i, v in enumerate(eqn.invars) if isinstance(v, jex.Literal) and np.issubdtype(v.aval.dtype, np.integer) and np.ndim(v.val) == 0), None)
    if at is None:
        return None
    new = jex.Literal(np.asarray(eqn.invars[at].val + 1, eqn.invars[at].aval.dtype), eqn.invars[at].aval)
    return [eqn.replace(invars=[new if i == at else v for i, v in enumerate(eqn.invars)])]


def scaled(eqn: Any) -> Any:
    """A float literal is a little more."""
    at = next((i for i, v in enumerate(eqn.invars) if isinstance(v, jex.Literal) and np.issubdtype(v.aval.dtype, np.floating) and np.ndim(v.val) == 0 and np.isfinite(v.val) and v.val), None)
    if at is None:
        return None
    new = jex.Literal(np.asarray(eqn.invars[at].val * 1.25, eqn.invars[at].aval.dtype), eqn.invars[at].aval)
    return [eqn.replace(invars=[new if i == at else v for i, v in enumerate(eqn.invars)])]


def swapped(eqn: Any) -> Any:
    """Operands exchanged, where that matters."""
    if eqn.primitive.name in ("sub", "div") and len(eqn.invars) == 2 and str(eqn.invars[0].aval) == str(eqn.invars[1].aval):
        return [eqn.replace(invars=eqn.invars[::-1])]
    return None


def turned(eqn: Any) -> Any:
    """A cumulative or sorted axis, a reversal or a scan runs the other way."""
    if eqn.primitive.name == "scan" and eqn.params["length"] > 1:
        return [eqn.replace(params={**eqn.params, "reverse": not eqn.params["reverse"]})]
    return None


def moved(eqn: Any) -> Any:
    """A static slice starts one earlier or later."""
    if eqn.primitive.name != "slice":
        return None
    start, limit, shape = list(eqn.params["start_indices"]), list(eqn.params["limit_indices"]), eqn.invars[0].aval.shape
    for d in range(len(shape)):
        step = 1 if limit[d] < shape[d] else -1 if start[d] > 0 else 0
        if step:
            start[d], limit[d] = start[d] + step, limit[d] + step
            return [eqn.replace(params={**eqn.params, "start_indices": tuple(start), "limit_indices": tuple(limit)})]
    return None


CHANGES: dict[str, Change] = {
    "a cast": rounded, "sin for cos": other("cos", jax.lax.sin_p), "cos for sin": other("sin", jax.lax.cos_p), "a difference for a sum": other("add", jax.lax.sub_p),
    "exp for rsqrt": other("rsqrt", jax.lax.sqrt_p), "an offset": shifted, "a scale": scaled, "operands exchanged": swapped, "a loop backwards": turned, "a slice moved": moved,
}  # fmt: skip


def places(jaxpr: Any, change: Change, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every way to an equation that a change applies to, bodies entered: positions, and names of parameters with a position among their jaxprs."""
    for n, eqn in enumerate(_jax.body_of(jaxpr).eqns):
        if change(eqn) is not None:
            yield (*way, n)
        for key, value in eqn.params.items():
            if eqn.primitive.name in ("scan", "while", "cond", "jit", "remat2", "checkpoint"):
                for i, inner in enumerate(jex.jaxprs_in_params({key: value})):
                    yield from places(inner, change, (*way, n, (key, i)))


def changed(jaxpr: Any, change: Change, way: tuple[Any, ...]) -> tuple[Any, Any]:
    """(the jaxpr with the equation at the end of a way changed, that equation)."""
    inner, n = _jax.body_of(jaxpr), way[0]
    eqns = list(inner.eqns)
    if len(way) == 1:
        victim = eqns[n]
        eqns[n : n + 1] = change(victim)
    else:
        key, i = way[1]
        held = eqns[n].params[key]
        many = list(held) if isinstance(held, tuple) else [held]
        many[i], victim = changed(many[i], change, way[2:])
        eqns[n] = eqns[n].replace(params={**eqns[n].params, key: tuple(many) if isinstance(held, tuple) else many[0]})
    body = jex.Jaxpr(constvars=inner.constvars, invars=inner.invars, outvars=inner.outvars, eqns=eqns, effects=inner.effects, debug_info=inner.debug_info)
    return (jex.ClosedJaxpr(body, _jax.consts_of(jaxpr)) if hasattr(jaxpr, "jaxpr") else body), victim


def with_stage(stages: Stages, number: int, jaxpr: Any) -> Stages:
    """The stages with one jaxpr replaced."""

    def step(s: Any) -> Any:
        if hasattr(s, "body"):
            return dataclasses.replace(s, cond=step(s.cond) if s.cond is not None else None, body=tuple(map(step, s.body)))
        return dataclasses.replace(s, jaxpr=jaxpr) if s.id == number else s

    return dataclasses.replace(stages, steps=tuple(map(step, stages.steps)))


# --- faults of the run, not of a jaxpr: name -> a context in which runs are faulty


@contextlib.contextmanager
def patched(where: Any, name: str, new: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, new)
        yield


def transfer(fault: Callable[[Any, int], Any], every: int = 3) -> contextlib.AbstractContextManager[None]:
    """Every so many-th transfer of floats brings something else."""
    good, count = execution._Computer.move, [0]

    def move(self: Any, array: Any, value: Any, src: int, dst: int) -> Any:
        got = good(self, array, value, src, dst)
        if jnp.issubdtype(got.dtype, jnp.floating) and got.ndim > 1:
            count[0] += 1
            if count[0] % every == 0:
                return jax.device_put(fault(got, count[0]), got.sharding)
        return got

    return patched(execution._Computer, "move", move)


def exchanged(array: Any, _: int) -> Any:
    """As if shards were put together in another order."""
    axis = max(range(array.ndim), key=lambda d: array.shape[d])
    return jnp.roll(array, max(array.shape[axis] // 2, 1), axis)


def transposed(array: Any, _: int) -> Any:
    a, b = array.shape[-2:]
    return jnp.swapaxes(array, -1, -2).reshape(*array.shape[:-2], a, b)


def stale(rank: int = 4) -> contextlib.AbstractContextManager[None]:
    """A carry of so many dimensions is not replaced between trips; of four, a KV cache."""
    good = dispatch.Walk.rebind

    runs: dict[int, dict[int, Any]] = {}

    def rebind(self: Any, needed: Any, carry: Any, inside: Any) -> None:
        floats = sorted((v for v, _ in needed if self.tensors[v[0]].dtype == "float32" and len(self.tensors[v[0]].shape) == rank), key=str)
        before = runs.setdefault(id(self), {})
        good(self, needed, carry, inside)
        new = {m: self.machine.arrays.copy(a) for m, a in self.env[floats[0]].items() if a is not None} if floats else {}
        for m, array in before.items():
            self.put(floats[0], m, array)
        before.update(new)

    return patched(dispatch.Walk, "rebind", rebind)


RUNS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "a transfer dropped": lambda: transfer(lambda a, n: jnp.zeros_like(a)), "every transfer dropped": lambda: transfer(lambda a, n: jnp.zeros_like(a), 1),
    "a transfer in bfloat16": lambda: transfer(lambda a, n: a.astype(jnp.bfloat16).astype(a.dtype)), "shards exchanged": lambda: transfer(exchanged),
    "a transfer transposed": lambda: transfer(transposed), "a transfer twice": lambda: transfer(lambda a, n: a * 2), "one row lost": lambda: transfer(lambda a, n: a.at[..., -1].set(0)),
    "rows shifted by one": lambda: transfer(lambda a, n: jnp.roll(a, 1, -2)),
}  # fmt: skip
