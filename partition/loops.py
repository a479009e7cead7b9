"""The token loop among other loops: which one feeds a chosen token back.

An autoregressive loop feeds a *chosen* token back: a carry slot travels through a contraction and a discretiser (an op that makes
integers or truth values of floats: argmax, top_k, sort, a comparison) back into itself. Layer scans carry floats round without
choosing, chunk loops choose nothing, routers choose but do not feed the choice back; integers that a cache is quantised to are used as
numbers and not as ids. So the token loop is the outermost loop with an integer slot that comes back through a contraction and then a
discretiser, and is looked up or compared in the body; or with a float slot (carried logits) that comes back through discretisers only.
One forward sweep with integers as bit sets (bit = carry slot) keeps this near-linear.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from partition.errors import PhaseError
from partition.graph import OPAQUE, Graph, Op, Tensor, bodies, entries

if TYPE_CHECKING:
    from partition.program import Program

CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
_WRITES = ("dynamic_update_slice", "scatter")
_REORDERS = frozenset({"gather", "select_n", "copy", "transpose", "reshape", "convert_element_type", "optimization_barrier"})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One decision of the tagger: what, why, and how sure it is.

    confidence: 1.0 said by the caller or true by construction; 0.9 the only structure that fits; 0.6 a rule of thumb decided.
    """

    what: str
    why: str
    confidence: float

    def __str__(self) -> str:
        return f"{self.what}: {self.why} (confidence {self.confidence:g})"


def _floating(t: Tensor) -> bool:
    return "float" in t.dtype


def holds(op: Op, primitives: frozenset[str]) -> bool:
    """Whether an op is one of these primitives, or has one somewhere inside."""
    return op.primitive in primitives or any(holds(o, primitives) for body in bodies(op) for o in body.ops)


_DISCRETISERS = frozenset({"argmax", "argmin", "top_k", "sort", "approx_top_k", "lt", "le", "gt", "ge", "eq", "ne"})


def discretises(op: Op, tensors: Sequence[Tensor]) -> bool:
    """Whether an op makes integers or truth values of floats by choosing; of an opaque op that makes them it is taken to choose."""
    makes = any(not _floating(tensors[t]) for t in op.outputs)
    reads_floats = any(_floating(tensors[t]) for t in op.inputs)
    return makes and reads_floats and (op.primitive in OPAQUE or holds(op, _DISCRETISERS))


_INDICES = {"gather": 1, "dynamic_slice": 1, "scatter": 1, "scatter-add": 1, "dynamic_update_slice": 2}
"""Where the indices begin among the operands."""
_COMPARED = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})


def names(graph: Graph, slot: int) -> bool:
    """Whether integers are used as ids: they (or integers made of them) index something, or are compared."""
    ids = {slot}
    for op in graph.ops:
        if ids.isdisjoint(op.inputs):
            continue
        if op.primitive in _COMPARED or op.primitive in OPAQUE or not ids.isdisjoint(op.inputs[_INDICES.get(op.primitive, len(op.inputs)) :][: 1 if op.primitive.startswith("scatter") else None]):
            return True
        for inner, outer in entries(op):
            body = next((b for b in bodies(op) if inner in b.inputs), None)
            if outer in ids and body is not None and names(body, inner):
                return True
        ids.update(t for t in op.outputs if not _floating(graph.tensors[t]))
    return False


def feedback(body: Graph, slots: range) -> tuple[list[int], list[str]]:
    """Which carry slots (by position among the body's outputs) bring a chosen token back, and why.

    `slots` are the positions of the carry among the body's inputs; the outputs start with the carry in the same order.
    """
    tensors = body.tensors
    reach: dict[int, int] = {body.inputs[i]: 1 << n for n, i in enumerate(slots)}
    mixed: dict[int, int] = {}  # slots that come through a contraction
    chosen: dict[int, int] = {}  # ... and then through a discretiser
    plain: dict[int, int] = dict(reach)  # slots with some path free of discretisers
    for op in body.ops:
        r = m = c = p = 0
        for t in op.inputs:
            r |= reach.get(t, 0)
            m |= mixed.get(t, 0)
            c |= chosen.get(t, 0)
            p |= plain.get(t, 0)
        if not r:
            continue
        if holds(op, CONTRACTIONS):
            m |= r
        chooses = discretises(op, tensors)
        for t in op.outputs:
            integral = chooses and not _floating(tensors[t])
            reach[t], mixed[t], chosen[t], plain[t] = r, m, c | m if integral else c, 0 if integral else p
    found, why = [], []
    for n, i in enumerate(slots):
        out, into = body.outputs[n], tensors[body.inputs[i]]
        bit = 1 << n
        if not _floating(into) and chosen.get(out, 0) & bit and (into.dtype == "bool" or names(body, into.id)):
            found.append(n)
            why.append(f"slot {n} ({into.dtype}{list(into.shape)}) comes back through a contraction and then a choice")
        elif _floating(into) and mixed.get(out, 0) & bit and not plain.get(out, 0) & bit:
            found.append(n)
            why.append(f"slot {n} ({into.dtype}{list(into.shape)}) comes back through a choice on every path")
    return found, why


def written(graph: Graph, out: int, into: int) -> bool:
    """Whether tensor `out` is `into` with parts written in place (dynamic_update_slice, scatter), maybe inside a layer scan."""
    seen_write = False
    while out != into:
        op = graph.producer.get(out)
        if op is None:
            return False
        if op.primitive.startswith(_WRITES):
            seen_write, out = True, op.inputs[0]
        elif op.loop is not None and op.loop.kind == "scan":
            loop, index = op.loop, op.outputs.index(out)
            inner = loop.body.outputs[index]
            if index < loop.carry:
                pairs = [(loop.body.inputs[loop.consts + index], op.inputs[loop.consts + index])]
            else:
                after = loop.consts + loop.carry
                pairs = list(zip(loop.body.inputs[after:], op.inputs[after:], strict=True))
            hit = next((outer for body_in, outer in pairs if written(loop.body, inner, body_in)), None)
            if hit is None:
                return False
            seen_write, out = True, hit
        elif op.primitive in _REORDERS and op.inputs:  # beams that are picked anew, a cache in another layout
            out = op.inputs[-1] if op.primitive == "select_n" else op.inputs[0]
        else:
            return False
    return seen_write


def find_token_loop(program: Program, loop: int | None = None) -> tuple[Op | None, tuple[Finding, ...]]:
    """The token loop of a program and the evidence; `loop` is the user's word and always wins.

    Raises PhaseError, with the candidates, where more than one fits or it lies inside another loop.
    """
    graph = program.graph
    if loop is not None:
        op = next((o for o in graph.ops if o.id == loop and o.loop is not None), None)
        if op is None:
            raise PhaseError(f"op {loop} is no loop of the top level", where=program.entry.name,
                             mend="loops there: " + (", ".join(f"{o.id} ({o.primitive})" for o in graph.ops if o.loop) or "none"))  # fmt: skip
        return op, (Finding(what=f"token loop is op {loop}", why="the caller says so", confidence=1.0),)
    if program.joint is not None:  # the request was made here: its token loop is the last thing that it does
        op = next(o for o in reversed(graph.ops) if o.loop is not None and o.loop.trips == program.joint.trips)
        why = "; ".join(("it runs the decode callable once a token", *program.joint.how))
        return op, (Finding(what=f"token loop is op {op.id} ({op.primitive})", why=why, confidence=1.0),)
    found: list[tuple[Op, list[str]]] = []
    nested: list[Op] = []
    top = {op.id for op in graph.ops}
    for op in (o for o in graph.walk() if o.loop is not None):
        assert op.loop is not None
        slots, reasons = feedback(op.loop.body, range(op.loop.consts, op.loop.consts + op.loop.carry))
        if slots and op.id in top:
            found.append((op, reasons))
        elif slots:
            nested.append(op)
    if len(found) > 1:
        raise PhaseError(f"{len(found)} loops feed a chosen token back", where=", ".join(f"op {o.id} at {program.source(o)}" for o, _ in found),
                         mend="say which: tag(program, loop=<op id>)")  # fmt: skip
    if not found and nested:
        raise PhaseError("the token loop lies inside another loop or branch", where=f"op {nested[0].id} at {program.source(nested[0])}",
                         mend="trace the function that holds the token loop on its top level")  # fmt: skip
    if not found:
        return None, ()
    op, reasons = found[0]
    return op, (Finding(what=f"token loop is op {op.id} ({op.primitive}) at {program.source(op)}", why="; ".join(reasons), confidence=0.9),)


def batch_of(token_loop: Op) -> int:
    """How many sequences a token loop serves: the fewest values that a slot with a shape brings back, or writes in place, else 1."""
    loop = token_loop.loop
    assert loop is not None
    slots, _ = feedback(loop.body, range(loop.consts, loop.consts + loop.carry))
    sizes = []
    for n in slots:
        slot, out = loop.body.tensors[loop.body.inputs[loop.consts + n]], loop.body.outputs[n]
        if slot.shape:
            sizes.append(math.prod(slot.shape[:-1]) if _floating(slot) else slot.size)  # of carried logits, all but the vocabulary
        sizes += [loop.body.tensors[t].size for t in written_by(loop.body, out)]
    return int(min(sizes, default=1))


def written_by(graph: Graph, out: int) -> list[int]:
    """The values that are written in place into a tensor on this level, the last one first."""
    found = []
    while (op := graph.producer.get(out)) is not None:
        if op.primitive.startswith(_WRITES):
            found.append(op.inputs[1] if op.primitive == "dynamic_update_slice" else op.inputs[2])
        elif op.primitive not in _REORDERS:
            break
        out = op.inputs[-1] if op.primitive == "select_n" else op.inputs[0]
    return found
