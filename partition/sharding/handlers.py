"""How each family of primitives carries a split from its operands to its results, and which collective that takes.

A handler is given the pass and the op: it settles weights that are not decided yet, charges collectives, and puts the results' split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from partition.graph import Op, Tensor

if TYPE_CHECKING:
    from partition.sharding import Pass

Split = tuple[int, int]  # (dimension, ways)

_SAME = frozenset({"convert_element_type", "copy", "stop_gradient", "optimization_barrier", "reduce_precision"})


def handler(op: Op, tensors: Sequence[Tensor]) -> Callable[[Pass, Op], None]:
    """The handler of a primitive; of an unknown one, by whether it works element by element."""
    return HANDLERS.get(op.primitive, _elementwise if _alike(op, tensors) else _replicate)


def _alike(op: Op, tensors: Sequence[Tensor]) -> bool:
    """Whether an op works element by element: operands are scalars or have the result's dimensions, some of them 1."""
    shape = tensors[op.outputs[0]].shape
    return len(op.outputs) == 1 and bool(shape) and bool(op.inputs) and all(_fits(tensors[t].shape, shape) for t in op.inputs)


def _fits(small: tuple[Any, ...], shape: tuple[Any, ...]) -> bool:
    return small == () or (len(small) == len(shape) and all(a in (1, b) for a, b in zip(small, shape, strict=True)))


def _replicate(p: Pass, op: Op) -> None:
    for t in op.inputs:
        if p.undecided(t):
            p.decide(t, None)
        p.gather(op, t)
    p.put(op, None)


def _elementwise(p: Pass, op: Op) -> None:
    if op.primitive in _SAME and op.inputs[0] in p.root:  # a weight under another dtype is that weight
        p.root[op.outputs[0]], p.view[op.outputs[0]] = p.root[op.inputs[0]], p.dims(op.inputs[0])
        return
    best: Split | None = None
    source: int | None = None
    for t in op.inputs:
        if p.undecided(t):
            p.decide(t, None)
        s = p.of(t)
        if s is not None and (source is None or p.tensors[t].nbytes > p.tensors[source].nbytes):
            best, source = s, t
    for t in op.inputs:
        s = p.of(t)
        if s is not None and best is not None and s[0] != best[0]:
            p.gather(op, t)
    p.put(op, best, source)


def _dot(p: Pass, op: Op) -> None:
    (contract, batch) = op.params["dimension_numbers"]
    sides = list(op.inputs[:2])
    ranks = [len(p.tensors[t].shape) for t in sides]
    free = [[d for d in range(ranks[i]) if d not in contract[i] and d not in batch[i]] for i in (0, 1)]
    for i in (0, 1):
        if p.undecided(sides[i]):
            other = p.of(sides[1 - i])
            last = _ends_branch(p, op)
            _decide_weight(p, sides[i], other, contract[i], batch[i], free[i], contract[1 - i], batch[1 - i], last)
    splits = [p.of(t) for t in sides]
    out = p.tensors[op.outputs[0]]
    joint: dict[tuple[str, int], int] = {}
    for i in (0, 1):
        if (s := splits[i]) is not None:
            for kind, dims in (("contract", contract[i]), ("batch", batch[i])):
                if s[0] in dims:
                    key = (kind, tuple(dims).index(s[0]))
                    joint[key] = max(joint.get(key, 1), s[1])
    if joint:
        (kind, j), ways = max(joint.items(), key=lambda item: (item[1], item[0]))
        for i in (0, 1):
            dims = contract[i] if kind == "contract" else batch[i]
            s = splits[i]
            if s is not None and s[0] != dims[j]:
                p.gather(op, sides[i])
        if kind == "contract":
            p.put(op, None)
            p.ways[op.id] = ways
            p.charge(op, "all_reduce", out.nbytes, ways)
        else:
            p.put(op, (j, ways), sides[0])
        return
    if all(s is not None for s in splits):  # both split along free dimensions: the smaller is gathered
        small = min((0, 1), key=lambda i: p.tensors[sides[i]].nbytes)
        p.gather(op, sides[small])
        splits[small] = None
    for i in (0, 1):
        if (s := splits[i]) is not None:
            place = len(batch[0]) + (len(free[0]) if i else 0) + free[i].index(s[0])
            p.put(op, (place, s[1]), sides[i])
            if sides[i] in p.root:
                p.columns[op.outputs[0]] = p.root[sides[i]]
            return
    p.put(op, None)


def _ends_branch(p: Pass, op: Op) -> bool:
    """Whether a result is added to another activation (a residual): there it must be whole, so one all-reduce serves best."""
    out = op.outputs[0]
    for _ in range(2):  # a change of dtype may stand between
        users = p.users.get(out, ())
        for user in users:
            others = [t for t in user.inputs if t != out]
            if user.primitive == "add" and others and p.tensors[others[0]].shape == p.tensors[out].shape:
                return p.makers.get(others[0]) != "broadcast_in_dim"
        if len(users) != 1 or users[0].primitive not in _SAME:
            return False
        out = users[0].outputs[0]
    return False


def _decide_weight(
    p: Pass, t: int, other: Split | None, contract: Sequence[int], batch: Sequence[int], free: Sequence[int],
    other_contract: Sequence[int], other_batch: Sequence[int], last: bool,
) -> None:  # fmt: skip
    """Split a weight as its other operand asks; after a replicated one by columns, or by rows where a branch ends (`last`)."""
    shape = p.tensors[t].shape
    if other is not None and other[0] in other_contract:
        p.decide(t, contract[list(other_contract).index(other[0])])
    elif other is not None and other[0] in other_batch:
        p.decide(t, batch[list(other_batch).index(other[0])])
    elif other is not None:
        p.decide(t, None)
    else:
        for dims in (contract, free) if last else (free, contract):
            able = [d for d in dims if math.gcd(shape[d], p.caps.get(p.root[t], p.degree)) > 1]
            if able:
                p.decide(t, max(able, key=lambda d: (math.gcd(shape[d], p.degree), shape[d])))
                return
        p.decide(t, None)


def _reshape(p: Pass, op: Op) -> None:
    t = op.inputs[0]
    s, old, new = p.of(t), p.tensors[t].shape, p.tensors[op.outputs[0]].shape
    if s is None:
        return p.put(op, None)
    before = math.prod(old[: s[0]])
    target = next((d for d in range(len(new)) if math.prod(new[:d]) == before and new[d] > 1), None)
    ways = math.gcd(s[1], new[target]) if target is not None else 1
    if ways < s[1]:
        if t in p.columns:
            p.lowered[p.columns[t]] = min(ways, p.lowered.get(p.columns[t], p.degree))
        else:
            p.gather(op, t)
    p.put(op, (target, ways) if target is not None and ways > 1 else None, t)


def _transpose(p: Pass, op: Op) -> None:
    order, t = tuple(op.params["permutation"]), op.inputs[0]
    if t in p.root:
        p.root[op.outputs[0]], p.view[op.outputs[0]] = p.root[t], tuple(p.dims(t)[d] for d in order)
        return
    s = p.of(t)
    p.put(op, (order.index(s[0]), s[1]) if s else None, t)


def _broadcast(p: Pass, op: Op) -> None:
    t = op.inputs[0] if op.inputs else None
    s = p.of(t) if t is not None else None
    if s is None or t is None:
        return p.put(op, None)
    dim = op.params["broadcast_dimensions"][s[0]]
    p.put(op, (dim, s[1]) if p.tensors[op.outputs[0]].shape[dim] == p.tensors[t].shape[s[0]] else None, t)


def _squeeze(p: Pass, op: Op) -> None:
    s = p.of(op.inputs[0])
    gone = op.params["dimensions"]
    p.put(op, (s[0] - sum(1 for d in gone if d < s[0]), s[1]) if s else None, op.inputs[0])


def _reduce(p: Pass, op: Op) -> None:
    t, axes = op.inputs[0], op.params["axes"]
    s = p.of(t)
    if s is not None and s[0] in axes:
        p.put(op, None)
        p.ways[op.id] = s[1]
        p.charge(op, "all_reduce", p.tensors[op.outputs[0]].nbytes, s[1])
    else:
        p.put(op, (s[0] - sum(1 for a in axes if a < s[0]), s[1]) if s else None, t)


def _along(param: str) -> Callable[[Pass, Op], None]:
    """Ops that need one dimension whole (its number stands in a parameter) and treat the others alike."""

    def handle(p: Pass, op: Op) -> None:
        axis = op.params.get(param, len(p.tensors[op.inputs[0]].shape) - 1)
        kept = [(p.of(t), t) for t in op.inputs]
        best = next(((s, t) for s, t in kept if s is not None and s[0] != axis), None)
        for s, t in kept:
            if s is not None and (best is None or s[0] != best[0][0]):
                p.gather(op, t)
        p.put(op, best[0] if best else None, best[1] if best else None)

    return handle


def _window(p: Pass, op: Op) -> None:
    """Slices, pads, in-place updates: a dimension taken whole keeps its split."""
    t, out = op.inputs[0], p.tensors[op.outputs[0]]
    s, source = p.of(t), t
    if op.primitive == "dynamic_update_slice":
        update = op.inputs[1]
        if s is None and (u := p.of(update)) is not None:
            s, source = u, update
        whole = s is not None and p.tensors[update].shape[s[0]] == out.shape[s[0]]
        if not whole:
            p.gather(op, update)
    else:
        whole = s is not None and p.tensors[t].shape[s[0]] == out.shape[s[0]]
    if s is not None and not whole:
        p.gather(op, t)
    p.put(op, s if whole else None, source)


def _take(p: Pass, op: Op) -> None:
    """A table look-up: the table is split along a dimension that every look-up takes whole, and the rows found are gathered."""
    t = op.inputs[0]
    if p.undecided(t):
        shape, sizes = p.tensors[t].shape, op.params["slice_sizes"]
        able = [d for d in range(len(shape)) if sizes[d] == shape[d] and math.gcd(shape[d], p.degree) > 1]
        p.decide(t, max(able, key=lambda d: shape[d]) if able else None)
    s = p.of(t)
    p.put(op, None)
    if s is not None:
        p.ways[op.id] = s[1]
        p.charge(op, "all_gather", p.tensors[op.outputs[0]].nbytes, s[1])


def _ragged(p: Pass, op: Op) -> None:
    """Rows [m, k] with the matrix [k, n] of their group, of [g, k, n]: columns or rows of every matrix are split alike."""
    x, w = op.inputs[:2]
    plain = len(p.tensors[x].shape) == 2 and len(p.tensors[w].shape) == 3 and w in p.root
    if not plain:
        return _replicate(p, op)
    out = p.tensors[op.outputs[0]]
    for t in op.inputs[2:]:
        p.gather(op, t)
    if p.undecided(w):
        _decide_weight(p, w, p.of(x), [1], [], [2], [1], [], _ends_branch(p, op))
    s, split = p.of(w), p.of(x)
    if s is not None and s[0] == 1:
        if split is not None and split[0] != 1:
            p.gather(op, x)
        p.put(op, None)
        p.ways[op.id] = s[1]
        return p.charge(op, "all_reduce", out.nbytes, s[1])
    if split is not None:
        p.gather(op, x)
    p.put(op, (1, s[1]) if s is not None and s[0] == 2 else None, w)
    if s is not None and s[0] == 2:
        p.columns[op.outputs[0]] = p.root[w]


HANDLERS: dict[str, Callable[[Any, Op], None]] = {
    "dot_general": _dot, "ragged_dot_general": _ragged, "reshape": _reshape, "transpose": _transpose, "broadcast_in_dim": _broadcast, "squeeze": _squeeze,
    "gather": _take, "concatenate": _along("dimension"), "split": _along("axis"), "sort": _along("dimension"),
    "cumsum": _along("axis"), "cumprod": _along("axis"), "cummax": _along("axis"), "top_k": _along("axis"),
} | dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"), _reduce) \
  | dict.fromkeys(("slice", "dynamic_slice", "dynamic_update_slice", "pad"), _window)  # fmt: skip
