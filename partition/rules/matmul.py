"""Contractions: a multiply and an add count two operations; operands are read and results written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from partition.graph import Op, Tensor
from partition.work import Work, rule


def _arithmetic(dtype: str) -> str:
    """The dtype whose peak a contraction runs at: index arithmetic in wide integers keeps the lanes busy that float32 would."""
    if dtype.startswith("complex"):
        return "float32" if dtype == "complex64" else "float64"
    return "float32" if dtype in ("int32", "uint32", "int64", "uint64", "bool") else dtype


def _work(flops: float, ins: Sequence[Tensor], outs: Sequence[Tensor], rows: float = 0) -> Work:
    flops = flops * (4 if ins[0].dtype.startswith("complex") else 1)  # a product of complex numbers is four of real ones
    return Work(flops={_arithmetic(ins[0].dtype): flops}, read=sum(t.nbytes for t in ins), written=outs[0].nbytes, contractions=1, rows=rows, macs=flops / 2)


@rule("dot_general")
def dot_general(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """2 x result size x contracted size, of complex numbers four times that."""
    ((contract, _), _) = op.params["dimension_numbers"]
    return _work(2 * outs[0].size * math.prod(ins[0].shape[d] for d in contract), ins, outs)


@rule("ragged_dot_general")
def ragged_dot_general(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """Every row meets the weights of its own group alone; where the rows are contracted, each is counted for its group once.

    Fewer rows than groups read at most a group each: one decoded token reads the weights of the experts that it is sent to.
    """
    numbers = op.params["ragged_dot_dimension_numbers"]
    ((contract, _), _) = numbers.dot_dimension_numbers
    by_rows = set(numbers.lhs_ragged_dimensions) & set(contract)
    groups = ins[2].shape[-1]
    flops = 2 * outs[0].size * math.prod(ins[0].shape[d] for d in contract) / (groups if by_rows else 1)
    rows = math.prod(ins[0].shape[d] for d in numbers.lhs_ragged_dimensions)
    share = np.minimum(1.0, rows / groups) if numbers.rhs_group_dimensions else 1.0
    read = ins[0].nbytes + ins[1].nbytes * share + sum(t.nbytes for t in ins[2:])
    return Work(flops={_arithmetic(ins[0].dtype): flops}, read=read, written=outs[0].nbytes, contractions=1, rows=rows, macs=flops / 2)


@rule("conv_general_dilated")
def conv(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """2 x result size x kernel size of one output feature."""
    spec = op.params["dimension_numbers"].rhs_spec
    kernel = math.prod(ins[1].shape[d] for d in spec[1:])
    return _work(2 * outs[0].size * kernel, ins, outs, rows=outs[0].size / outs[0].shape[op.params["dimension_numbers"].out_spec[1]])
