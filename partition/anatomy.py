"""anatomy(): what part of the model each op is (attention, mlp, experts, norm, ...), and why; in which layer (`layers.py`).

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
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from partition.graph import Graph, Op, Role, bodies, roots
from partition.layers import Layers, Marked, layers
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
    """The part of each op by id, why, and how sure that is; the layers.

    why: op id -> (reason, confidence): 0.9 the structure that only this part has; 0.6 what is left, or what goes with a neighbour.
    layer: op id -> the number of its layer, None outside of any and in a scan over layers; `layers.of` has the layers of each.
    """

    kind: Mapping[int, Kind]
    why: Mapping[int, tuple[str, float]] = dataclasses.field(repr=False)
    layers: Layers

    @functools.cached_property
    def layer(self) -> dict[int, int | None]:
        """Op id -> the only layer that it computes, None where that is none or several."""
        return {op: found[0] if len(found) == 1 else None for op, found in self.layers.of.items()}

    def __str__(self) -> str:
        lines = [f"{name}: {count} layers, alike: {'; '.join(map(_span, self.layers.classes[name])) or 'none'}" for name, count in self.layers.counts.items()]
        for kind in Kind:
            ops = [op for op, k in self.kind.items() if k is kind]
            if ops:
                best = max(ops, key=lambda op: self.why[op][1])
                lines.append(f"{kind}: {len(ops)} ops; op {best}: {self.why[best][0]} (confidence {self.why[best][1]:g}, least {min(self.why[op][1] for op in ops):g})")
        return "\n".join(lines)


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1 else ", ".join(map(str, numbers))


class _Parts(dict[int, Kind]):
    """What has been told so far: op id -> its part, with the reason; and the ops that add to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.why: dict[int, tuple[str, float]] = {}
        self.residuals: set[int] = set()

    def say(self, op: int, kind: Kind, why: str, confidence: float = 0.9) -> None:
        """Tell an op's part, unless it is told already."""
        if op not in self:
            self[op], self.why[op] = kind, (why, confidence)


def anatomy(phases: Phases) -> Anatomy:
    """Find the parts and the layers of a tagged program."""
    graph, loop = phases.program.graph, phases.token_loop
    weighty, kind = _weights(graph), _Parts()
    regions: dict[str, tuple[Graph, set[int]]] = {"top": (graph, set() if loop is None else {loop.id})}
    if loop is not None and loop.loop is not None:
        regions["body"] = loop.loop.body, set()
    for level, skip in regions.values():
        _kinds(level, weighty, skip, kind, last=True)
    for op in graph.walk():
        kind.say(op.id, Kind.OTHER, "no contraction is near", 0.6)
    marked = Marked(mixers={op for op, k in kind.items() if k in (Kind.ATTENTION, Kind.RECURRENT)}, residuals=kind.residuals,
                    recurrent={op for op, k in kind.items() if k is Kind.RECURRENT},
                    outside={op for op, k in kind.items() if k in (Kind.HEAD, Kind.EMBEDDING, Kind.SAMPLING) and kind.why[op][1] > 0.6})  # fmt: skip
    return Anatomy(kind=kind, why=kind.why, layers=layers(graph, regions, weighty, marked))


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


_SCALES = ("mul", "div", "add", "sub", "convert_element_type", "broadcast_in_dim")


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

    def scaled(self, op: Op) -> Iterator[Op]:
        """What a norm's factor is multiplied with, and then with weights, up to a contraction or a residual."""
        made = list(op.outputs)
        for n, t in enumerate(made):
            for r in self.readers.get(t, ()):
                others = [i for i in r.inputs if i != t and i not in self.weighty and self.tensors[i].role is Role.ACTIVATION]
                if r.primitive in _SCALES and not self.residual(r) and (not others or n < len(op.outputs)):
                    yield r
                    made += [o for o in r.outputs if o not in made]

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


def _kinds(level: Graph, weighty: set[int], skip: set[int], kind: _Parts, last: bool) -> None:
    """Tell the ops of a level and of what it holds; `last`: its final contraction is the head."""
    g = _Level(level, weighty, skip)
    kind.residuals.update(op.id for op in level.ops if g.residual(op))
    for op in (o for o in level.ops if o.id not in skip):
        for body in bodies(op):
            _kinds(body, weighty, skip, kind, last=False)
    plain = [op for op in level.ops if op.id not in skip and op.primitive in CONTRACTIONS]
    for op in plain:
        if op.primitive == "ragged_dot_general":
            kind.say(op.id, Kind.EXPERTS, "a ragged contraction: every row meets the weights of its own group")
        elif weighty.isdisjoint(op.inputs[:2]) and any(g.selects(m) for t in op.inputs[:2] for m in g.behind(op, t)):
            kind.say(op.id, Kind.EXPERTS, "its weights are some of a stack, by a choice")
        elif weighty.isdisjoint(op.inputs[:2]) and _scores(g, op):
            kind.say(op.id, Kind.ATTENTION, "two activations meet, and the result goes into a softmax")
        elif weighty.isdisjoint(op.inputs[:2]) and (scores := [m.id for t in op.inputs[:2] for m in g.behind(op, t) if kind.get(m.id) is Kind.ATTENTION]):
            kind.say(op.id, Kind.ATTENTION, f"two activations meet, one of them made of the scores of op {scores[0]}")
        elif weighty.isdisjoint(op.inputs[:2]):
            kind.say(op.id, Kind.RECURRENT, "two activations meet without a softmax")
    _routing(g, plain, kind)
    _head(g, plain, kind, last)
    _mixers(g, plain, kind)
    for op in plain:
        kind.say(op.id, Kind.MLP, "a contraction with a weight that is no other part", 0.6)
    _others(g, level, skip, kind)


def _routing(g: _Level, plain: Sequence[Op], kind: _Parts) -> None:
    """Routers: few results, chosen from by top_k, argmax or sort, on the way to other contractions of this level."""
    for op in plain:
        if op.id in kind:
            continue
        chooser = next((r for r in g.ahead(op) if discretises(r, g.tensors) and r.primitive in ("top_k", "argmax", "sort", "approx_top_k")), None)
        if chooser is not None and chooser.id in g.leads:
            kind.say(chooser.id, Kind.ROUTER, f"it chooses among the results of op {op.id}")
            kind.say(op.id, Kind.ROUTER, f"{chooser.primitive} op {chooser.id} chooses among its results, and contractions follow")
            for r in g.ahead(chooser):
                if r.id not in kind and r.primitive == "dot_general" and any(len(g.tensors[t].shape) > 2 for t in r.inputs if t in g.weighty):
                    kind.say(r.id, Kind.EXPERTS, f"a stack of weights, behind the choice of op {chooser.id}")


def _head(g: _Level, plain: Sequence[Op], kind: _Parts, last: bool) -> None:
    """The head: the last contraction with a weight, where no contraction follows."""
    if not last:
        return
    for op in reversed(plain):
        if op.id not in kind and not g.weighty.isdisjoint(op.inputs) and op.id not in g.leads:
            kind.say(op.id, Kind.HEAD, "the last contraction with a weight; no other follows")
            return


def _scores(g: _Level, op: Op) -> bool:
    """Whether the result of a contraction goes into a softmax."""
    found = {r.primitive for r in g.ahead(op)}
    return bool({"exp", "exp2"} & found) and "reduce_sum" in found


def _mixers(g: _Level, plain: Sequence[Op], kind: _Parts) -> None:
    """Projections of attention and of recurrences: what takes their results before a residual, then what feeds nothing but them."""
    for op in plain:  # in program order, so that what takes a result is asked again in its turn
        if kind.get(op.id) in (Kind.ATTENTION, Kind.RECURRENT):
            for other in g.ahead(op):
                if other.primitive in CONTRACTIONS:
                    kind.say(other.id, kind[op.id], f"it takes the result of op {op.id} before a residual")
    for op in reversed(plain):
        if op.id not in kind:
            readers = [r.id for r in g.ahead(op) if _contracts(r)]
            found = {kind.get(r) for r in readers}
            if readers and found <= {Kind.ATTENTION, Kind.RECURRENT}:
                kind.say(op.id, kind[readers[0]], f"up to the next residual it feeds op {readers[0]} and its like alone")


def _others(g: _Level, level: Graph, skip: set[int], kind: _Parts) -> None:
    """Ops that are no contraction."""
    heads = [op for op in level.ops if kind.get(op.id) is Kind.HEAD]
    after = {r.id for op in heads for r in g.ahead(op, residuals=True)}
    for op in level.ops:
        if op.id in kind or op.id in skip:
            continue
        if op.primitive == "gather" and op.inputs[0] in g.weighty and not any(discretises(m, g.tensors) and m.primitive != "lt" for m in g.behind(op, op.inputs[1])):
            kind.say(op.id, Kind.EMBEDDING, "rows of a weight are looked up")
        elif op.primitive.startswith(("dynamic_update_slice", "scatter")) and _is_state(g, op):
            kind.say(op.id, Kind.STATE, "a buffer is written in place")
        elif op.id in after:
            kind.say(op.id, Kind.SAMPLING, "it follows the head")
        elif op.primitive in ("rsqrt", "sqrt") and any(m.primitive == "reduce_sum" for m in g.behind(op, op.inputs[0])):
            kind.say(op.id, Kind.NORM, "the root of a sum")
            for r in g.scaled(op):
                kind.say(r.id, Kind.NORM, f"it scales by op {op.id}")
    _spread(g, level, skip, kind)


def _is_state(g: _Level, op: Op) -> bool:
    """Whether an update goes into a buffer: an operand from outside, or zeros."""
    buffer = op.inputs[0]
    while buffer in g.maker and g.maker[buffer].primitive in ("broadcast_in_dim", "convert_element_type", "reshape", "copy"):
        if not g.maker[buffer].inputs or g.tensors[g.maker[buffer].inputs[0]].role is Role.LITERAL:
            return True
        buffer = g.maker[buffer].inputs[0]
    return buffer not in g.maker


_RANK = {kind: n for n, kind in enumerate((Kind.ATTENTION, Kind.RECURRENT, Kind.ROUTER, Kind.EXPERTS, Kind.MLP, Kind.HEAD, Kind.SAMPLING, Kind.EMBEDDING, Kind.NORM, Kind.STATE, Kind.OTHER))}  # fmt: skip
"""Which part an op goes with that stands between several."""


def _spread(g: _Level, level: Graph, skip: set[int], kind: _Parts) -> None:
    """Give every op left the part of what reads it; where that is a residual or a state, of what makes it."""
    ops = [op for op in level.ops if op.id not in skip]

    def told(found: Iterable[Op], but: Kind | None = None) -> int | None:
        ranked = [(_RANK[kind[op.id]], op.id) for op in found if op.id in kind and kind[op.id] is not but]
        return min(ranked)[1] if ranked else None

    def readers(op: Op) -> list[Op]:
        return [r for t in op.outputs for r in g.readers.get(t, ())]

    for op in reversed(ops):
        ahead = readers(op)
        stays = op.id in kind.residuals or any(r.id in kind.residuals for r in ahead)
        if op.id not in kind and not stays and (n := told(ahead, but=Kind.STATE)) is not None:
            kind.say(op.id, kind[n], f"it feeds op {n}", 0.6)
    for op in (o for o in ops if o.id not in kind):
        makers = [g.maker[t] for t in op.inputs if t in g.maker]
        if (n := told(m for m in makers if not {op.id, m.id} <= kind.residuals)) is not None:
            kind.say(op.id, kind[n], f"it comes of op {n}", 0.6)
    for op in (o for o in reversed(ops) if o.id not in kind):
        if (n := told(readers(op))) is not None:
            kind.say(op.id, kind[n], f"it feeds op {n}", 0.6)
