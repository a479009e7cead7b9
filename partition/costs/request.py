"""What of a request decides how long ops take beyond their shapes: which phase they are in, how much of a cache is in use, buckets.

A cache is as long as its array; attention pays for the positions that are written. Until the program tells how many (by what prefill writes
into it), it pays for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from partition.graph import Graph, Op
from partition.hardware import Systolic
from partition.symbols import first

_WRITES = {"dynamic_update_slice": 1, "scatter": 2, "pad": -1}
"""Primitives that put fewer positions into an array of more: which operand holds them (-1: the only one, and the result is the array)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """prefill, decode: op ids of either phase. batch: prompts together. written: length of a cache -> positions that prefill writes of it.

    trips: tokens that are decoded.
    """

    prefill: Collection[int] = ()
    decode: Collection[int] = ()
    batch: Any = 1
    written: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    trips: int = 0

    def turns(self, chip: Systolic | None) -> Any:
        """How often a chip runs the ops of prefill that takes fewer prompts at once."""
        return np.maximum(1.0, self.batch / float(chip.prefill_batch)) if chip is not None else 1.0

    def padding(self, chip: Systolic | None) -> Any:
        """By how much a chip pads prompts, to the next bucket."""
        if chip is None or not self.written:
            return 1.0
        prompt = self.written[max(self.written, key=lambda length: first(self.written[length]))]
        return bucket(prompt, chip) / prompt

    def used(self, op: Op, keys: Any, chip: Systolic | None) -> Any:
        """The share of the keys of an attention of decode that are in use: on the mean of all trips, or all trips' bucket where a chip has some."""
        if op.id not in self.decode or first(keys) not in self.written:
            return 1.0
        longest = self.written[int(first(keys))] + self.trips
        live = bucket(longest, chip) if chip is not None else longest - (self.trips - 1) / 2
        return np.minimum(1.0, live / keys)


def bucket(length: Any, chip: Systolic) -> Any:
    """The length that a chip's compiled shape has for `length` tokens: the bucket's granule times a power of two."""
    granule = float(chip.bucket)
    return granule * 2.0 ** np.maximum(0.0, np.ceil(np.log2(np.maximum(length, 1) / granule)))


def written(graph: Graph, prefill: Collection[int]) -> dict[int, Any]:
    """Length of an array -> the most positions that an op of prefill writes into one so long, where it writes fewer along one dimension."""
    found: dict[int, Any] = {}
    for op in graph.walk():
        if op.id not in prefill or op.primitive not in _WRITES:
            continue
        at = _WRITES[op.primitive]
        into = graph.tensors[op.outputs[0]].shape
        new = graph.tensors[op.inputs[0 if at < 0 else at]].shape
        unlike = [d for d in range(len(into)) if first(into[d]) != first(new[d])] if len(into) == len(new) else []
        if len(unlike) == 1 and first(new[unlike[0]]) < first(into[unlike[0]]):
            length = int(first(into[unlike[0]]))
            found[length] = max(found.get(length, 0), new[unlike[0]], key=first)
    return found
