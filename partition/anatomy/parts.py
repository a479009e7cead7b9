"""Which part of the model each contraction is, told level by level, outer before inner where a router decides, inner before outer else.

- Of two activations: ATTENTION, where the result is exponentiated and summed (a softmax) or is taken of such a one; RECURRENT where
  positions meet otherwise, or a state is taken or made (state-space and linear-recurrent layers). A loop that holds such contractions
  alone, or a recurrence without any, is the same.
- With a weight, all of whose readers up to the next residual are of one of these two, or that takes what comes of one: the same. So is
  one that makes the state that the next token takes (no cache that is written in place), and one that takes what that is made of.
- One whose result is chosen from, with the choice deciding which weights or rows others read, is a ROUTER. EXPERTS are ragged
  contractions, those with weights that a choice selects, those of a router's result, and those that it scales.
- The last one before a token is chosen, or before the end, is the HEAD, and whatever else takes the same weight.
- Any other is MLP (shared experts too: every token takes them).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from partition.anatomy.levels import Kind, Level, Weights, recurs
from partition.graph import Graph, Op, bodies, entries
from partition.loops import CONTRACTIONS, discretises

_CHOOSERS = ("top_k", "argmax", "sort", "approx_top_k")
MIXERS = (Kind.ATTENTION, Kind.RECURRENT)


class Parts(dict[int, Kind]):
    """What has been told so far: op id -> its part, with the reason; and the ops that add to the residual stream.

    handed: tensor -> the tensors of the token loop that it becomes; users: which parts take those; lent: ops that make nothing else.
    routed: tensors made of a router's result alone. heads: weights of heads.
    """

    def __init__(self, weights: Weights, handed: Mapping[int, Collection[int]]):
        super().__init__()
        self.weights, self.handed = weights, handed
        self.users: dict[int, set[Kind]] = {}
        self.lent: dict[int, Collection[int]] = {}
        self.why: dict[int, tuple[str, float]] = {}
        self.residuals: set[int] = set()
        self.routed: set[int] = set()
        self.heads: set[object] = set()

    def say(self, op: int, kind: Kind, why: str, confidence: float = 0.9) -> None:
        """Tell an op's part, unless it is told already."""
        if op not in self:
            self[op], self.why[op] = kind, (why, confidence)


def contractions(g: Level, parts: Parts) -> Iterable[Level]:
    """Tell the contractions of a level and of all that it holds; gives the levels, the inner ones first."""
    parts.residuals |= g.residuals
    inner = [(op, [Level(body, parts.weights, (), stacked=parts.weights.stacked(op), above=g.tokens) for body in bodies(op)]) for op in g.nests]
    for level in (x for _, held in inner if any(y.whole for y in held) for x in held):  # passes over a model: their heads are heads here too
        yield from contractions(level, parts)
    _heads(g, parts, known=True)
    _routers(g, parts)
    for op, held in ((op, held) for op, held in inner if not any(x.whole for x in held)):
        parts.routed.update(inside for inside, outer in entries(op) if outer in parts.routed)
        for level in held:
            yield from contractions(level, parts)
    _loops(g, parts)
    _experts(g, parts)
    _activations(g, parts)
    _heads(g, parts, known=False)
    _mixers(g, parts)
    _states(g, parts)
    _handed(g, parts)
    _mixers(g, parts)
    _uses(g, parts)
    yield g


def leftover(graph: Graph, parts: Parts) -> None:
    """What is told when all levels have been seen: other uses of a head's weight; the rest is MLP."""
    for op in graph.walk():
        if op.primitive in CONTRACTIONS and op.id not in parts:
            if any(parts.weights.key(t) in parts.heads for t in parts.weights.of(op)):
                parts.say(op.id, Kind.HEAD, "it takes the weight of a head")
            parts.say(op.id, Kind.MLP, "a contraction with a weight that is no other part", 0.6)


def _routers(g: Level, parts: Parts) -> None:
    """Routers, and what is made of their results alone."""
    for op in g.plain:
        if op.id in parts or not g.weights.of(op):
            continue
        chooser = next((r for r in g.ahead(op) if r.primitive in _CHOOSERS and discretises(r, g.tensors)), None)
        if chooser is not None and chooser.id in g.leads:
            parts.say(chooser.id, Kind.ROUTER, f"it chooses among the results of op {op.id}")
            parts.say(op.id, Kind.ROUTER, f"{chooser.primitive} op {chooser.id} chooses among its results, and contractions follow")
            parts.routed.update(op.outputs)
    if parts.routed:
        for op in (o for o in g.ops if o.id not in g.barriers):
            made = [t for t in op.inputs if t not in g.weights and t not in g.steady]
            if not parts.routed.isdisjoint(op.inputs) and parts.routed.issuperset(made):
                parts.routed.update(op.outputs)


def _experts(g: Level, parts: Parts) -> None:
    for op in g.plain:
        weights = g.weights.of(op)
        if op.primitive == "ragged_dot_general":
            parts.say(op.id, Kind.EXPERTS, "a ragged contraction: every row meets the weights of its own group")
        elif not weights and any(g.selects(m) for m in g.behind(*op.inputs[:2])):
            parts.say(op.id, Kind.EXPERTS, "its weights are some of a stack, by a choice")
        elif not weights and not parts.routed.isdisjoint(op.inputs[:2]):
            parts.say(op.id, Kind.EXPERTS, "it takes rows by a router's result")
        elif weights and op.id not in parts and parts.routed and (by := _scaled(g, op, parts)) is not None:
            parts.say(op.id, Kind.EXPERTS, f"op {by} scales its result by a router's")
    if not any(parts.get(op.id) is Kind.EXPERTS for op in g.plain):
        return
    for op in g.plain:
        if op.id not in parts and (not g.weights.of(op) or any(len(g.tensors[t].shape) > 2 for t in g.weights.of(op))):
            made = [m.id for m in g.behind(*op.inputs[:2]) if parts.get(m.id) is Kind.EXPERTS and m.id in g.barriers]
            if made:
                parts.say(op.id, Kind.EXPERTS, f"it takes what comes of op {made[0]}")
    for op in reversed(g.plain):
        readers = [r.id for r in g.ahead(op) if r.id in g.barriers]
        if op.id not in parts and readers and all(parts.get(r) is Kind.EXPERTS for r in readers):
            parts.say(op.id, Kind.EXPERTS, f"it feeds op {readers[0]} and its like alone")


def _scaled(g: Level, op: Op, parts: Parts) -> int | None:
    """The op that scales a result by what is made of a router's alone, if there is one before the next contraction."""
    for r in g.ahead(op):
        if r.primitive in ("mul", "select_n", "div") and not parts.routed.isdisjoint(r.inputs) and not parts.routed.issuperset(r.inputs):
            return r.id
    return None


def _activations(g: Level, parts: Parts) -> None:
    """Contractions of two activations."""
    for op in g.plain:
        if op.id in parts or g.weights.of(op):
            continue
        found = {r.primitive for r in g.ahead(op)}
        if {"exp", "exp2"} & found and "reduce_sum" in found:
            parts.say(op.id, Kind.ATTENTION, "two activations meet, and the result goes into a softmax")
        elif scores := [m.id for m in g.behind(*op.inputs[:2]) if parts.get(m.id) is Kind.ATTENTION]:
            parts.say(op.id, Kind.ATTENTION, f"two activations meet, one of them made of the scores of op {scores[0]}")
        elif _remembers(g, op):
            parts.say(op.id, Kind.RECURRENT, "two activations of several positions meet without a softmax")
        else:
            parts.say(op.id, Kind.MLP, "two activations of one position meet", 0.6)


def _remembers(g: Level, op: Op) -> bool:
    """Whether two activations meet across positions, and not at each; or one of them is made of a state, or makes one."""
    if g.tokens is None:
        return True
    if op.primitive == "dot_general" and g.tokens > 1:
        _, batch = op.params["dimension_numbers"]
        sides = [[size for d, size in enumerate(g.tensors[t].shape) if d not in dims] for t, dims in zip(op.inputs, batch, strict=True)]
        if all(g.tokens in side for side in sides):
            return True
    near = [op, *g.behind(*op.inputs[:2]), *g.ahead(op)]
    return any(recurs(o) or o.id in g.remembered or not g.weights.states.isdisjoint((*o.inputs, *o.outputs)) for o in near)


def _loops(g: Level, parts: Parts) -> None:
    """Loops and branches that mix positions: they hold contractions of activations alone, or carry a state along a sequence."""
    for op in g.nests:
        held = [o for body in bodies(op) for o in body.walk() if o.primitive in CONTRACTIONS]
        if held and not any(g.weights.of(o) for o in held):
            kind = Kind.ATTENTION if any(parts.get(o.id) is Kind.ATTENTION for o in held) else Kind.RECURRENT
            parts.say(op.id, kind, f"it holds contractions of two activations alone, such as op {held[0].id}")
        elif recurs(op):
            parts.say(op.id, Kind.RECURRENT, "a scan carries an array from step to step")


def _heads(g: Level, parts: Parts, known: bool) -> None:
    """Heads: what takes the weight of a head that is known; else what no contraction follows, up to a choice or to the end."""
    if known:
        for op in g.plain:
            if any(parts.weights.key(t) in parts.heads for t in g.weights.of(op)):
                parts.say(op.id, Kind.HEAD, "it takes the weight of a head")
        return
    if not g.whole:
        return
    last = [op for op in g.plain if op.id not in parts and g.weights.of(op) and op.id not in g.leads]
    chosen = [op for op in last if any(discretises(r, g.tensors) for r in g.ahead(op, residuals=True))]
    if not chosen and last and not any(parts.get(op.id) is Kind.HEAD for op in g.plain):
        chosen = [max(last, key=lambda op: (g.depth[op.id], op.id))]
    for op in chosen:
        parts.say(op.id, Kind.HEAD, "the last contraction with a weight; no other follows")
        parts.heads.update(parts.weights.key(t) for t in g.weights.of(op))


def _mixers(g: Level, parts: Parts) -> None:
    """Projections of attention and of recurrences: what takes their results before a residual, then what feeds nothing but them."""
    for op in g.ops:  # in program order, so that what takes a result is asked again in its turn
        if op.id in g.barriers and parts.get(op.id) in MIXERS:
            for other in g.ahead(op):
                if other.primitive in CONTRACTIONS:
                    parts.say(other.id, parts[op.id], f"it takes the result of op {op.id} before a residual")
    for op in reversed(g.plain):
        if op.id not in parts and (takers := _takers(g, parts, op.outputs)) and all(k in MIXERS for k in takers):
            kind, first = min(takers.items(), key=lambda taker: taker[1])
            if kind is Kind.ATTENTION and any(r.id in g.residuals for r in g.onward(*op.outputs)):
                continue  # it enters the residual stream too: a stem
            parts.say(op.id, kind or Kind.OTHER, f"up to the next residual it feeds op {first} and its like alone")


def _takers(g: Level, parts: Parts, tensors: Iterable[int]) -> dict[Kind | None, int]:
    """The parts that take some tensors, up to the next residual, in loops too -> the first op of each; None: one that is not told."""
    reached, found = set(tensors), dict[Kind | None, int]()
    for r in g.onward(*tensors):
        if r.id not in g.barriers:
            reached.update(r.outputs)
            continue
        inside = {k for inner, outer in entries(r) if outer in reached for k in parts.users.get(inner, ())} if parts.get(r.id) not in MIXERS else ()
        for kind in inside or (parts.get(r.id),):
            found.setdefault(kind, r.id)
    return found


def _handed(g: Level, parts: Parts) -> None:
    """What makes a value that the token loop takes into nothing but attention (or recurrences) is of them: keys and values of an encoder."""
    for t in (t for t in parts.handed if t in g.maker):
        kinds = set[Kind]().union(*(parts.users.get(inner, set()) for inner in parts.handed[t]))
        if len(kinds) == 1 and (kind := kinds.pop()) in MIXERS:
            for op in g.behind(t):
                if op.primitive in CONTRACTIONS and op.id not in parts:
                    parts.say(op.id, kind, f"what it makes is taken by {kind} in the token loop")
                    parts.lent[op.id] = parts.handed[t]


def _uses(g: Level, parts: Parts) -> None:
    """Note, of what a level is given, which parts take it."""
    for t in g.graph.inputs:
        parts.users[t] = {k for k in _takers(g, parts, (t,)) if k is not None}


def _states(g: Level, parts: Parts) -> None:
    """What makes a state that the next token takes, and what takes what that is made of, is recurrent."""
    for state in (t for t in sorted(g.weights.states) if t in g.maker):
        made = list(g.behind(state))
        makers = [op for op in made if op.id in g.barriers]
        for op in makers:
            if op.primitive in CONTRACTIONS:
                parts.say(op.id, Kind.RECURRENT, f"it makes the state {state} that the next token takes")
        if any(parts.get(op.id) is Kind.RECURRENT for op in makers):
            for op in made:
                for r in g.ahead(op):
                    if r.primitive in CONTRACTIONS:
                        parts.say(r.id, Kind.RECURRENT, f"it takes what the state {state} is made of")
