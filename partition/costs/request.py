"""What of a request decides how long ops take beyond their shapes: which phase they are in, how much of a cache is in use, buckets.

A cache is as long as its array; attention pays for the positions that are written. Until the program tells how many (by what prefill writes
into it), it pays for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

from partition.graph import Graph, Op
from partition.hardware import Systolic

_WRITES = {"dynamic_update_slice": 1, "scatter": 2, "pad": -1}
"""Primitives that put fewer positions into an array of more: which operand holds them (-1: the only one, and the result is the array)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """prefill, decode: op ids of either phase. batch: prompts together. written: length of a cache -> positions that prefill writes of it.

    trips: tokens that are decoded.
    """

    prefill: Collection[int] = ()
    decode: Collection[int] = ()
    batch: int = 1
    written: Mapping[int, int] = dataclasses.field(default_factory=dict)
    trips: int = 0

    def turns(self, op: Op, chip: Systolic | None) -> float:
        """How often a chip runs an op of prefill that takes fewer prompts at once."""
        return max(1.0, self.batch / float(chip.prefill_batch)) if chip is not None and op.id in self.prefill else 1.0

    def padding(self, op: Op, chip: Systolic | None) -> float:
        """By how much a chip pads the prompts of an op of prefill, to the next bucket."""
        prompt = max(self.written.values(), default=0)
        return bucket(prompt, chip) / prompt if chip is not None and prompt and op.id in self.prefill else 1.0

    def used(self, op: Op, keys: float, chip: Systolic | None) -> float:
        """The share of the keys of an attention of decode that are in use: on the mean of all trips, or all trips' bucket where a chip has some."""
        if op.id not in self.decode or keys not in self.written:
            return 1.0
        longest = self.written[int(keys)] + self.trips
        live = bucket(longest, chip) if chip is not None else longest - (self.trips - 1) / 2
        return min(1.0, live / keys)


def bucket(length: int, chip: Systolic) -> float:
    """The length that a chip's compiled shape has for `length` tokens: the bucket's granule times a power of two."""
    granule = float(chip.bucket)
    return granule * 2.0 ** max(0, math.ceil(math.log2(length / granule))) if length > 0 else granule


def written(graph: Graph, prefill: Collection[int]) -> dict[int, int]:
    """Length of an array -> the most positions that an op of prefill writes into one so long, where it writes fewer along one dimension."""
    found: dict[int, int] = {}
    for op in graph.walk():
        if op.id not in prefill or op.primitive not in _WRITES:
            continue
        at = _WRITES[op.primitive]
        into = graph.tensors[op.outputs[0]].shape
        new = graph.tensors[op.inputs[0 if at < 0 else at]].shape
        unlike = [d for d in range(len(into)) if into[d] != new[d]] if len(into) == len(new) else []
        if len(unlike) == 1 and new[unlike[0]] < into[unlike[0]]:
            length = int(into[unlike[0]])
            found[length] = max(found.get(length, 0), int(new[unlike[0]]))
    return found
