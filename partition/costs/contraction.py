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

from partition.graph import Graph, Op, Role, Tensor, bodies, itemsize, operands
from partition.sharding.factors import factors
from partition.symbols import first
from partition.work import FUSED

_FAR = 60
"""Ops that may stand between the two contractions of an attention."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contraction:
    """What one device has of it: batch matrices of [rows, inner] x [inner, columns], of elements of `width` bytes.

    Of a contraction with a weight, rows are those of the activation. attention: rows are query tokens, columns key positions, inner the
    width of a head, group the query heads that share a key, masked whether some scores are hidden.
    """

    batch: Any
    rows: Any
    inner: Any
    columns: Any
    width: float
    group: Any = 1
    attention: bool = False
    masked: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Half:
    """What one half of an attention belongs to: the op id of the first half, the key positions, the query tokens of a forward (0: unknown), a mask."""

    first: int
    keys: Any
    tokens: Any
    masked: bool


def derived(graph: Graph, weights: Collection[int]) -> set[int]:
    """Weights, and what ops that ride along make of them alone (a reshape, another dtype, a slice), all levels."""
    import partition.rules  # noqa: F401  (the rules say which ops ride along)

    found = set(weights)

    def level(g: Graph) -> None:
        for op in g.ops:
            given = [t for t in op.inputs if g.tensors[t].role is not Role.LITERAL]
            if op.primitive in FUSED and any(t in found for t in given) and all(t in found or not g.tensors[t].shape for t in given):
                found.update(op.outputs)
            found.update(inner for inner, outer in operands(op) if outer in found)
            for body in bodies(op):
                level(body)

    level(graph)
    return found


def attentions(graph: Graph, weights: Collection[int]) -> dict[int, Half]:
    """Op id of either half of an attention -> what it belongs to, all levels. weights: as `derived` gives them."""
    import partition.rules  # noqa: F401

    found: dict[int, Half] = {}

    def level(g: Graph, tokens: Any) -> None:
        users: dict[int, list[Op]] = {}
        for op in g.ops:
            for t in op.inputs:
                users.setdefault(t, []).append(op)
        dots = [op for op in g.ops if op.primitive == "dot_general"]
        tokens = next((n for op in dots if (n := _tokens(op, g.tensors, weights)) is not None), tokens)
        for op in dots:
            if op.id not in found and not any(t in weights for t in op.inputs):
                second, side, masked = _second(op, g, users, weights)
                if second is not None:
                    contract = second.params["dimension_numbers"][0][side]
                    keys = math.prod(g.tensors[second.inputs[side]].shape[d] for d in contract)
                    found[op.id] = Half(op.id, keys, tokens, masked)
                    found.setdefault(second.id, found[op.id])
        for op in g.ops:
            for body in bodies(op):
                level(body, tokens)

    level(graph, 0)
    return found


def _tokens(op: Op, tensors: Sequence[Tensor], weights: Collection[int]) -> Any:
    """The tokens of a forward, as the last dimension of its own of an activation [batch, tokens, width] that meets a weight; None for other ops."""
    held = [t in weights for t in op.inputs[:2]]
    if held.count(True) != 1:
        return None
    i = held.index(False)
    contract, batch = op.params["dimension_numbers"]
    own = [n for d, n in enumerate(tensors[op.inputs[i]].shape) if d not in (*contract[i], *batch[i])]
    return own[-1] if len(own) > 1 else 1 if own else None


def _second(op: Op, g: Graph, users: Mapping[int, list[Op]], weights: Collection[int]) -> tuple[Op | None, int, bool]:
    """The contraction that the scores of `op` reach with their size, as which of its operands, and whether an op on the way hides some."""
    tensors = g.tensors
    size, queue, seen, masked = first(tensors[op.outputs[0]].size), list(op.outputs), set[int](), False
    while queue and len(seen) < _FAR:
        t = queue.pop(0)
        for user in users.get(t, ()):
            if user.id in seen:
                continue
            seen.add(user.id)
            if user.primitive == "dot_general" and not any(i in weights for i in user.inputs):
                return user, user.inputs.index(t), masked
            if user.primitive in FUSED and first(tensors[user.outputs[0]].size) == size:
                others = [i for i in user.inputs if i != t]
                masked |= user.primitive == "select_n" or (user.primitive == "add" and not any(_learned(i, g, weights) for i in others))
                queue += user.outputs
    return None, 0, False


def _learned(t: int, g: Graph, weights: Collection[int]) -> bool:
    """Whether a tensor is computed from weights, or comes from another level: a bias, no mask."""
    queue, seen = [t], set[int]()
    while queue and len(seen) < _FAR:
        t = queue.pop()
        if t in weights:
            return True
        if (op := g.producer.get(t)) is not None and op.id not in seen:
            seen.add(op.id)
            queue += op.inputs
    return False


def contraction(op: Op, tensors: Sequence[Tensor], weights: Collection[int], along: Sequence[int], ways: float) -> Contraction:
    """The share of a dot_general that one device has, whose work is split `ways` ways along some factors."""
    rule = factors(op, tensors)
    sizes: list[Any] = list(rule.sizes)
    left: Any = ways
    for f in along:
        take = np.minimum(left, np.maximum(sizes[f], 1))
        sizes[f], left = sizes[f] / take, left / take
    a, b = (math.prod(sizes[f] for f in rule.own(i)) for i in (0, 1))
    held = [t in weights for t in op.inputs[:2]]
    rows, columns = (b, a) if held == [True, False] else (a, b)
    return Contraction(
        batch=math.prod(sizes[f] for f in rule.batch), rows=rows, columns=columns, inner=math.prod(sizes[f] for f in rule.summed),
        width=itemsize(tensors[op.inputs[0]].dtype),
    )  # fmt: skip


def scores(op: Op, tensors: Sequence[Tensor], weights: Collection[int], along: Sequence[int], ways: float, half: Half) -> Contraction:
    """The attention whose first half is `op`, as one device has it."""
    whole, rule = contraction(op, tensors, weights, along, ways), factors(op, tensors)
    sides = [[rule.sizes[f] for f in rule.own(i)] for i in (0, 1)]
    match = [first(math.prod(side)) == first(half.keys) for side in sides]
    keys_first = match[0] and (not match[1] or len(sides[0]) < len(sides[1]))  # where both are as many, the keys are one dimension
    rows, columns = (whole.columns, whole.rows) if keys_first else (whole.rows, whole.columns)
    queries = math.prod(sides[1] if keys_first else sides[0])
    known = first(half.tokens) and first(queries) % first(half.tokens) == 0
    tokens = half.tokens if known else max(sides[1] if keys_first else sides[0], key=first, default=1)
    group = queries / tokens
    left = queries / np.maximum(rows, 1e-9)  # what splitting took of the queries: heads before tokens
    taken = np.minimum(left, group)
    return dataclasses.replace(whole, rows=tokens * taken / left, columns=columns, group=group / taken, attention=True, masked=half.masked)
