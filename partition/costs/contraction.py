"""A contraction as a machine sees it: the sizes that one device has of it, and whether it is half of an attention.

An attention is a contraction of two activations (queries with keys) whose result reaches, through ops that ride along, another one (with
values). A machine runs both as one kernel; each is charged half of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from partition.graph import Graph, Op, Tensor, bodies, itemsize
from partition.sharding.factors import Factors, factors
from partition.symbols import first
from partition.work import FUSED

_FAR = 60
"""Ops that may stand between the two contractions of an attention."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contraction:
    """What one device has of it: batch matrices of [rows, inner] x [inner, columns], of elements of `width` bytes.

    Of a contraction with a weight, rows are those of the activation. heads: of the batch, those that devices or cores share. attention:
    rows are query tokens, columns key positions, inner the width of a head, group the query heads that share a key, masked whether some
    scores are hidden.
    """

    batch: Any
    rows: Any
    inner: Any
    columns: Any
    width: float
    heads: Any = 1
    group: Any = 1
    attention: bool = False
    masked: bool = False


def attentions(graph: Graph, weights: Collection[int]) -> dict[int, tuple[int, bool]]:
    """Op id of either half of an attention -> (op id of the first half, whether its scores are masked), all levels."""
    import partition.rules  # noqa: F401  (the rules say which ops ride along)

    found: dict[int, tuple[int, bool]] = {}

    def level(g: Graph) -> None:
        users: dict[int, list[Op]] = {}
        for op in g.ops:
            for t in op.inputs:
                users.setdefault(t, []).append(op)
        for op in g.ops:
            if op.primitive == "dot_general" and op.id not in found and not any(t in weights for t in op.inputs):
                second, masked = _second(op, users, g.tensors, weights)
                if second is not None and second.id not in found:
                    found[op.id] = found[second.id] = (op.id, masked)
            for body in bodies(op):
                level(body)

    level(graph)
    return found


def _second(op: Op, users: Mapping[int, list[Op]], tensors: Sequence[Tensor], weights: Collection[int]) -> tuple[Op | None, bool]:
    """The contraction that the scores of `op` reach with their size, and whether one op on the way hides some."""
    size, queue, seen, masked = first(tensors[op.outputs[0]].size), list(op.outputs), set[int](), False
    while queue and len(seen) < _FAR:
        for user in users.get(queue.pop(0), ()):
            if user.id in seen:
                continue
            seen.add(user.id)
            if user.primitive == "dot_general" and not any(t in weights for t in user.inputs):
                return user, masked
            if user.primitive in FUSED and first(tensors[user.outputs[0]].size) == size:
                masked |= user.primitive in ("select_n", "add")
                queue += user.outputs
    return None, masked


def contraction(op: Op, tensors: Sequence[Tensor], weights: Collection[int], along: Sequence[int], ways: float) -> Contraction:
    """The share of a dot_general that one device has, whose work is split `ways` ways along some factors."""
    rule = factors(op, tensors)
    sizes: list[Any] = list(rule.sizes)
    left: Any = ways
    for f in along:
        take = np.minimum(left, np.maximum(sizes[f], 1))
        sizes[f], left = sizes[f] / take, left / take
    sides = [[f for fs in rule.ins[i] for f in fs if f not in rule.batch and f not in rule.summed] for i in (0, 1)]
    a, b = (math.prod(sizes[f] for f in side) for side in sides)
    held = [t in weights for t in op.inputs[:2]]
    swap = held == [True, False] or (held[0] == held[1] and _keys_first(rule, sides))
    rows, columns = (b, a) if swap else (a, b)
    mine = [f for f in along if f in rule.batch]
    return Contraction(
        batch=math.prod(sizes[f] for f in rule.batch), rows=rows, columns=columns, inner=math.prod(sizes[f] for f in rule.summed),
        width=itemsize(tensors[op.inputs[0]].dtype), heads=math.prod(sizes[f] for f in mine) if mine else 1,
    )  # fmt: skip


def _keys_first(rule: Factors, sides: Sequence[Sequence[int]]) -> bool:
    """Whether the first operand holds the keys: it has one dimension of its own, the other more; or the longer one."""
    counts = [sum(1 for f in side if first(rule.sizes[f]) > 1) for side in sides]
    longest = [max((first(rule.sizes[f]) for f in side), default=1) for side in sides]
    return counts[0] < counts[1] if min(counts) >= 1 and counts[0] != counts[1] else longest[0] > longest[1]


def scores(op: Op, tensors: Sequence[Tensor], weights: Collection[int], along: Sequence[int], ways: float, masked: bool) -> Contraction:
    """The attention whose first half is `op`, as one device has it."""
    whole, rule = contraction(op, tensors, weights, along, ways), factors(op, tensors)
    sides = [[f for fs in rule.ins[i] for f in fs if f not in rule.batch and f not in rule.summed] for i in (0, 1)]
    own = sorted((rule.sizes[f] for f in (sides[1] if _keys_first(rule, sides) else sides[0])), key=first) or [1]
    tokens = own[-1] if first(own[-1]) > 256 or first(own[-1] * 4) >= first(whole.columns) else own[0]  # many, or as many as keys: tokens; else heads that share a key
    group = math.prod(own) / tokens
    left = math.prod(own) / np.maximum(whole.rows, 1e-9)  # what splitting took of the queries: heads before tokens
    taken = np.minimum(left, group)
    heads = math.prod(rule.sizes[f] for f in along) / ways if along and along[0] in rule.batch else whole.batch * group
    return dataclasses.replace(whole, rows=tokens * taken / left, group=group / taken, heads=heads, attention=True, masked=masked)
