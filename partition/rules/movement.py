"""Ops that move or re-index: broadcasts and reshapes ride along; gathers, scatters and in-place updates move what they touch."""

from __future__ import annotations

from collections.abc import Sequence

from partition.graph import Op, Tensor
from partition.work import Work, rule


@rule(
    "bitcast_convert_type", "broadcast_in_dim", "concatenate", "dynamic_slice", "empty", "expand_dims", "iota", "pad", "reshape",
    "rev", "slice", "split", "squeeze", "stack", "tile", "transpose", "unstack", "create_token", "device_put",
    fused=True,
)  # fmt: skip
def view(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """Indexing that the neighbour's loads and stores carry out."""
    return Work()


@rule("gather")
def gather(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """Reads the rows that it takes, not the table."""
    return Work(read=outs[0].nbytes + ins[1].nbytes, written=outs[0].nbytes)


@rule("dynamic_update_slice")
def dynamic_update_slice(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """Writes the update in place."""
    return Work(read=ins[1].nbytes, written=ins[1].nbytes)


@rule("scatter", "scatter-add", "scatter_add", "scatter-sub", "scatter-mul", "scatter_mul", "scatter-min", "scatter_min", "scatter-max", "scatter_max")
def scatter(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """Writes the updates in place; a combining scatter reads what was there and computes."""
    update, combines = ins[2], op.primitive != "scatter"
    flops = {update.dtype: update.size} if combines and "float" in update.dtype else {}
    return Work(flops=flops, read=update.nbytes * (2 if combines else 1) + ins[1].nbytes, written=update.nbytes)
