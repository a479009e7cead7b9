"""Along what an op can be split: the factors that its operands and results share, as Shardy's op sharding rules have them.

A factor is a loop of the computation, of some size. A dimension of an operand is a product of factors, major first, nearly always one;
a reshape's are several. Splitting a factor over devices splits every operand and result that has it, and leaves the others whole; where a
summed factor is split, each device holds a part of every result.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from partition.graph import Op, Tensor

Dims = tuple[tuple[int, ...], ...]
"""For each dimension of a tensor, its factors, major first; () for one that is never split."""


@dataclasses.dataclass(frozen=True, slots=True)
class Factors:
    """sizes: of each factor. ins, outs: the factors of each operand and result. summed: those that no result has.

    batch: of a contraction of two tensors, those that both and the result have.
    """

    sizes: tuple[int, ...]
    ins: tuple[Dims, ...]
    outs: tuple[Dims, ...]
    summed: frozenset[int] = frozenset()
    batch: tuple[int, ...] = ()

    def own(self, i: int) -> list[int]:
        """The factors that an operand of a contraction does not share with the other one."""
        return [f for fs in self.ins[i] for f in fs if f not in self.batch and f not in self.summed]


def factors(op: Op, tensors: Sequence[Tensor]) -> Factors:
    """The factors of an op; of one whose primitive has no rule, none, unless it works element by element."""
    ins, outs = [tensors[t].shape for t in op.inputs], [tensors[t].shape for t in op.outputs]
    rule = RULES.get(op.primitive) or (_elementwise if _alike(ins, outs) else _nothing)
    made = rule(op, ins, outs)
    return made if made is not None else _nothing(op, ins, outs)


def _alike(ins: Sequence[Any], outs: Sequence[Any]) -> bool:
    """Whether an op works element by element: operands are scalars or have the result's dimensions, some of them 1."""
    fits = lambda small: small == () or (len(small) == len(outs[0]) and all(a in (1, b) for a, b in zip(small, outs[0], strict=True)))  # noqa: E731
    return bool(ins) and bool(outs) and bool(outs[0]) and all(o == outs[0] for o in outs) and all(map(fits, ins))


def _nothing(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    return Factors((), tuple(((),) * len(s) for s in ins), tuple(((),) * len(s) for s in outs))


def _elementwise(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    shape = outs[0]
    own = tuple(tuple((d,) if n == shape[d] else () for d, n in enumerate(s)) if s else () for s in ins)
    return Factors(tuple(shape), own, tuple(tuple((d,) for d in range(len(shape))) for _ in outs))


def _dot(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    contract, batch = op.params["dimension_numbers"]
    sizes: list[int] = []
    dims: list[list[tuple[int, ...]]] = [[()] * len(s) for s in ins[:2]]

    def factor(places: Sequence[tuple[int, int]]) -> int:
        for side, d in places:
            dims[side][d] = (len(sizes),)
        sizes.append(ins[places[0][0]][places[0][1]])
        return len(sizes) - 1

    shared = [factor([(0, a), (1, b)]) for a, b in zip(*batch, strict=True)]
    free = [factor([(i, d)]) for i in (0, 1) for d in range(len(ins[i])) if d not in contract[i] and d not in batch[i]]
    summed = [factor([(0, a), (1, b)]) for a, b in zip(*contract, strict=True)]
    return Factors(tuple(sizes), (tuple(dims[0]), tuple(dims[1])), (tuple((f,) for f in (*shared, *free)),), frozenset(summed), tuple(shared))


def _ragged(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors | None:
    """Rows [m, k] with the matrix [k, n] of their group, of [g, k, n]: split by groups, each device has the rows of its own."""
    if [len(s) for s in ins] != [2, 3, 1]:
        return None
    by_group = (0,) if ins[0][0] >= ins[1][0] else ()  # fewer rows than groups leave most devices without any
    g, k, n = ins[1]
    return Factors((g, k, n), ((by_group, (1,)), (by_group, (1,), (2,)), ((),)), ((by_group, (2,)),), frozenset({1}))


def _conv(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    spec, groups = op.params["dimension_numbers"], op.params["feature_group_count"]
    own: list[list[tuple[int, ...]]] = [[()] * len(s) for s in (*ins[:2], outs[0])]
    own[0][spec.lhs_spec[0]] = own[2][spec.out_spec[0]] = (0,)
    own[1][spec.rhs_spec[0]] = own[2][spec.out_spec[1]] = (1,)
    sizes, summed = [ins[0][spec.lhs_spec[0]], ins[1][spec.rhs_spec[0]]], frozenset[int]()
    if groups == 1:
        own[0][spec.lhs_spec[1]] = own[1][spec.rhs_spec[1]] = (2,)
        sizes.append(ins[0][spec.lhs_spec[1]])
        summed = frozenset({2})
    elif groups == sizes[1]:
        own[0][spec.lhs_spec[1]] = (1,)
    else:
        own[1][spec.rhs_spec[0]] = own[2][spec.out_spec[1]] = ()
    return Factors(tuple(sizes), (tuple(own[0]), tuple(own[1])), (tuple(own[2]),), summed)


def _reshape(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    old, new = ins[0], outs[0]
    sizes: list[int] = []
    dims: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([()] * len(old), [()] * len(new))
    i = j = 0
    while i < len(old) and j < len(new) and 0 not in old:
        first, a, b = (i, j), old[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        sides = ((old, first[0], i), (new, first[1], j))
        ends = sorted({math.prod(shape[lo:d + 1]) for shape, lo, hi in sides for d in range(lo, hi)} - {1})
        if any(y % x for x, y in itertools.pairwise(ends)):
            continue
        begin = len(sizes)
        sizes += [y // x for x, y in zip([1, *ends], ends, strict=False)]
        for side, (shape, lo, hi) in enumerate(sides):
            for d in range(lo, hi):
                low, high = math.prod(shape[lo:d]), math.prod(shape[lo:d + 1])
                dims[side][d] = tuple(begin + n for n, end in enumerate(ends) if low < end <= high)
    return Factors(tuple(sizes), (tuple(dims[0]),), (tuple(dims[1]),))


def _transpose(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    return Factors(tuple(ins[0]), (tuple((d,) for d in range(len(ins[0]))),), (tuple((d,) for d in op.params["permutation"]),))


def _broadcast(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    shape = outs[0]
    own = tuple((d,) if n == shape[d] else () for n, d in zip(ins[0], op.params["broadcast_dimensions"], strict=True)) if ins else ()
    return Factors(tuple(shape), (own, *(((),) * len(s) for s in ins[1:])), (tuple((d,) for d in range(len(shape))),))


def _squeeze(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    gone = {d % len(ins[0]) for d in op.params["dimensions"]}
    return Factors(tuple(ins[0]), (tuple(() if d in gone else (d,) for d in range(len(ins[0]))),), (tuple((d,) for d in range(len(ins[0])) if d not in gone),))


def _reduce(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors | None:
    axes, shape = set(op.params["axes"]), ins[0]
    kept = tuple((d,) for d in range(len(shape)) if d not in axes)
    if len(kept) != len(outs[0]):
        return None
    return Factors(tuple(shape), tuple(tuple((d,) for d in range(len(shape))) if s == shape else ((),) * len(s) for s in ins), tuple(kept for _ in outs), frozenset(axes))


def _along(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    """Ops that take the dimensions whole whose sizes differ, or that their parameter names, and treat the others alike."""
    rank = len(ins[0])
    named = {op.params[k] % rank for k in ("dimension", "axis") if isinstance(op.params.get(k), int)} or ({rank - 1} if op.primitive == "top_k" else set())
    named |= set(op.params.get("dimensions", ())) if op.primitive == "rev" else set()
    ranked = [s for s in (*ins, *outs) if len(s) == rank]
    able = [d not in named and all(s[d] == ins[0][d] for s in ranked) for d in range(rank)]
    own = tuple((d,) if able[d] else () for d in range(rank))
    return Factors(tuple(ins[0]), tuple(own if len(s) == rank else ((),) * len(s) for s in ins), tuple(own if len(s) == rank else ((),) * len(s) for s in outs))


def _gather(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    """A table look-up: a dimension that is looked up may be split, each device finds what lies with it, and the sum is all of it."""
    numbers, taken, shape = op.params["dimension_numbers"], op.params["slice_sizes"], ins[0]
    sizes: list[int] = []
    table: list[tuple[int, ...]] = [()] * len(shape)
    found: list[tuple[int, ...]] = [()] * len(outs[0])
    index: list[tuple[int, ...]] = [()] * len(ins[1])
    summed = set()
    batched = dict(zip(getattr(numbers, "start_indices_batching_dims", ()), getattr(numbers, "operand_batching_dims", ()), strict=True))
    kept = [d for d in range(len(shape)) if d not in numbers.collapsed_slice_dims and d not in batched.values()]
    for d, out in zip(kept, numbers.offset_dims, strict=True):
        if taken[d] == shape[d]:
            table[d] = found[out] = (len(sizes),)
            sizes.append(shape[d])
    for d in numbers.collapsed_slice_dims:
        table[d] = (len(sizes),)
        summed.add(len(sizes))
        sizes.append(shape[d])
    rows = [d for d in range(len(outs[0])) if d not in numbers.offset_dims]
    for d, out in enumerate(rows):
        index[d] = found[out] = (len(sizes),)
        if d in batched:
            table[batched[d]] = (len(sizes),)
        sizes.append(outs[0][out])
    return Factors(tuple(sizes), (tuple(table), tuple(index)), (tuple(found),), frozenset(summed))


def _scatter(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    """Writes in place: the dimensions that an update covers whole, and those along which operand and updates go together."""
    numbers = op.params["dimension_numbers"]
    into, update = ins[0], ins[2]
    together = tuple(getattr(numbers, "operand_batching_dims", ()))
    own: list[tuple[int, ...]] = [()] * len(into)
    new: list[tuple[int, ...]] = [()] * len(update)
    kept = [d for d in range(len(into)) if d not in numbers.inserted_window_dims and d not in together]
    places = [*zip(kept, numbers.update_window_dims, strict=True)]
    rows = [d for d in range(len(update)) if d not in numbers.update_window_dims]
    places += [(d, rows[i]) for d, i in zip(together, getattr(numbers, "scatter_indices_batching_dims", ()), strict=True)]
    for d, u in places:
        if into[d] == update[u]:
            own[d] = new[u] = (d,)
    return Factors(tuple(into), (tuple(own), ((),) * len(ins[1]), tuple(new)), (tuple(own),))


def _update(op: Op, ins: Sequence[Any], outs: Sequence[Any]) -> Factors:
    own = tuple((d,) if a == b else () for d, (a, b) in enumerate(zip(ins[0], ins[1], strict=True)))
    return Factors(tuple(ins[0]), (own, own, *(() for _ in ins[2:])), (own,))


_Rule = Callable[[Op, Sequence[Any], Sequence[Any]], Factors | None]
RULES: dict[str, _Rule] = {
    "dot_general": _dot, "ragged_dot_general": _ragged, "conv_general_dilated": _conv, "reshape": _reshape, "transpose": _transpose,
    "broadcast_in_dim": _broadcast, "squeeze": _squeeze, "gather": _gather, "dynamic_update_slice": _update,
} | dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"), _reduce) \
  | dict.fromkeys(("slice", "dynamic_slice", "pad", "concatenate", "split", "sort", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "top_k", "rev"), _along) \
  | dict.fromkeys(("scatter", "scatter-add", "scatter_add", "scatter-sub", "scatter-mul", "scatter_mul", "scatter-min", "scatter_min", "scatter-max", "scatter_max"), _scatter)  # fmt: skip
