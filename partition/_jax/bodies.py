"""Looks into jaxprs as they compute: the results of every equation, and the bodies of loops and calls trip by trip."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from partition._jax import _callee, _scan_arity, as_function, body_of, consts_of
from partition._jax.lifting import bind


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
    made = [v for eqn in body_of(jaxpr).eqns for v in kept(eqn)]
    return _reader({**_entered(jaxpr, inputs), **dict(zip(made, results, strict=True))})


def _entered(jaxpr: Any, inputs: Sequence[Any]) -> dict[Any, Any]:
    inner = body_of(jaxpr)
    return {**dict(zip(inner.constvars, consts_of(jaxpr), strict=True)), **dict(zip(inner.invars, inputs, strict=True))}


def _reader(env: Mapping[Any, Any]) -> Callable[[Any], Any]:
    return lambda atom: np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, jex.Literal) else env[atom]  # type: ignore[attr-defined]


Run = Callable[[Any, Sequence[Any]], list[Any]]
"""(jaxpr, inputs) -> its outputs."""


def _run(jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
    return as_function(jaxpr)(*inputs)


def _trips(eqn: Any, given: Sequence[Any], run: Run) -> Generator[tuple[Callable[[Any], Any], list[Any]], None, list[Any] | None]:
    """(how to find the body in an equation of this kind, its inputs) for a call, or for every trip of a loop, of which `run` computes the state. Returns what the equation gives; None for one
    without a body."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        consts, carry = _scan_arity(params)
        state, rows, length = list(given[consts : consts + carry]), dict[int, list[Any]](), params["length"]
        for i in reversed(range(length)) if params["reverse"] else range(length):
            inputs = [*given[:consts], *state, *(x[i] for x in given[consts + carry :])]
            yield _held("jaxpr"), inputs
            out = run(params["jaxpr"], inputs)
            state, rows[i] = out[:carry], out[carry:]
        stacked = [jnp.stack([rows[i][k] for i in range(length)]) if length else jnp.zeros(v.aval.shape, v.aval.dtype) for k, v in enumerate(eqn.outvars[carry:])]
        return [*state, *stacked]
    if name == "while":
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        state = list(given[second:])
        while True:
            yield _held("cond_jaxpr"), [*given[:first], *state]
            if not bool(run(params["cond_jaxpr"], [*given[:first], *state])[0]):
                return state
            yield _held("body_jaxpr"), [*given[first:second], *state]
            state = run(params["body_jaxpr"], [*given[first:second], *state])
    if name == "cond":
        branch = int(np.clip(given[0], 0, len(params["branches"]) - 1))
        yield lambda e: e.params["branches"][branch], list(given[1:])
        return run(params["branches"][branch], list(given[1:]))
    if (callee := _callee(eqn)) is None:
        return None
    yield _callee, list(given)
    return run(callee, list(given))


def _held(name: str) -> Callable[[Any], Any]:
    return lambda eqn: eqn.params[name]


def stepped(eqn: Any, given: Sequence[Any], run: Run) -> list[Any] | None:
    """What a loop, a branch or a call gives where `run` computes its bodies, one trip after the other; None for an equation without a body."""
    trips = _trips(eqn, given, run)
    while True:
        try:
            next(trips)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def one_by_one(jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
    """What a jaxpr gives where every equation is computed alone, in loops trip by trip: nothing is compiled together, so that two parts of it make what the whole does, bit for bit."""
    env = _entered(jaxpr, inputs)
    read = _reader(env)
    for eqn in body_of(jaxpr).eqns:
        given = [read(a) for a in eqn.invars]
        made = stepped(eqn, given, one_by_one)
        env.update(zip(eqn.outvars, bind(eqn, given) if made is None else made, strict=True))
    return [read(a) for a in body_of(jaxpr).outvars]


def inside(want: Any, got: Any, read: Callable[[Any], Any], run: Run = _run) -> Iterator[tuple[Any, Any, list[Any]]]:
    """(body of `want`, body of `got`, its inputs) for a call, or for every trip of a loop: the state goes on as `want` has it, where `run` computes it."""
    if want.primitive.name == got.primitive.name:
        for body, inputs in _trips(want, [read(a) for a in want.invars], run):
            if (rival := body(got)) is not None:
                yield body(want), rival, inputs
