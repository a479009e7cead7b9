"""Calls whose inside the planner does not see: Pallas kernels, FFI targets, host callbacks, custom partitioning.

A Pallas kernel that declares its cost (`cost_estimate=`) is taken at its word. Any other is charged for its traffic, operands and
results once, and one operation an element of its results; a rule of the caller's own says it better: `@partition.rule("ffi_call:target")`
for one FFI target, `@partition.rule("pallas_call")` for all kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

from partition.graph import Op, Tensor
from partition.work import Work, rule


@rule("pallas_call", "ffi_call", "pure_callback", "custom_partitioning", "tpu_custom_call")
def opaque(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """The declared cost, else the traffic of operands and results."""
    declared = op.params.get("cost_estimate")
    dtype = next((t.dtype for t in outs if "float" in t.dtype), "float32")
    if declared is not None:
        return Work(flops={dtype: float(declared.flops)}, read=float(declared.bytes_accessed), contractions=1)
    written = sum(t.nbytes for t in outs)
    return Work(flops={dtype: sum(t.size for t in outs)}, read=sum(t.nbytes for t in ins), written=written, contractions=1)


@rule("all_gather", "all_gather_invariant", "all_to_all", "reduce_scatter", "ppermute", "pbroadcast", "axis_index")
def between_devices(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """A collective inside a shard_map: what it reads and writes on each device. Its wire is the author's mesh, which is not planned."""
    return Work(read=sum(t.nbytes for t in ins), written=sum(t.nbytes for t in outs))
