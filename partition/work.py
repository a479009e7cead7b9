"""What an op costs before any machine is known: floating-point operations by dtype and bytes of memory traffic.

Rules live in `rules/`, one family of primitives a file, registered with `@rule`. A primitive without a rule is an error with its
mend, never zero. Traffic is what a fusing compiler would move:

- contractions, gathers, scatters, sorts, cumulative ops and random bits read their operands from memory and write their results;
- an in-place update (dynamic_update_slice, scatter) moves what it writes, not the buffer it writes into;
- elementwise ops, broadcasts, reductions and reshapes ride along with their neighbours and move nothing of their own;
- attention is tiled: a contraction of two activations whose result is larger than both keeps it on chip, and what elementwise ops
  make of it is not read back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from partition.errors import WorkError
from partition.graph import Graph, Op, Role, Tensor, bodies, trips_of
from partition.symbols import first


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """flops by dtype; bytes read and written; contractions: how many ops with a fixed time of their own, rows: of all of them. Adds up.

    macs: multiply-adds of the contractions among the flops.
    """

    flops: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Any = 0
    written: Any = 0
    contractions: Any = 0
    rows: Any = 0
    macs: Any = 0

    def __add__(self, other: Work) -> Work:
        flops = dict(self.flops)
        for dtype, n in other.flops.items():
            flops[dtype] = flops.get(dtype, 0) + n
        return Work(flops=flops, read=self.read + other.read, written=self.written + other.written,
                    contractions=self.contractions + other.contractions, rows=self.rows + other.rows, macs=self.macs + other.macs)  # fmt: skip

    def __mul__(self, times: Any) -> Work:
        return Work(flops={d: n * times for d, n in self.flops.items()}, read=self.read * times, written=self.written * times,
                    contractions=self.contractions * times, rows=self.rows * times, macs=self.macs * times)  # fmt: skip

    @property
    def total_flops(self) -> Any:
        """Operations of all dtypes together."""
        return sum(self.flops.values())

    @property
    def bytes(self) -> Any:
        """Bytes read and written."""
        return self.read + self.written


Rule = Callable[[Op, Sequence[Tensor], Sequence[Tensor]], Work]
"""(op, operands, results) -> Work of one run of the op."""

RULES: dict[str, Rule] = {}
FUSED: set[str] = set()
"""Primitives that ride along with their neighbours, through which a tensor that is on chip stays on chip."""


def rule(*primitives: str, fused: bool = False) -> Callable[[Rule], Rule]:
    """Register a work rule for primitives by name; `fused` if the op moves no bytes of its own."""

    if not primitives or not all(isinstance(p, str) for p in primitives):
        raise WorkError("a rule is for primitives by name", where=f"rule{primitives}", mend='write @rule("dot_general")')

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, fn))
        if fused:
            FUSED.update(primitives)
        return fn

    return register


def work(
    graph: Graph, *, weights: frozenset[int] = frozenset(), trips: int | None = None, on_chip: set[int] | None = None
) -> dict[int, Work]:
    """Work of every op of this level and of every body, by op id, for ONE run of its own level; a loop op counts its trips.

    weights: tensor ids that are weights (their contractions are never tiled away). trips: for loops whose structure does not tell.
    on_chip: is filled with the tensors that a tiled attention never writes to memory.
    Raises WorkError for a primitive without rule and for a loop of unknown trips.
    """
    import partition.rules  # noqa: F401  (the rules register themselves)

    found: dict[int, Work] = {}
    _level(graph, weights, trips, set() if on_chip is None else on_chip, found)
    return found


def _literals(graph: Graph) -> dict[int, float]:
    """The values of literals and of constants that are single numbers, and of what a level makes of them by conversion alone."""
    numbers = {}
    for t in graph.tensors:
        if t.role in (Role.LITERAL, Role.CONST):
            try:
                numbers[t.id] = float(t.name)
            except ValueError:
                continue  # a literal that is no number bounds no loop
    for op in graph.ops:
        if op.primitive in ("convert_element_type", "copy", "broadcast_in_dim") and op.inputs[0] in numbers and not graph.tensors[op.outputs[0]].shape:
            numbers[op.outputs[0]] = numbers[op.inputs[0]]
    return numbers


def loop_trips(op: Op, graph: Graph, stated: int | None = None) -> int:
    """How often a loop op runs; raises WorkError where neither its structure nor the caller says."""
    known = trips_of(op, _literals(graph) if op.loop is not None and op.loop.cond is not None else {})
    known = stated if known is None else known
    if known is None:
        raise WorkError(f"the {op.primitive} loop runs a number of times that the graph does not tell", where=f"op {op.id} in {op.scope or 'the top scope'}",
                        mend="say how often: trips=<n>")  # fmt: skip
    return known


def _level(graph: Graph, weights: frozenset[int], trips: int | None, on_chip: set[int], found: dict[int, Work]) -> None:
    tensors = graph.tensors
    for op in graph.ops:
        if op.loop is not None:
            inside = [_body(b, weights, trips, on_chip, found) for b in bodies(op)]
            cost = sum(inside, Work()) * loop_trips(op, graph, trips)
        elif op.bodies:
            branches = [_body(b, weights, trips, on_chip, found) for b in op.bodies]
            cost = max(branches, key=lambda w: (first(w.bytes), first(w.total_flops))) * copies(op)  # a cond runs one branch: the dearest
        else:
            ins, outs = [tensors[t] for t in op.inputs], [tensors[t] for t in op.outputs]
            cost = _tiled(op, _rule_for(op)(op, ins, outs), tensors, weights, on_chip)
            if op.primitive == "dot_general":
                cost = dataclasses.replace(cost, rows=_rows(op, tensors, weights))
        found[op.id] = cost


def _body(graph: Graph, weights: frozenset[int], trips: int | None, on_chip: set[int], found: dict[int, Work]) -> Work:
    """The work of one run of a body."""
    _level(graph, weights, trips, on_chip, found)
    return sum((found[op.id] for op in graph.ops), Work())


def _rows(op: Op, tensors: Sequence[Tensor], weights: frozenset[int]) -> Any:
    """The rows that a contraction works on: what is free in the activation that meets a weight; of two activations, the fewer."""
    contract, batch = op.params["dimension_numbers"]
    free = [math.prod(n for d, n in enumerate(tensors[t].shape) if d not in (*contract[i], *batch[i])) for i, t in enumerate(op.inputs[:2])]
    held = [t in weights for t in op.inputs[:2]]
    return free[held.index(False)] if held.count(True) == 1 else min(free, key=first)


def copies(op: Op) -> int:
    """How many devices run the body of an op at once: those of a shard_map's own mesh, else one."""
    return int(op.params["mesh"].size) if op.primitive == "shard_map" else 1


def _rule_for(op: Op) -> Rule:
    if (own := f"{op.primitive}:{op.params.get('target_name')}") in RULES:
        return RULES[own]
    if op.primitive not in RULES:
        raise WorkError(
            f"no work rule knows the primitive {op.primitive!r}", where=f"op {op.id} in {op.scope or 'the top scope'}",
            mend=f"add one:\n         @partition.rule({op.primitive!r})\n         def _(op, ins, outs):\n"
                 "             return partition.Work(flops={outs[0].dtype: outs[0].size}, read=sum(t.nbytes for t in ins), written=outs[0].nbytes)",
        )  # fmt: skip
    return RULES[op.primitive]


def _tiled(op: Op, cost: Work, tensors: Sequence[Tensor], weights: frozenset[int], on_chip: set[int]) -> Work:
    """Take back the traffic of tensors that a tiled attention keeps on chip; marks them in `on_chip`."""
    if op.primitive in FUSED:
        if not on_chip.isdisjoint(op.inputs):
            on_chip.update(op.outputs)
        return cost
    held = sum(tensors[t].nbytes for t in op.inputs if t in on_chip) if op.primitive == "dot_general" else 0.0
    kept = 0.0
    if op.primitive == "dot_general" and weights.isdisjoint(op.inputs):
        out = tensors[op.outputs[0]]
        if first(out.nbytes) > max(first(tensors[t].nbytes) for t in op.inputs):
            kept = out.nbytes
            on_chip.add(out.id)
    if not first(held) and not first(kept):
        return cost
    return dataclasses.replace(cost, read=cost.read - held, written=cost.written - kept)
