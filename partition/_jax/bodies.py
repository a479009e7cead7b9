"""Looks into jaxprs as they compute: the results of every equation, and the bodies of loops and calls trip by trip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from partition._jax import _callee, _scan_arity, as_function, body_of, consts_of


def kept(eqn: Any) -> list[Any]:
    """The results of an equation that something may read."""
    return [v for v in eqn.outvars if not isinstance(v, jex.DropVar)]


def expose(jaxpr: Any) -> tuple[Any, list[int]]:
    """The same closed jaxpr with the results of every equation as outputs, in order; and the number of the equation of each."""
    inner = body_of(jaxpr)
    made = [(n, v) for n, eqn in enumerate(inner.eqns) for v in kept(eqn)]
    debug = jex.DebugInfo("jit", "exposed", tuple(f"x{i}" for i in range(len(inner.invars))), tuple(f"y{i}" for i in range(len(made))))
    body = jex.Jaxpr(constvars=inner.constvars, invars=inner.invars, outvars=[v for _, v in made], eqns=inner.eqns, effects=inner.effects, debug_info=debug)
    return jex.ClosedJaxpr(body, consts_of(jaxpr)), [n for n, _ in made]


def environment(jaxpr: Any, inputs: Sequence[Any], results: Sequence[Any]) -> Callable[[Any], Any]:
    """How to read an operand of a jaxpr's equations, given its inputs and the results that `expose` gives."""
    inner = body_of(jaxpr)
    made = [v for eqn in inner.eqns for v in kept(eqn)]
    env = {**dict(zip(inner.constvars, consts_of(jaxpr), strict=True)), **dict(zip(inner.invars, inputs, strict=True)), **dict(zip(made, results, strict=True))}
    return lambda atom: np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, jex.Literal) else env[atom]  # type: ignore[attr-defined]


def _run(jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
    return as_function(jaxpr)(*inputs)


def stepped(eqn: Any, given: Sequence[Any], run: Callable[[Any, Sequence[Any]], list[Any]]) -> list[Any] | None:
    """What a loop, a branch or a call gives where `run` computes its bodies, one trip after the other; None for an equation without a body."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        consts, carry = _scan_arity(params)
        state, rows, length = list(given[consts : consts + carry]), dict[int, list[Any]](), params["length"]
        for i in reversed(range(length)) if params["reverse"] else range(length):
            out = run(params["jaxpr"], [*given[:consts], *state, *(x[i] for x in given[consts + carry :])])
            state, rows[i] = out[:carry], out[carry:]
        stacked = [jnp.stack([rows[i][k] for i in range(length)]) if length else jnp.zeros(v.aval.shape, v.aval.dtype) for k, v in enumerate(eqn.outvars[carry:])]
        return [*state, *stacked]
    if name == "while":
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        state = list(given[second:])
        while bool(run(params["cond_jaxpr"], [*given[:first], *state])[0]):
            state = run(params["body_jaxpr"], [*given[first:second], *state])
        return state
    if name == "cond":
        return run(params["branches"][int(np.clip(given[0], 0, len(params["branches"]) - 1))], list(given[1:]))
    return None if (callee := _callee(eqn)) is None else run(callee, list(given))


def inside(want: Any, got: Any, read: Callable[[Any], Any], run: Callable[[Any, Sequence[Any]], list[Any]] = _run) -> Iterator[tuple[Any, Any, list[Any]]]:
    """(body of `want`, body of `got`, its inputs) for a call, or for every trip of a loop: the state goes on as `want` has it, where `run` computes it."""
    values = [read(a) for a in want.invars]
    if want.primitive.name != got.primitive.name:
        return
    if want.primitive.name == "scan":
        consts, carry = _scan_arity(want.params)
        state, xs, length = values[consts : consts + carry], values[consts + carry :], want.params["length"]
        for i in reversed(range(length)) if want.params["reverse"] else range(length):
            given = [*values[:consts], *state, *(x[i] for x in xs)]
            yield want.params["jaxpr"], got.params["jaxpr"], given
            state = run(want.params["jaxpr"], given)[:carry]
    elif want.primitive.name == "while":
        first, second = want.params["cond_nconsts"], want.params["cond_nconsts"] + want.params["body_nconsts"]
        state = values[second:]
        while True:
            yield want.params["cond_jaxpr"], got.params["cond_jaxpr"], [*values[:first], *state]
            if not bool(run(want.params["cond_jaxpr"], [*values[:first], *state])[0]):
                return
            yield want.params["body_jaxpr"], got.params["body_jaxpr"], [*values[first:second], *state]
            state = run(want.params["body_jaxpr"], [*values[first:second], *state])
    elif want.primitive.name == "cond":
        branch = int(np.clip(values[0], 0, len(want.params["branches"]) - 1))
        yield want.params["branches"][branch], got.params["branches"][branch], values[1:]
    elif (callee := _callee(want)) is not None and (other := _callee(got)) is not None:
        yield callee, other, values
