"""Changes equations of jaxprs and leaves the rest as it is: sums that are wide enough for several devices, forms that XLA for CPU can partition, no constraints of the author's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from partition._jax import body_of, consts_of
from partition.graph import OPAQUE

_ENTERED = ("jaxpr", "body_jaxpr", "branches", "call_jaxpr", "fun_jaxpr")
_UNENTERED = OPAQUE | {"custom_jvp_call", "custom_vjp_call"}


def _rewritten(jaxpr: Any, change: Callable[[Any], list[Any] | None]) -> Any:
    """The same jaxpr, bodies included, with every equation as `change` gives it; None keeps it."""
    inner = body_of(jaxpr)
    eqns: list[Any] = []
    for eqn in inner.eqns:
        if (new := change(eqn)) is not None:
            eqns += new
            continue
        for key in (k for k in _ENTERED if k in eqn.params and eqn.primitive.name not in _UNENTERED):
            held = eqn.params[key]
            entered = tuple(_rewritten(j, change) for j in held) if isinstance(held, tuple) else _rewritten(held, change)
            eqn = eqn.replace(params={**eqn.params, key: entered})
        eqns.append(eqn)
    body = jex.Jaxpr(constvars=inner.constvars, invars=inner.invars, outvars=inner.outvars, eqns=eqns, effects=inner.effects, debug_info=inner.debug_info)
    return jex.ClosedJaxpr(body, consts_of(jaxpr)) if hasattr(jaxpr, "jaxpr") else body


def _cast(eqn: Any, value: Any, out: Any, dtype: Any) -> Any:
    return eqn.replace(primitive=jax.lax.convert_element_type_p, invars=[value], outvars=[out], effects=set(),
                       params={"new_dtype": dtype, "weak_type": False, "sharding": None})  # fmt: skip


def wide_sums(jaxpr: Any) -> Any:
    """The same jaxpr with every contraction of narrow floats multiplied and summed in float32 and rounded once at its end.

    Where devices share a contraction, their partial sums then meet in float32, and the result is rounded as often as the uncut one. Products of narrow floats are exact
    in float32, so wide operands change none; XLA's form for CPU has not all of the narrow ones.
    """

    def change(eqn: Any) -> list[Any] | None:
        if eqn.primitive.name not in ("dot_general", "ragged_dot_general"):
            return None
        out, eqns, given = eqn.outvars[0], [], []
        if not jnp.issubdtype(out.aval.dtype, jnp.floating):
            return None
        for v in eqn.invars:
            given.append(_wide(v.aval) if _is_narrow(v.aval.dtype) else v)
            eqns += [_cast(eqn, v, given[-1], given[-1].aval.dtype)] if given[-1] is not v else []
        narrow = _is_narrow(out.aval.dtype)
        if not eqns and not narrow:
            return None
        made = _wide(out.aval) if narrow else out
        eqns.append(eqn.replace(invars=given, outvars=[made], params={**eqn.params, "preferred_element_type": made.aval.dtype}))
        return [*eqns, _cast(eqn, made, out, out.aval.dtype)] if narrow else eqns

    return _rewritten(jaxpr, change)


def _is_narrow(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize < 4


def _wide(aval: Any) -> Any:
    return jex.Var(jax.core.ShapedArray(aval.shape, jnp.float32))


def whole_where_needed(jaxpr: Any, whole: Any) -> Any:
    """The same jaxpr with some equations on whole values (`whole`, a sharding), for XLA's form for CPU does not take split ones: Fourier transforms, whose layouts it refuses, and
    reductions by what none of its collectives computes."""

    def held(value: Any, out: Any) -> Any:
        return _through(lambda x: jax.lax.with_sharding_constraint(x, whole), value, out)

    def change(eqn: Any) -> list[Any] | None:
        if not _needs_whole(eqn):
            return None
        given = [v if isinstance(v, jex.Literal) else jex.Var(v.aval) for v in eqn.invars]
        made = [v if isinstance(v, jex.DropVar) else jex.Var(v.aval) for v in eqn.outvars]
        before = [held(v, new) for v, new in zip(eqn.invars, given, strict=True) if new is not v]
        return [*before, eqn.replace(invars=given, outvars=made), *(held(new, v) for new, v in zip(made, eqn.outvars, strict=True) if new is not v)]

    return _rewritten(jaxpr, change)


def _needs_whole(eqn: Any) -> bool:
    name = eqn.primitive.name
    return name in ("fft", "reduce", "reduce_xor") or (name in ("reduce_and", "reduce_or") and eqn.invars[0].aval.dtype != bool)


def own_indices(jaxpr: Any) -> Any:
    """The same jaxpr with the indices of every scatter behind a barrier: where they come from outside of two branches, XLA's partitioner looks for what made them and ends the process."""

    def change(eqn: Any) -> list[Any] | None:
        if not eqn.primitive.name.startswith("scatter") or isinstance(eqn.invars[1], jex.Literal):
            return None
        own = jex.Var(eqn.invars[1].aval)
        return [_through(jax.lax.optimization_barrier, eqn.invars[1], own), eqn.replace(invars=[eqn.invars[0], own, *eqn.invars[2:]])]

    return _rewritten(jaxpr, change) if _has(jaxpr, "cond") else jaxpr


def unconstrained(jaxpr: Any) -> Any:
    """The same jaxpr without its author's sharding constraints: they name devices of a mesh of the author's."""

    def change(eqn: Any) -> list[Any] | None:
        return [_cast(eqn, eqn.invars[0], eqn.outvars[0], eqn.outvars[0].aval.dtype)] if eqn.primitive.name == "sharding_constraint" else None

    return _rewritten(jaxpr, change) if _has(jaxpr, "sharding_constraint") else jaxpr


def _through(fn: Callable[[Any], Any], value: Any, out: Any) -> Any:
    """The equation of a function of one value that JAX traces to one."""
    (eqn,) = body_of(jax.make_jaxpr(fn)(jax.ShapeDtypeStruct(value.aval.shape, value.aval.dtype))).eqns
    return eqn.replace(invars=[value], outvars=[out])


def _has(jaxpr: Any, primitive: str) -> bool:
    return any(e.primitive.name == primitive or any(_has(j, primitive) for j in jex.jaxprs_in_params(e.params)) for e in body_of(jaxpr).eqns)
