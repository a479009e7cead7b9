"""Random numbers: integer work on the vector units (no floating-point operations); the bits are written once."""

from __future__ import annotations

from collections.abc import Sequence

from partition.graph import Op, Tensor
from partition.work import Work, rule


@rule("threefry2x32", "random_bits", "random_fold_in", "random_seed", "random_split", "rng_bit_generator", "random_gamma")
def bits(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """Reads the keys, writes the bits."""
    return Work(read=sum(t.nbytes for t in ins), written=sum(t.nbytes for t in outs))


@rule("random_wrap", "random_unwrap", "random_clone", fused=True)
def wrap(op: Op, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> Work:
    """Another view of the same words."""
    return Work()
