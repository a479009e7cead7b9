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
from typing import TYPE_CHECKING, Literal

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


_CASTS = frozenset({"convert_element_type", "bitcast_convert_type", "is_finite"})
"""They make integers or truth values of floats without choosing."""


def discretises(op: Op, tensors: Sequence[Tensor]) -> bool:
    """Whether an op makes integers or truth values of floats by choosing: itself (an argmax, a comparison, an opaque op), or inside."""
    makes = any(not _floating(tensors[t]) for t in op.outputs)
    reads_floats = any(_floating(tensors[t]) for t in op.inputs)
    inside = bodies(op)
    if not makes or not reads_floats:
        return False
    return op.primitive not in _CASTS if not inside else any(discretises(o, tensors) for body in inside for o in body.ops)


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


_Bits = tuple[int, int, int, int]
_NONE: _Bits = (0, 0, 0, 0)


def feedback(body: Graph, slots: range) -> tuple[list[int], list[str]]:
    """Which carry slots (by position among the body's outputs) bring a chosen token back, and why.

    `slots` are the positions of the carry among the body's inputs; the outputs start with the carry in the same order.
    """
    tensors = body.tensors
    known: dict[int, _Bits] = {body.inputs[i]: (1 << n, 0, 0, 1 << n) for n, i in enumerate(slots)}
    _sweep(body, known)
    found, why = [], []
    for n, i in enumerate(slots):
        _, mixed, chosen, plain = known.get(body.outputs[n], _NONE)
        into, bit = tensors[body.inputs[i]], 1 << n
        if not _floating(into) and into.dtype != "bool" and chosen & bit and names(body, into.id):
            found.append(n)
            why.append(f"slot {n} ({into.dtype}{list(into.shape)}) comes back through a contraction and then a choice")
        elif _floating(into) and mixed & bit and not plain & bit:
            found.append(n)
            why.append(f"slot {n} ({into.dtype}{list(into.shape)}) comes back through a choice on every path")
    return found, why


def _sweep(level: Graph, known: dict[int, _Bits]) -> None:
    """Carry on, from tensor to tensor, which slots each depends on: at all, through a contraction, then a choice, without any choice."""
    tensors = level.tensors
    for op in level.ops:
        r = m = c = p = 0
        for t in op.inputs:
            if t in known:
                x = known[t]
                r, m, c, p = r | x[0], m | x[1], c | x[2], p | x[3]
        if not r:
            continue
        if bodies(op):
            _sweep_inside(op, known)
            continue
        if op.primitive in CONTRACTIONS:
            m |= r
        chooses = discretises(op, tensors)
        for t in op.outputs:
            integral = chooses and not _floating(tensors[t])
            known[t] = (r, m, c | m if integral else c, 0 if integral else p)


def _sweep_inside(op: Op, known: dict[int, _Bits]) -> None:
    """The same through a loop, until its carry brings nothing new, or through branches; what decides for a branch is in all results."""
    loop, inside = op.loop, bodies(op)
    for inner, outer in entries(op):
        known[inner] = _join(known.get(inner, _NONE), known.get(outer, _NONE))
    for _ in range(4 if loop is not None else 1):
        for body in inside:
            _sweep(body, known)
        if loop is None:
            break
        carry = list(zip(loop.body.inputs[loop.consts :], loop.body.outputs[: loop.carry], strict=False))
        joined = {i: _join(known.get(i, _NONE), known.get(o, _NONE)) for i, o in carry}
        if all(known.get(i, _NONE) == bits for i, bits in joined.items()):
            break
        known.update(joined)
    decides = known.get(op.inputs[0], _NONE) if op.primitive == "cond" else _NONE
    for n, t in enumerate(op.outputs):
        bits = decides
        for body in (loop.body,) if loop is not None else inside:
            if n < len(body.outputs):
                bits = _join(bits, known.get(body.outputs[n], _NONE))
        if loop is not None and n < loop.carry:
            bits = _join(bits, known.get(op.inputs[loop.cond_consts + loop.consts + n], _NONE))
        known[t] = bits


def _join(a: _Bits, b: _Bits) -> _Bits:
    return (a[0] | b[0], a[1] | b[1], a[2] | b[2], a[3] | b[3])


def looked_up(graph: Graph, slot: int) -> int:
    """The rows of the largest table of floats that integers are looked up in, 0 for none."""
    ids, rows = {slot}, 0
    for op in graph.ops:
        if ids.isdisjoint(op.inputs):
            continue
        table = graph.tensors[op.inputs[0]]
        if op.primitive == "gather" and op.inputs[1] in ids and _floating(table) and len(table.shape) == 2:
            rows = max(rows, int(table.shape[0]))
        for body in bodies(op):
            rows = max([rows, *(looked_up(body, inner) for inner, outer in entries(op) if outer in ids and inner in body.inputs)])
        ids.update(t for t in op.outputs if not _floating(graph.tensors[t]))
    return rows


def places(graph: Graph, out: int, axis: int, into: int | None = None) -> int | None:
    """How many places along an axis a tensor was written in, in place, since it was `into` (or made); None where that is not told."""
    total = 0
    while out != into:
        op = graph.producer.get(out)
        if op is None:
            return total or None
        tensors = graph.tensors
        if op.primitive == "dynamic_update_slice":
            total += int(tensors[op.inputs[1]].shape[axis])
            out = op.inputs[0]
        elif op.primitive == "pad":
            return total + int(tensors[op.inputs[0]].shape[axis])
        elif op.loop is not None and op.loop.kind == "scan" and op.outputs.index(out) >= op.loop.carry and axis > 0:
            index, after = op.outputs.index(out), op.loop.consts + op.loop.carry
            inner, slices = op.loop.body.outputs[index], op.loop.body.inputs[after:]
            pair = next(((i, o) for i, o in zip(slices, op.inputs[after:], strict=True) if written(op.loop.body, inner, i)), (None, None))
            inside = places(op.loop.body, inner, axis - 1, pair[0])
            if inside is None or pair[1] is None:
                return None if inside is None else total + inside
            total, out = total + inside, pair[1]
        elif op.primitive in _REORDERS - {"transpose", "reshape", "gather"} and op.inputs and tensors[op.inputs[0]].shape == tensors[out].shape:
            out = op.inputs[-1] if op.primitive == "select_n" else op.inputs[0]
        else:
            return total or None
    return total


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoops:
    """The token loop of a program, None if it has none; the other loops of its level that feed a chosen token back; the evidence."""

    op: Op | None
    others: tuple[Op, ...] = ()
    findings: tuple[Finding, ...] = ()


def find_token_loop(program: Program, loop: int | Literal["none"] | None = None) -> TokenLoops:
    """Find the token loop; `loop` is the user's word and always wins, "none" too. Of several on the top level (turns of a chat) it is the last.

    Raises PhaseError, with the candidates, where it lies inside another loop or branch.
    """
    if loop == "none":
        return TokenLoops(op=None, findings=(Finding(what="no token loop", why="the caller says so", confidence=1.0),))
    graph = program.graph
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
    if loop is not None:
        given = next((o for o in graph.ops if o.id == loop and o.loop is not None), None)
        if given is None:
            raise PhaseError(f"op {loop} is no loop of the top level", where=program.entry.name,
                             mend="loops there: " + (", ".join(f"{o.id} ({o.primitive})" for o in graph.ops if o.loop) or "none"))  # fmt: skip
        why, known = "the caller says so", any(o is given for o, _ in found)
        return _loops(given, why if known else f"{why}; no token that it chooses comes back", 1.0, found)
    if program.joint is not None:  # the request was made here: its token loop is the last thing that it does
        own = next((o for o in reversed(graph.ops) if o.loop is not None and o.loop.trips == program.joint.trips), None)
        if own is None:
            raise PhaseError("nothing that the joined request returns depends on its decode steps", where=program.entry.name, mend="let decode return logits or the chosen token")
        return _loops(own, "; ".join(("it runs the decode callable once a token", *program.joint.how)), 1.0, found)
    if not found and nested:
        raise PhaseError("the token loop lies inside another loop or branch", where="; ".join(f"op {o.id} at {program.source(o)}" for o in nested),
                         mend="trace the function that holds the token loop on its top level, or where that chooses no token: tag(program, loop='none')")  # fmt: skip
    if not found:
        return TokenLoops(op=None)
    op, reasons = found[-1]
    return _loops(op, f"at {program.source(op)}, {'; '.join(reasons)}", 0.9, found)


def _loops(op: Op, why: str, confidence: float, found: Sequence[tuple[Op, list[str]]]) -> TokenLoops:
    others = tuple(o for o, _ in found if o is not op)
    findings = [Finding(what=f"token loop is op {op.id} ({op.primitive})", why=why, confidence=confidence)]
    findings += [Finding(what=f"op {o.id} ({o.primitive}) is decode too", why=f"an earlier or later turn: {reasons[0]}", confidence=0.9) for o, reasons in found if o is not op]
    return TokenLoops(op=op, others=others, findings=tuple(findings))


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
