"""Elementwise ops: one operation an element of the result, fused with their neighbours, so no traffic of their own."""

from __future__ import annotations

from collections.abc import Sequence

from partition.graph import Op, Tensor
from partition.work import Work, rule


@rule(
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp", "cos",
    "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "log2", "logistic", "lt", "max", "min", "mul", "ne", "neg",
    "nextafter", "not", "or", "population_count", "clz", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh",
    "xor", "real", "imag", "complex", "conj", "convert_element_type", "polygamma", "zeta", "bessel_i0e", "bessel_i1e", "igamma_grad_a",
    "random_gamma_grad", "regularized_incomplete_beta", "eq_to", "le_to", "lt_to", "mulhi", "one_minus_square",
    fused=True,
)  # fmt: skip
def elementwise(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """One operation an element; integer and boolean work is not floating-point and counts none."""
    t = ins[0] if op.primitive == "convert_element_type" or "float" not in outs[0].dtype else outs[0]
    return Work(flops={t.dtype: outs[0].size}) if "float" in t.dtype else Work()


@rule("polynomial", fused=True)
def polynomial(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """Horner's scheme: a multiply and an add an element for each operand but the argument."""
    return Work(flops={outs[0].dtype: 2 * max(len(ins) - 2, 1) * outs[0].size})


@rule("dim_as_value", "copy", "copy_p", "stop_gradient", "optimization_barrier", "sharding_constraint", "pvary", "mesh_cast", "reshard", "name", fused=True)
def nothing(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """Neither computes nor moves: a note to the compiler."""
    return Work()
