"""A float64 oracle: a jaxpr interpreter that evaluates every equation on floats in float64.

The program is traced as usual, without x64, so it is the same program; then each equation is evaluated in turn, with floats as
float64 and integers as they were. Scans are Python loops. It needs JAX's x64 switch, so it runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

CALLEES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def floats(x: Any) -> bool:
    """Whether a dtype or an array is of a float type, bfloat16 included."""
    return bool(jnp.issubdtype(getattr(x, "dtype", x), jnp.floating))


def wide(x: Any) -> Any:
    """A float array as float64, anything else as it is."""
    return np.asarray(x).astype(np.float64) if floats(x) else x


def widened(value: Any) -> Any:
    """A parameter of an equation: a float dtype becomes float64."""
    return np.dtype(np.float64) if isinstance(value, np.dtype) and floats(value) else value


def evaluate(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The results of a closed (or constant-free) jaxpr in float64. Knows scans and calls; other control flow is refused."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    env: dict[Any, Any] = dict(zip(inner.constvars, map(wide, getattr(jaxpr, "consts", ())), strict=True))
    env.update(zip(inner.invars, map(wide, args), strict=True))

    def read(atom: Any) -> Any:
        return wide(np.asarray(atom.val, atom.aval.dtype)) if isinstance(atom, jex.Literal) else env[atom]

    for eqn in inner.eqns:
        name, params, given = eqn.primitive.name, eqn.params, [read(a) for a in eqn.invars]
        callee = [params[k] for k in CALLEES if k in params]
        if name in ("while", "cond"):
            raise NotImplementedError(name)
        if name == "scan":
            out = _scan(params, given)
        elif callee:
            out = evaluate(callee[0], given)
        else:
            out = eqn.primitive.bind(*given, **{k: widened(v) for k, v in params.items()})
            out = out if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(a) for a in inner.outvars]


def _scan(params: Any, given: Sequence[Any]) -> list[Any]:
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:  # some JAX versions keep the groups of arguments as a tree
        consts, carry = (len(group) for group in params["ft_in"].unpack()[:2])
    held, state, xs = given[:consts], list(given[consts : consts + carry]), given[consts + carry :]
    rows: list[list[Any]] = []
    for i in reversed(range(params["length"])) if params["reverse"] else range(params["length"]):
        out = evaluate(params["jaxpr"], [*held, *state, *(x[i] for x in xs)])
        state, made = out[:carry], out[carry:]
        rows.append(made)
    rows = rows[::-1] if params["reverse"] else rows
    return [*state, *(np.stack(column) for column in zip(*rows, strict=True))]


def float64(fn: Callable[..., Any], *args: Any) -> Any:
    """What `fn(*args)` gives with every float equation in float64, as NumPy. Turns JAX's x64 switch on for the process."""
    assert not jax.config.jax_enable_x64, "trace without x64, or it is another program"
    jaxpr, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    jax.config.update("jax_enable_x64", True)
    try:
        out = [np.asarray(x) for x in evaluate(jaxpr, jax.tree_util.tree_leaves(args))]
    finally:
        jax.config.update("jax_enable_x64", False)
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(shape), out)
