"""A plan carried over to a sibling of its model: the same structure with small widths, cut at the same places, so that a laptop can run it.

Blocks are carried op by op, and how tensors are split with them. What a sibling cannot show is what its widths do not divide into, and what only large numbers bring.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from partition.coarsen import Block
from partition.errors import PlacementError
from partition.graph import Graph
from partition.phases import Phases
from partition.sharding import Layout, narrowed

if TYPE_CHECKING:
    from partition.problem import Problem

TOLD = 5
"""How many kinds of weights are named that a sibling splits otherwise."""


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


def split_alike(full: Problem, small: Problem) -> tuple[Layout, ...]:
    """The layouts of a sibling on each mesh: its tensors are split along the dimensions in which the whole model's are."""
    assert full.phases is not None and small.phases is not None
    whole, ours = full.phases.program.graph.tensors, small.phases.program.graph.tensors
    made: dict[int, Layout] = {}  # meshes that are alike share a layout
    for layout in full.layouts:
        tensors = {t: split for t, split in layout.tensors.items() if t < len(ours) and len(ours[t].shape) == len(whole[t].shape)}
        made.setdefault(id(layout), dataclasses.replace(layout, tensors=tensors))
    return tuple(made[id(layout)] for layout in full.layouts)


def undivided(full: Problem, small: Problem) -> tuple[str, ...]:
    """What is split otherwise than at full width on the devices that stand for each mesh, as where a small width does not divide: weights by name, layers taken together."""
    assert full.phases is not None and small.phases is not None and full.cluster is not None
    whole, ours = full.phases.program.graph, small.phases.program.graph
    kinds, others = collections.Counter[str](), 0
    for mesh, a, b in zip(full.cluster.meshes, full.layouts, small.layouts, strict=True):
        want, got = narrowed(a, whole, mesh.stand_in).tensors, narrowed(b, ours, mesh.stand_in).tensors
        for t in want.keys() | got.keys():
            if want.get(t) != got.get(t):
                name = re.sub(r"\d+", "*", whole.tensors[t].name or "")
                kinds[f"{name} on {mesh.name}: {want.get(t, ((), 1))[1]} ways at full width, {got.get(t, ((), 1))[1]} in the sibling"] += bool(name)
                others += not name
    told = [f"{kind} ({n} of them)" for kind, n in kinds.most_common(TOLD) if n]
    return (*told, *([f"{others} values between ops are split otherwise at full width"] if others else []))
