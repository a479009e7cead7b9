"""anatomy(): what part of the model each op is (attention, mlp, experts, norm, ...), in which layer, and which layers repeat.

Found from the structure, without names. Contractions are told first:

- of two activations: ATTENTION, where the result is exponentiated and summed (a softmax) or is taken of such a one; else RECURRENT
  (state-space and linear-recurrent layers);
- with a weight, all of whose readers up to the next residual are of one of these two, or that takes what comes of one: the same;
- one whose result is chosen from, with the choice deciding which weights or rows others read, is a ROUTER; ragged contractions, and those
  with weights that a choice selects, are EXPERTS;
- the last one before a token is chosen, or before the end, is the HEAD; a look-up of tokens in a weight is the EMBEDDING;
- any other is MLP (shared experts too: every token takes them).

Other ops: a reduction whose outcome scales what it was taken of is a NORM; an in-place update of state is a STATE write; what lies after
the head up to the chosen token is SAMPLING; the rest goes with the contraction that it feeds, or comes from.
Layers are the repeats of the longest sequence of weights' contractions that repeats in program order; in a scan of layers, its iterations.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from partition.graph import Graph, Op, Role, Tensor, bodies, roots
from partition.loops import CONTRACTIONS, discretises

if TYPE_CHECKING:
    from partition.phases import Phases


class Kind(enum.StrEnum):
    """What part of a model an op is."""

    ATTENTION = "attention"
    MLP = "mlp"
    ROUTER = "router"
    EXPERTS = "experts"
    RECURRENT = "recurrent"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"
    SAMPLING = "sampling"
    STATE = "state write"
    OTHER = "other"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anatomy:
    """kind: op id -> its part. layer: op id -> number of its layer in its region, None outside of any (or inside a scan of layers).

    layers: how many layers each region has ("top", "body"); scans of layers count their iterations.
    """

    kind: Mapping[int, Kind]
    layer: Mapping[int, int | None]
    layers: Mapping[str, int]


def anatomy(phases: Phases) -> Anatomy:
    """Find the parts and the layers of a tagged program."""
    graph, loop = phases.program.graph, phases.token_loop
    weighty = _weights(graph)
    kind: dict[int, Kind] = {}
    layer: dict[int, int | None] = {}
    layers: dict[str, int] = {}
    regions = [("top", graph)] + ([("body", loop.loop.body)] if loop is not None and loop.loop is not None else [])
    for name, level in regions:
        skip = {loop.id} if loop is not None else set()
        _kinds(level, weighty, skip, kind, last=True)
        numbers, count = _layers([op for op in level.ops if op.id not in skip], weighty, level.tensors)
        layer.update(numbers)
        layers[name] = count
    for op in graph.walk():
        kind.setdefault(op.id, Kind.OTHER)
        layer.setdefault(op.id, None)
    return Anatomy(kind=kind, layer=layer, layers=layers)


def _weights(graph: Graph) -> set[int]:
    """Tensors that are weights or made of weights and constants alone, on every level."""
    params = {t for t in graph.inputs if graph.tensors[t].role is Role.PARAM}
    found = params | {inner for inner, outer in roots(graph).items() if outer in params}

    def enter(level: Graph) -> None:
        for op in level.ops:
            steady = all(t in found or level.tensors[t].role in (Role.CONST, Role.LITERAL) for t in op.inputs)
            if steady and not found.isdisjoint(op.inputs) and op.loop is None:
                found.update(op.outputs)
            for body in bodies(op):
                enter(body)

    enter(graph)
    return found


class _Level:
    """One level of a program: who makes and who reads each tensor."""

    def __init__(self, level: Graph, weighty: set[int], skip: set[int]):
        self.ops, self.tensors, self.weighty = level.ops, level.tensors, weighty
        self.outputs = set(level.outputs)
        self.maker = level.producer
        self.readers: dict[int, list[Op]] = {}
        for op in (o for o in level.ops if o.id not in skip):  # the token loop is a level of its own
            for t in op.inputs:
                self.readers.setdefault(t, []).append(op)

    def looks_up(self, op: Op) -> bool:
        """Whether an op looks rows up in a table of weights: tokens become embeddings, a new pass begins."""
        return op.primitive == "gather" and op.inputs[0] in self.weighty and len(self.tensors[op.inputs[0]].shape) == 2

    def selects(self, op: Op) -> bool:
        """Whether an op takes some of many matrices of weights: those of the experts that were chosen."""
        return op.primitive in ("gather", "dynamic_slice") and op.inputs[0] in self.weighty and len(self.tensors[op.inputs[0]].shape) > 2

    def residual(self, op: Op) -> bool:
        """Whether an op adds two activations of one shape, one of which is read elsewhere too: a residual stream goes on."""
        if op.primitive != "add" or len(op.inputs) != 2 or not self.weighty.isdisjoint(op.inputs):
            return False
        a, b = (self.tensors[t].shape for t in op.inputs)
        return a == b and len(a) > 1 and any(len(self.readers.get(t, ())) > 1 or t not in self.maker for t in op.inputs)

    @functools.cached_property
    def leads(self) -> set[int]:
        """Ops whose results reach a contraction, before tokens are looked up anew."""
        found: set[int] = set()
        for op in reversed(self.ops):
            readers = [r for t in op.outputs for r in self.readers.get(t, ()) if not self.looks_up(r)]
            if any(_contracts(r) or r.id in found for r in readers):
                found.add(op.id)
        return found

    def ahead(self, op: Op, residuals: bool = False) -> Iterable[Op]:
        """Ops that read what an op makes, and go on through those that are no contraction (nor, unless asked for, a residual)."""
        def after(op: Op) -> list[Op]:
            return [r for t in op.outputs for r in self.readers.get(t, ())]

        return _walk(after(op), lambda r: [] if self.looks_up(r) or (self.residual(r) and not residuals) else after(r))

    def behind(self, op: Op, operand: int) -> Iterable[Op]:
        """Ops that make an operand, and go back through those that are no contraction and no residual."""
        def before(tensors: Iterable[int]) -> list[Op]:
            return [self.maker[t] for t in tensors if t in self.maker]

        return _walk(before([operand]), lambda m: [] if self.residual(m) else before(m.inputs))


def _walk(first: Iterable[Op], onward: Callable[[Op], Iterable[Op]]) -> Iterator[Op]:
    """Ops breadth first, each once; from a contraction the walk does not go on."""
    seen, queue = set[int](), deque(first)
    while queue:
        op = queue.popleft()
        if op.id not in seen:
            seen.add(op.id)
            yield op
            queue.extend(() if _contracts(op) else onward(op))


def _contracts(op: Op) -> bool:
    return op.primitive in CONTRACTIONS or op.loop is not None or bool(op.bodies)


def _kinds(level: Graph, weighty: set[int], skip: set[int], kind: dict[int, Kind], last: bool) -> None:
    """Tell the ops of a level and of what it holds; `last`: its final contraction is the head."""
    g = _Level(level, weighty, skip)
    for op in (o for o in level.ops if o.id not in skip):
        for body in bodies(op):
            _kinds(body, weighty, skip, kind, last=False)
    plain = [op for op in level.ops if op.id not in skip and op.primitive in CONTRACTIONS]
    for op in plain:
        if op.primitive == "ragged_dot_general":
            kind[op.id] = Kind.EXPERTS
        elif weighty.isdisjoint(op.inputs[:2]) and any(g.selects(m) for t in op.inputs[:2] for m in g.behind(op, t)):
            kind[op.id] = Kind.EXPERTS
        elif weighty.isdisjoint(op.inputs[:2]):
            kind[op.id] = Kind.ATTENTION if _scores(g, op) or any(kind.get(m.id) is Kind.ATTENTION for t in op.inputs[:2] for m in g.behind(op, t)) else Kind.RECURRENT
    _routing(g, plain, kind)
    _head(g, plain, kind, last)
    _mixers(g, plain, kind)
    for op in plain:
        kind.setdefault(op.id, Kind.MLP)
    _others(g, level, skip, kind)


def _routing(g: _Level, plain: Sequence[Op], kind: dict[int, Kind]) -> None:
    """Routers: few results, chosen from by top_k, argmax or sort, on the way to other contractions of this level."""
    for op in plain:
        if op.id in kind:
            continue
        chooser = next((r for r in g.ahead(op) if discretises(r, g.tensors) and r.primitive in ("top_k", "argmax", "sort", "approx_top_k")), None)
        if chooser is not None and chooser.id in g.leads:
            kind[op.id] = Kind.ROUTER
            for r in g.ahead(chooser):
                if r.id not in kind and r.primitive == "dot_general" and any(len(g.tensors[t].shape) > 2 for t in r.inputs if t in g.weighty):
                    kind[r.id] = Kind.EXPERTS


def _head(g: _Level, plain: Sequence[Op], kind: dict[int, Kind], last: bool) -> None:
    """The head: the last contraction with a weight, where no contraction follows."""
    if not last:
        return
    for op in reversed(plain):
        if op.id not in kind and not g.weighty.isdisjoint(op.inputs) and op.id not in g.leads:
            kind[op.id] = Kind.HEAD
            return


def _scores(g: _Level, op: Op) -> bool:
    """Whether the result of a contraction goes into a softmax."""
    found = {r.primitive for r in g.ahead(op)}
    return bool({"exp", "exp2"} & found) and "reduce_sum" in found


def _mixers(g: _Level, plain: Sequence[Op], kind: dict[int, Kind]) -> None:
    """Projections of attention and of recurrences: what takes their results before a residual, then what feeds nothing but them."""
    for op in plain:  # in program order, so that what takes a result is asked again in its turn
        if kind.get(op.id) in (Kind.ATTENTION, Kind.RECURRENT):
            for other in g.ahead(op):
                if other.primitive in CONTRACTIONS:
                    kind.setdefault(other.id, kind[op.id])
    for op in reversed(plain):
        if op.id not in kind:
            found = [kind.get(r.id) for r in g.ahead(op) if _contracts(r)]
            if found and found[0] is not None and set(found) <= {Kind.ATTENTION, Kind.RECURRENT}:
                kind[op.id] = found[0]


def _others(g: _Level, level: Graph, skip: set[int], kind: dict[int, Kind]) -> None:
    """Ops that are no contraction."""
    heads = [op for op in level.ops if kind.get(op.id) is Kind.HEAD]
    after = {r.id for op in heads for r in g.ahead(op, residuals=True)}
    for op in level.ops:
        if op.id in kind or op.id in skip:
            continue
        if op.primitive == "gather" and op.inputs[0] in g.weighty and not any(discretises(m, g.tensors) and m.primitive != "lt" for m in g.behind(op, op.inputs[1])):
            kind[op.id] = Kind.EMBEDDING
        elif op.primitive.startswith(("dynamic_update_slice", "scatter")) and _is_state(g, op):
            kind[op.id] = Kind.STATE
        elif op.id in after:
            kind[op.id] = Kind.SAMPLING
        elif op.primitive in ("rsqrt", "sqrt") and any(m.primitive == "reduce_sum" for m in g.behind(op, op.inputs[0])):
            kind[op.id] = Kind.NORM
    _spread(g, level, skip, kind)


def _is_state(g: _Level, op: Op) -> bool:
    """Whether an update goes into a buffer: an operand from outside, or zeros."""
    buffer = op.inputs[0]
    while buffer in g.maker and g.maker[buffer].primitive in ("broadcast_in_dim", "convert_element_type", "reshape", "copy"):
        if not g.maker[buffer].inputs or g.tensors[g.maker[buffer].inputs[0]].role is Role.LITERAL:
            return True
        buffer = g.maker[buffer].inputs[0]
    return buffer not in g.maker


def _spread(g: _Level, level: Graph, skip: set[int], kind: dict[int, Kind]) -> None:
    """Give every op left the kind of its first reader that has one, backwards; then of its maker, forwards."""
    for op in reversed(level.ops):
        if op.id in kind or op.id in skip:
            continue
        found = [kind[r.id] for t in op.outputs for r in g.readers.get(t, ()) if r.id in kind]
        if found:
            kind[op.id] = found[0]
    for op in level.ops:
        if op.id not in kind and op.id not in skip:
            found = [kind[g.maker[t].id] for t in op.inputs if t in g.maker and g.maker[t].id in kind]
            kind[op.id] = found[0] if found else Kind.OTHER


def _layers(ops: Sequence[Op], weighty: set[int], tensors: Sequence[Tensor]) -> tuple[dict[int, int | None], int]:
    """Number of the layer of each op of a level, and how many there are, by the repeats of its contractions with weights."""
    scans = [op for op in ops if op.loop is not None and op.loop.kind == "scan" and op.loop.trips and any(t in weighty for t in op.inputs[op.loop.consts + op.loop.carry :])]
    if scans:
        return {}, max(op.loop.trips or 0 for op in scans if op.loop is not None)
    marks = [n for n, op in enumerate(ops) if op.primitive in CONTRACTIONS and not weighty.isdisjoint(op.inputs)]
    signs = [(ops[n].primitive, *(tensors[t].shape for t in ops[n].inputs if t in weighty)) for n in marks]
    first, period, count = repeats(signs)
    if count < 2:
        return {}, 1 if marks else 0
    numbers: dict[int, int | None] = {}
    starts = [marks[first + i * period] for i in range(count)]
    lead = _lead(ops, starts)
    end = marks[first + count * period - 1]
    for i, start in enumerate(starts):
        stop = starts[i + 1] - lead if i + 1 < count else end + 1
        numbers.update((op.id, i) for op in ops[max(start - lead, 0) : stop])
    return numbers, count


def _lead(ops: Sequence[Op], starts: Sequence[int]) -> int:
    """How many ops before its first contraction belong to a layer: as far back as all layers look alike."""
    lead = 0
    while starts[0] - lead > 0 and len({ops[s - lead - 1].primitive for s in starts}) == 1 and ops[starts[0] - lead - 1].primitive not in ("gather", *CONTRACTIONS):
        lead += 1
    return min(lead, min(b - a for a, b in itertools.pairwise(starts)) - 1)


def repeats(signs: Sequence[object]) -> tuple[int, int, int]:
    """(first, period, count) of the repeat that covers most of a sequence; of equal ones the shortest period. O(n x period)."""
    best = (0, 1, 1 if signs else 0)
    for period in range(1, len(signs) // 2 + 1):
        run = 0
        for i in range(len(signs) - period):
            run = run + 1 if signs[i] == signs[i + period] else 0
            count = run // period + 1
            if count > 1 and count * period > best[1] * best[2]:
                best = (i + period - count * period + 1, period, count)
        if best[2] > 1 and best[1] * best[2] >= len(signs) - period:
            break
    return best
