"""In how many pieces a dimension is split over equal devices, and over how many of them that spreads the work.

A dimension that the devices divide is split in one piece a device. One that is smaller has a piece an entry, each held by several devices.
One that they do not divide keeps its entries as pieces, and some devices have one more than others: 40 heads on 24 devices are two on 16
of them and one on the others, which wait.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from partition.sharding.factors import Dims

Split = tuple[tuple[int, ...], int]
"""(dimensions that are split, major first; pieces over all of them)."""

_FINE = 32
"""A dimension with this many entries a device or more counts as divided: at most one in 32 is padding."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pieces:
    """What `degree` devices make of a dimension."""

    degree: int

    def of(self, size: int) -> int:
        """The pieces of a dimension of some size."""
        return self.degree if size % self.degree == 0 or size >= _FINE * self.degree else size

    def spread(self, pieces: int) -> float:
        """Over how many devices the work is spread: all pieces, over those of the fullest device."""
        return pieces / math.ceil(pieces / self.degree) if pieces > 1 else 1.0

    def fits(self, sizes: Sequence[int], pieces: int) -> int | None:
        """How many of some factors, major first, a split in so many pieces takes; None where it would tear one."""
        before = 1
        for n, size in enumerate(sizes):
            left = pieces // before
            if pieces % before == 0 and (size % left == 0 or size >= _FINE * left):
                return n + 1
            before *= size
        return None

    def leading(self, dims: Dims, sizes: Sequence[int], split: Split | None) -> tuple[int, ...] | None:
        """The factors that a split of a tensor splits; None where it is whole or its split fits no factors."""
        if split is None or any(d >= len(dims) or not dims[d] for d in split[0]):
            return None
        found = [f for d in split[0] for f in dims[d]]
        taken = self.fits([sizes[f] for f in found], split[1])
        return None if taken is None else tuple(found[:taken])

    def place(self, dims: Dims, sizes: Sequence[int], factors: Sequence[int], pieces: int) -> Split | None:
        """How a tensor lies when factors are split: along those that it has, from the first; whole where it lacks the first, or they do not lead."""
        where = {f: d for d, fs in enumerate(dims) for f in fs}
        has = []
        for f in factors:
            if f not in where:
                break
            has.append(f)
        over = tuple(dict.fromkeys(where[f] for f in has))
        if not has or [f for d in over for f in dims[d]][: len(has)] != has:
            return None
        if len(has) < len(factors):
            pieces = self.of(math.prod(sizes[f] for f in has))
        return (over, pieces) if pieces > 1 else None
