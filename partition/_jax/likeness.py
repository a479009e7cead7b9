"""Whether two jaxprs are one program: by a checksum, or by the first equation that is another; bodies of loops, branches and calls entered.

Two that print alike need not be: the text leaves out the arrays that jaxprs inside close over, and which functions callbacks call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from jax.extend import core as jex

from partition._jax import body_of, consts_of, to_numpy

Way = tuple[Any, ...]
"""Equations on the way to one inside loops and calls, the innermost last."""


def identity(jaxpr: Any) -> str:
    """A checksum of all that a jaxpr computes, in this process: where a function is called, it is of that one."""
    digest = hashlib.sha256(str(body_of(jaxpr)).encode())
    for part in _unprinted(jaxpr):
        digest.update(part)
    return digest.hexdigest()


def _unprinted(jaxpr: Any) -> Iterator[bytes]:
    """What the text of a jaxpr leaves out."""
    yield from map(_content, consts_of(jaxpr))
    for eqn in body_of(jaxpr).eqns:
        for value in eqn.params.values():
            held = _inside(value)
            for inner in held:
                yield from _unprinted(inner)
            if not held and not eqn.primitive.name.startswith("custom_") and " at 0x" in (text := repr(value)):  # of a custom rule, only its jaxpr is computed
                yield text.encode()


def _content(const: Any) -> bytes:
    array = to_numpy(const)
    return f"{getattr(const, 'dtype', array.dtype)}{array.shape}".encode() + array.tobytes()


def _inside(value: Any) -> list[Any]:
    """The jaxprs that a parameter holds, closed ones with what they close over."""
    if isinstance(value, tuple | list):
        return [inner for part in value for inner in _inside(part)]
    return [value] if hasattr(body_of(value), "eqns") else []


def unlike(want: Any, got: Any) -> tuple[Way, Way, str] | None:
    """(the way of `want` to the first equation that differs, the same of `got`, and how it differs); None where the two are alike.

    Empty ways mean that inputs, outputs or the number of equations differ.
    """
    one, other = body_of(want), body_of(got)
    names: tuple[dict[Any, int], dict[Any, int]] = ({}, {})

    def number(side: int, atom: Any) -> Any:
        if isinstance(atom, jex.Literal):
            return f"{atom.val!r} of {atom.aval}"
        return names[side].setdefault(atom, len(names[side]))

    if len(one.invars) != len(other.invars) or len(one.constvars) != len(other.constvars):
        return (), (), "body has other inputs"
    for v, w in zip((*one.constvars, *one.invars), (*other.constvars, *other.invars), strict=True):
        if number(0, v) != number(1, w) or str(v.aval) != str(w.aval):
            return (), (), "body has other inputs"
    if any(a is not b and _content(a) != _content(b) for a, b in zip(consts_of(want), consts_of(got), strict=False)):
        return (), (), "body closes over another constant"
    for a, b in zip(one.eqns, other.eqns, strict=False):
        if a.primitive.name != b.primitive.name:
            return (a,), (b,), f"op is {b.primitive.name}"
        if [number(0, x) for x in a.invars] != [number(1, x) for x in b.invars]:
            return (a,), (b,), "op reads other values"
        if [str(x.aval) for x in (*a.invars, *a.outvars)] != [str(x.aval) for x in (*b.invars, *b.outvars)]:
            return (a,), (b,), "op has other shapes or types"
        for x, y in zip(a.outvars, b.outvars, strict=True):
            number(0, x), number(1, y)
        if (inner := unlike_params(a, b)) is not None:
            return (a, *inner[0]), (b, *inner[1]), inner[2]
    if len(one.eqns) != len(other.eqns):
        return (), (), f"body has {len(other.eqns)} equations for {len(one.eqns)}"
    if [number(0, x) for x in one.outvars] != [number(1, x) for x in other.outvars]:
        return (), (), "body gives other results"
    return None


def unlike_params(a: Any, b: Any) -> tuple[Way, Way, str] | None:
    """How the parameters of two equations of one primitive differ."""
    if a.params.keys() != b.params.keys():
        return (), (), "op has other parameters"
    for key, x in a.params.items():
        y = b.params[key]
        if x is y:
            continue
        pairs = [*zip(_inside(x), _inside(y), strict=False)]
        for j, k in pairs:
            if (found := unlike(j, k)) is not None:
                return found
        if not pairs and str(x) != str(y):
            return (), (), f"op has {key} = {str(y)[:60]}, not {str(x)[:60]}"
    return None
