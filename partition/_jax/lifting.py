"""Evaluates a jaxpr in another arithmetic: every equation as an `Arithmetic` says, loops, branches and calls entered.

`interpreted(jaxpr, arithmetic)` is a function of the jaxpr's inputs that JAX can compile. `Float64` is the oracle's arithmetic; `Shadowed` has it beside the program's own, which
chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from partition._jax import _callee, _scan_arity, body_of, consts_of, to_numpy
from partition.graph import OPAQUE


class Arithmetic(Protocol):
    """How values enter, and what an equation without a body gives."""

    def enter(self, value: Any, aval: Any) -> Any:
        """An input, a constant or a literal."""

    def leaf(self, eqn: Any, given: Sequence[Any]) -> list[Any]:
        """The results of an equation."""


def bind(eqn: Any, given: Sequence[Any], **params: Any) -> list[Any]:
    """An equation as JAX computes it, with other parameters where given."""
    out = eqn.primitive.bind(*given, **{**eqn.params, **params})
    return list(out) if eqn.primitive.multiple_results else [out]


def interpreted(jaxpr: Any, how: Arithmetic) -> Callable[..., list[Any]]:
    """A closed (or constant-free) jaxpr as a function of its inputs, in some arithmetic."""
    return functools.partial(_evaluate, how, jaxpr)


def _evaluate(how: Arithmetic, jaxpr: Any, *args: Any) -> list[Any]:
    inner = body_of(jaxpr)
    env: dict[Any, Any] = {v: how.enter(c, v.aval) for v, c in zip(inner.constvars, consts_of(jaxpr), strict=True)}
    env.update((v, how.enter(a, v.aval)) for v, a in zip(inner.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return how.enter(np.asarray(atom.val, atom.aval.dtype), atom.aval) if isinstance(atom, jex.Literal) else env[atom]  # type: ignore[attr-defined]

    for eqn in inner.eqns:
        given = [read(a) for a in eqn.invars]
        env.update(zip(eqn.outvars, _equation(how, eqn, given), strict=True))
    return [read(a) for a in inner.outvars]


def _equation(how: Arithmetic, eqn: Any, given: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    run = functools.partial(_evaluate, how)
    if name == "scan":
        consts, carry = _scan_arity(params)
        held, state, xs = given[:consts], given[consts : consts + carry], given[consts + carry :]

        def step(state: Any, row: Any) -> tuple[list[Any], list[Any]]:
            out = run(params["jaxpr"], *held, *state, *row)
            return out[:carry], out[carry:]

        last, rows = jax.lax.scan(step, state, xs, length=params["length"], reverse=params["reverse"])
        return [*last, *rows]
    if name == "while":
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        return list(jax.lax.while_loop(lambda s: run(params["cond_jaxpr"], *given[:first], *s)[0], lambda s: run(params["body_jaxpr"], *given[first:second], *s), given[second:]))
    if name == "cond":
        return list(jax.lax.switch(given[0], [functools.partial(run, b) for b in params["branches"]], *given[1:]))
    if (callee := _callee(eqn)) is not None:
        return run(callee, *given)
    return how.leaf(eqn, given)


def floats(x: Any) -> bool:
    """Whether a dtype, or what has one, is of a float type, bfloat16 included."""
    return bool(jnp.issubdtype(getattr(x, "dtype", x), jnp.floating))


_SCATTERS: dict[str, Callable[..., Any]] = {
    "scatter": jax.lax.scatter, "scatter-sub": jax.lax.scatter_sub, "scatter-add": jax.lax.scatter_add, "scatter_add": jax.lax.scatter_add, "scatter_mul": jax.lax.scatter_mul,
    "scatter-mul": jax.lax.scatter_mul, "scatter_min": jax.lax.scatter_min, "scatter-min": jax.lax.scatter_min, "scatter_max": jax.lax.scatter_max,
    "scatter-max": jax.lax.scatter_max,
}  # fmt: skip


def wider(kind: Any, dtype: Any) -> Any:
    """The type that takes the place of one of floats (dtype) or of complex numbers (their parts no narrower than dtype); others stay."""
    return np.dtype(dtype) if floats(kind) else np.promote_types(kind, dtype) if jnp.issubdtype(kind, jnp.complexfloating) else kind


def lifted(eqn: Any, given: Sequence[Any], dtype: Any) -> list[Any]:
    """An equation with its floats, and the parts of its complex numbers, in a wider type. Bits of floats, opaque calls and reductions by a jaxpr are computed in the program's own types."""
    name, params = eqn.primitive.name, eqn.params
    if name in _SCATTERS:  # what they do with an element is a jaxpr of the program's type
        kept = {k: params[k] for k in ("indices_are_sorted", "unique_indices", "mode")}
        return [_SCATTERS[name](*given, params["dimension_numbers"], **kept)]
    if name in OPAQUE or name == "bitcast_convert_type" or any(True for _ in jex.jaxprs_in_params(params)):
        own = [jnp.asarray(x, v.aval.dtype) if _inexact(v.aval) else x for x, v in zip(given, eqn.invars, strict=True)]
        return [jnp.asarray(out, wider(v.aval.dtype, dtype)) if _inexact(v.aval) else out for out, v in zip(bind(eqn, own), eqn.outvars, strict=True)]
    return bind(eqn, given, **{k: wider(v, dtype) for k, v in params.items() if isinstance(v, np.dtype)})


def _typed(value: Any, dtype: Any) -> Any:
    """A value as one of a type, whatever a caller gave (int64 is another where float64 is on); a key as it is."""
    return value if getattr(value, "dtype", None) == dtype or jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.asarray(value, dtype)


def _inexact(aval: Any) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.inexact))


class Float64:
    """Every float in float64, and the parts of complex numbers; integers as they were; what a program rounds on purpose it does not round. Needs `jax.enable_x64`."""

    def enter(self, value: Any, aval: Any) -> Any:
        return _typed(value, wider(aval.dtype, np.float64))

    def leaf(self, eqn: Any, given: Sequence[Any]) -> list[Any]:
        return [given[0]] if eqn.primitive.name == "reduce_precision" else lifted(eqn, given, np.float64)


class Beside(NamedTuple):
    """A value in the program's own arithmetic, and in float64."""

    own: Any
    wide: Any


class Shadowed:
    """Float64 beside the program's own arithmetic. Whole numbers and truth values are the program's own, so both take one way: where float64 would choose another token or
    expert at a near tie, all that follows would be of another text and tell nothing. Needs `jax.enable_x64`."""

    def __init__(self) -> None:
        self.wide = Float64()

    def enter(self, value: Any, aval: Any) -> Any:
        if isinstance(value, Beside):
            return value
        own = _typed(value, aval.dtype)
        return Beside(own, self.wide.enter(value, aval)) if _inexact(aval) else own

    def leaf(self, eqn: Any, given: Sequence[Any]) -> list[Any]:
        first, wide = [x.own if isinstance(x, Beside) else x for x in given], [widened(x) for x in given]
        own = bind(eqn, first)
        if eqn.primitive.name == "sort":
            order = _order(eqn, first)
            wide = [jnp.take_along_axis(x, order, eqn.params["dimension"]) for x in wide]
        elif eqn.primitive.name == "top_k":
            wide = [jnp.take_along_axis(wide[0], own[1], eqn.params.get("axis", -1)), own[1]]
        else:
            wide = self.wide.leaf(eqn, wide)
        return [Beside(a, b) if _inexact(v.aval) else a for a, b, v in zip(own, wide, eqn.outvars, strict=True)]


def _order(eqn: Any, given: Sequence[Any]) -> Any:
    """Where a sort takes each element from."""
    along = eqn.params["dimension"]
    places = jax.lax.broadcasted_iota(jnp.int32, given[0].shape, along)
    return jax.lax.sort((*given, places), dimension=along, is_stable=eqn.params["is_stable"], num_keys=eqn.params["num_keys"])[-1]


def widened(value: Any) -> Any:
    """The float64 of what may have one beside it."""
    return value.wide if isinstance(value, Beside) else value


def float64(jaxpr: Any, args: Sequence[Any]) -> list[np.ndarray]:
    """What a jaxpr gives with every float in float64, where it chooses as it does in its own arithmetic; compiled as one."""
    with jax.enable_x64(True):
        return [to_numpy(widened(x)) for x in jax.jit(interpreted(jaxpr, Shadowed()))(*args)]
