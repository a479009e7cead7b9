"""Reductions (fused: one operation an element read), sorts and cumulative ops (which go through memory)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from partition.graph import Op, Tensor
from partition.work import Work, rule


@rule(
    "argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum", "reduce_xor", "reduce",
    "psum", "pmax", "pmin", "psum_invariant",
    fused=True,
)  # fmt: skip
def reduction(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """One operation an element of the operands."""
    return Work(flops={ins[0].dtype: ins[0].size}) if "float" in ins[0].dtype else Work()


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min", "select_and_scatter_add")
def cumulative(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """One operation an element, through memory once each way."""
    flops = {ins[0].dtype: ins[0].size} if "float" in ins[0].dtype else {}
    return Work(flops=flops, read=sum(t.nbytes for t in ins), written=sum(t.nbytes for t in outs))


@rule("fft")
def fft(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """5 n log2 n real operations a transform of n places (Cooley and Tukey, 1965), through memory once each way."""
    n = math.prod(op.params["fft_lengths"])
    return Work(flops={"float32": 5 * outs[0].size * max(math.log2(n), 1.0)}, read=ins[0].nbytes, written=outs[0].nbytes)


def _comparisons(op: Op, t: Tensor) -> int:
    """log2 of the length of the dimension that is sorted."""
    length = t.shape[op.params.get("dimension", op.params.get("axis", -1))] if t.shape else 1
    return math.ceil(math.log2(length)) if isinstance(length, int) and length > 1 else 1


@rule("sort", "top_k", "approx_top_k")
def sort(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """n log2 n comparisons along the sorted dimension; every operand through memory once each way."""
    depth = _comparisons(op, ins[0])
    flops = {ins[0].dtype: ins[0].size * depth} if "float" in ins[0].dtype else {}
    return Work(flops=flops, read=sum(t.nbytes for t in ins), written=sum(t.nbytes for t in outs))


@rule("SearchSorted", "searchsorted")
def search(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """log2 n comparisons for each value that is looked for; what is searched lies in memory."""
    return Work(flops={ins[0].dtype: outs[0].size * _comparisons(op, ins[0])} if "float" in ins[0].dtype else {}, read=ins[0].nbytes + ins[1].nbytes, written=outs[0].nbytes)
