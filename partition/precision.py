"""What the target's arithmetic would do to a model: stages computed in the formats of the devices that they are planned for.

Every equation is computed in float32. Operands of contractions are rounded to what the device multiplies, products are summed as it sums them, and results that the
program keeps in 16 bits or fewer are kept in the device's format, E4M3 in the range that it has there. What the program computes in float32 stays so: the devices have it, and the square in a norm needs it.
What crosses may be cast to a narrower format on the wire. Order inside a sum is not emulated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition import _jax
from partition._jax.lifting import floats, interpreted, lifted
from partition.errors import NameUnknownError
from partition.hardware import FORMATS, Precision

_CHUNK = 32
"""Products that are summed in float32 before a narrow accumulator takes them (assumed: neither vendor publishes its order)."""

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "cbfloat16": 2, "float8_e4m3": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}
WIRES = tuple(_BYTES)
"""Formats in which values may cross."""


def rounded(x: Any, form: str) -> Any:
    """Float32 values rounded to a format, to nearest, ties to even; beyond its largest number they become infinite, in float8_e4m3fn NaN.

    Raises NameUnknownError.
    """
    if form not in FORMATS:
        raise NameUnknownError.among("format", form, FORMATS)
    x = jnp.asarray(x, jnp.float32)
    if form in ("program", "float32"):
        return x
    if form == "cbfloat16":
        return _cbfloat16(x)
    return x.astype(getattr(jnp, form)).astype(jnp.float32)


def _cbfloat16(x: Any) -> Any:
    """1 sign bit, 6 of exponent with a bias of 31, 9 of mantissa, read as IEEE reads them: subnormals, infinity and NaN."""
    _, exponent = jnp.frexp(x)  # x = m 2^exponent, 0.5 <= |m| < 1
    unit = jnp.ldexp(jnp.float32(1.0), jnp.maximum(exponent - 1, -30) - 9)
    near = jnp.round(x / unit) * unit
    return jnp.where(jnp.isfinite(x), jnp.where(jnp.abs(near) >= 2.0**32, jnp.copysign(jnp.inf, x), near), x)


def scaled(x: Any, form: str) -> Any:
    """Values rounded to a format of 8 bits with one scale for all, so that the largest is the format's largest; other formats without."""
    if not form.startswith("float8"):
        return rounded(x, form)
    most = {"float8_e4m3": 240.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}[form]
    x = jnp.asarray(x, jnp.float32)
    top = jnp.abs(x).max(initial=0.0)
    scale = jnp.where((top > 0) & jnp.isfinite(top), top / most, 1.0)
    return rounded(x / scale, form) * scale


def wire_bytes(array: Any, form: str) -> int:
    """Bytes that an array takes on the wire in a format, of 8 bits with its scale."""
    size = int(np.prod(array.shape))
    return size * _BYTES[form] + (4 if form.startswith("float8") else 0) if floats(array) else int(array.nbytes)


@dataclasses.dataclass(frozen=True)
class Emulated:
    """The arithmetic of a device, for `interpreted`."""

    precision: Precision

    def enter(self, value: Any, aval: Any) -> Any:
        return self._settled(jnp.asarray(value, jnp.float32), aval) if floats(aval) else value

    def leaf(self, eqn: Any, given: Sequence[Any]) -> list[Any]:
        p = self.precision
        if eqn.primitive.name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
            given = [scaled(x, p.multiply) if floats(v.aval) else x for x, v in zip(given, eqn.invars, strict=True)]
            if eqn.primitive.name == "dot_general" and p.accumulate != "float32" and floats(eqn.outvars[0].aval):
                return [self._settled(_summed(eqn.params, given, p.accumulate), eqn.outvars[0].aval)]
        out = lifted(eqn, given, jnp.float32)
        return [self._settled(x, v.aval) if floats(v.aval) else x for x, v in zip(out, eqn.outvars, strict=True)]

    def _settled(self, x: Any, aval: Any) -> Any:
        """A result as the device keeps it."""
        if aval.dtype.itemsize >= 4:
            return x
        if self.precision.result == "program" and str(aval.dtype).startswith("float8_e4m3"):
            return rounded(x, self.precision.float8)
        return x.astype(aval.dtype).astype(jnp.float32) if self.precision.result == "program" else rounded(x, self.precision.result)


def _summed(params: Mapping[str, Any], given: Sequence[Any], form: str) -> Any:
    """A contraction whose sum is rounded to a format after every `_CHUNK` products of its first contracted dimension."""
    (left, right), batch = params["dimension_numbers"]
    size, total = given[0].shape[left[0]], None
    for start in range(0, size, _CHUNK):
        a, b = (jax.lax.slice_in_dim(x, start, min(start + _CHUNK, size), axis=dims[0]) for x, dims in zip(given, (left, right), strict=True))
        made = jax.lax.dot_general(a, b, dimension_numbers=((left, right), batch), preferred_element_type=jnp.float32)
        total = rounded(made, form) if total is None else rounded(total + rounded(made, form), form)
    return total


def targeted(jaxpr: Any, precision: Precision) -> Any:
    """A stage's jaxpr as a function that computes it in a device's arithmetic, and gives values in the program's types."""
    run = interpreted(jaxpr, Emulated(precision))
    types = [v.aval for v in _jax.body_of(jaxpr).outvars]

    def fn(*args: Any) -> list[Any]:
        return [x.astype(t.dtype) if floats(t) else x for x, t in zip(run(*args), types, strict=True)]

    return fn
