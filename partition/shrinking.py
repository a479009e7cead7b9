"""A plan carried over to a sibling of its model: the same structure with small widths, cut at the same places, so that a laptop can run it.

Blocks are carried op by op. What a sibling cannot show is what its widths do not divide into, and what only large numbers bring.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from partition.coarsen import Block
from partition.errors import PlacementError
from partition.graph import Graph
from partition.phases import Phases


def carried(blocks: Sequence[Block], phases: Phases | None, ours: Graph) -> tuple[Block, ...]:
    """The blocks of one program (of these phases) with the ops of another in them. Raises PlacementError where it is not of the same structure, or was loaded."""
    if phases is None:
        raise PlacementError("a loaded problem has no program whose ops could be told", where="carrying a plan over", mend="pose the program again")
    one, other = {op.id: op for op in phases.program.graph.walk()}, {op.id: op for op in ours.walk()}
    for op in one.values():
        mine = other.get(op.id)
        if mine is None or mine.primitive != op.primitive or mine.scope != op.scope or len(mine.inputs) != len(op.inputs):
            has = "nothing" if mine is None else f"{mine.primitive} in {mine.scope or 'the top scope'}"
            raise PlacementError(f"op {op.id} is {op.primitive} in {op.scope or 'the top scope'}, the sibling has {has}", where="carrying a plan over", mend="shrink widths only: layers, heads and options stay")
    if len(one) != len(other):
        raise PlacementError(f"the sibling has {len(other)} ops, the program {len(one)}", where="carrying a plan over", mend="shrink widths only: layers, heads and options stay")
    return tuple(dataclasses.replace(b, items=tuple((other[op.id], span) for op, span in b.items)) for b in blocks)
