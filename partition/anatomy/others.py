"""Which part of the model every op that is no contraction belongs to.

A reduction whose outcome scales what it was taken of is a NORM; an in-place update of state is a STATE write; a look-up of tokens in a
weight is the EMBEDDING; what lies after the head up to the chosen token is SAMPLING; the rest goes with what it feeds, or comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from partition.anatomy.levels import Kind, Level
from partition.anatomy.parts import Parts
from partition.graph import Op, Role
from partition.loops import discretises

_SCALES = ("mul", "div", "add", "sub", "convert_element_type", "broadcast_in_dim")


def others(g: Level, parts: Parts) -> None:
    """Tell the ops of a level that are no contraction."""
    heads = [op for op in g.ops if parts.get(op.id) is Kind.HEAD]
    after = {r.id for op in heads for r in g.ahead(op, residuals=True)}
    for op in g.ops:
        if op.id in parts:
            continue
        if op.primitive == "gather" and op.inputs[0] in g.weights and not any(discretises(m, g.tensors) and m.primitive != "lt" for m in g.behind(op.inputs[1])):
            parts.say(op.id, Kind.EMBEDDING, "rows of a weight are looked up")
        elif op.primitive.startswith(("dynamic_update_slice", "scatter")) and _is_state(g, op):
            parts.say(op.id, Kind.STATE, "a buffer is written in place")
        elif op.id in after:
            parts.say(op.id, Kind.SAMPLING, "it follows the head")
        elif op.primitive in ("rsqrt", "sqrt") and any(m.primitive == "reduce_sum" for m in g.behind(op.inputs[0])):
            parts.say(op.id, Kind.NORM, "the root of a sum")
            for r in _scaled(g, op):
                parts.say(r.id, Kind.NORM, f"it scales by op {op.id}")
    _spread(g, parts)


def _scaled(g: Level, op: Op) -> Iterator[Op]:
    """What a norm's factor is multiplied with, and then with weights, up to a contraction or a residual."""
    made = list(op.outputs)
    for n, t in enumerate(made):
        for r in g.readers.get(t, ()):
            others = [i for i in r.inputs if i != t and i not in g.weights and g.tensors[i].role is Role.ACTIVATION]
            if r.primitive in _SCALES and r.id not in g.residuals and (not others or n < len(op.outputs)):
                yield r
                made += [o for o in r.outputs if o not in made]


def _is_state(g: Level, op: Op) -> bool:
    """Whether an update goes into a buffer: an operand from outside, or zeros."""
    buffer = op.inputs[0]
    while buffer in g.maker and g.maker[buffer].primitive in ("broadcast_in_dim", "convert_element_type", "reshape", "copy"):
        if not g.maker[buffer].inputs or g.tensors[g.maker[buffer].inputs[0]].role is Role.LITERAL:
            return True
        buffer = g.maker[buffer].inputs[0]
    return buffer not in g.maker


_RANK = {kind: n for n, kind in enumerate((Kind.ATTENTION, Kind.RECURRENT, Kind.ROUTER, Kind.EXPERTS, Kind.MLP, Kind.HEAD, Kind.SAMPLING, Kind.EMBEDDING, Kind.NORM, Kind.STATE, Kind.OTHER))}  # fmt: skip
"""Which part an op goes with that stands between several."""


def _spread(g: Level, parts: Parts) -> None:
    """Give every op left the part of what reads it; where that is a residual or a state, of what makes it."""
    def told(found: Iterable[Op], but: Kind | None = None) -> int | None:
        ranked = [(_RANK[parts[op.id]], op.id) for op in found if op.id in parts and parts[op.id] is not but]
        return min(ranked)[1] if ranked else None

    for op in reversed(g.ops):
        ahead = g.reads(op)
        stays = op.id in parts.residuals or any(r.id in parts.residuals for r in ahead)
        if op.id not in parts and not stays and (n := told(ahead, but=Kind.STATE)) is not None:
            parts.say(op.id, parts[n], f"it feeds op {n}", 0.6)
    for op in (o for o in g.ops if o.id not in parts):
        makers = [g.maker[t] for t in op.inputs if t in g.maker]
        if (n := told(m for m in makers if not {op.id, m.id} <= parts.residuals)) is not None:
            parts.say(op.id, parts[n], f"it comes of op {n}", 0.6)
    for op in (o for o in reversed(g.ops) if o.id not in parts):
        if (n := told(g.reads(op))) is not None:
            parts.say(op.id, parts[n], f"it feeds op {n}", 0.6)
