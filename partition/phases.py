"""tag(): which phase each op is in, found in the structure alone, and the KV hand-off between the phases.

How it decides. An autoregressive loop feeds a *chosen* token back: a carry slot travels through a contraction and a discretiser
(an op that makes integers or truth values of floats: argmax, top_k, sort, a comparison) back into itself. Layer scans carry
floats round without choosing, chunk loops choose nothing, routers choose but do not feed the choice back. So:

- the token loop is the outermost loop with an integer slot that comes back through a contraction and then a discretiser, or with a
  float slot (carried logits) that comes back through discretisers only;
- its body is DECODE; what the loop needs and what depends on the inputs is PREFILL; what depends on weights and constants alone
  goes to the phase that needs it, BOTH if both do; what follows the loop is DECODE if it still reads weights, else NONE;
- the hand-off is what PREFILL makes and the loop takes, as carry or as constant.

One forward sweep with integers as bit sets (bit = carry slot) keeps this near-linear.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from partition.errors import PhaseError
from partition.graph import Graph, Op, Role, Tensor, bodies, roots, to_nx

if TYPE_CHECKING:
    import networkx as nx

    from partition.program import Program

CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
_WRITES = ("dynamic_update_slice", "scatter")


class Phase(enum.StrEnum):
    """The phase of an op of an inference program."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"
    NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """One tensor that PREFILL makes and the token loop takes. `kind` is "cache" where the loop writes into it, else "value"."""

    tensor: int
    kind: str
    nbytes: float
    scope: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases:
    """The phase of every op by id (bodies included), the token loop (an op id, None if there is none), the hand-off, the reasons.

    batch is how many sequences run together: the size of the smallest slot that brings the chosen tokens back.
    """

    program: Program = dataclasses.field(repr=False)
    of: Mapping[int, Phase] = dataclasses.field(repr=False)
    loop: int | None
    handoff: tuple[Crossing, ...] = dataclasses.field(repr=False)
    how: tuple[str, ...]
    batch: int = 1

    @property
    def token_loop(self) -> Op | None:
        """The token loop's op, on the top level."""
        return None if self.loop is None else self.program.op[self.loop]

    @functools.cached_property
    def handoff_bytes(self) -> float:
        """Bytes of everything that crosses from prefill to decode."""
        return sum(c.nbytes for c in self.handoff)

    def ops(self, phase: Phase | str) -> list[Op]:
        """The ops of a phase: of the top level, and of the token loop's body in place of the loop."""
        return [op for op in _flat(self.program.graph, self.loop) if self.of[op.id] == Phase(phase)]

    def nx(self, phase: Phase | str) -> nx.DiGraph[int]:
        """A phase as a NetworkX DiGraph: op ids as nodes (primitive, scope, op), tensors and bytes on the edges."""
        return to_nx(self.ops(phase), self.program.graph.tensors, name=str(phase))

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.ops(p))} {p}" for p in Phase)
        return "\n".join([f"{counts}; {len(self.handoff)} tensors cross ({self.handoff_bytes / 1e6:.4g} MB)", *self.how])


def _flat(graph: Graph, loop: int | None) -> list[Op]:
    """Top-level ops with the token loop replaced by the ops of its condition and body."""
    out: list[Op] = []
    for op in graph.ops:
        out.extend([o for body in bodies(op) for o in body.ops] if op.id == loop else [op])
    return out


def _floating(t: Tensor) -> bool:
    return "float" in t.dtype


def _contains(op: Op, test: str) -> bool:
    """Whether an op is, or somewhere inside has, a contraction or a discretiser."""
    return any(_is(o, test) or (bool(bodies(o)) and _contains(o, test)) for body in bodies(op) for o in body.ops)


def _is(op: Op, test: str) -> bool:
    return op.primitive in CONTRACTIONS if test == "contraction" else op.primitive in _DISCRETISERS


_DISCRETISERS = frozenset({"argmax", "argmin", "top_k", "sort", "approx_top_k", "lt", "le", "gt", "ge", "eq", "ne"})


def _discretises(op: Op, tensors: list[Tensor]) -> bool:
    makes = any(not _floating(tensors[t]) for t in op.outputs)
    reads_floats = any(_floating(tensors[t]) for t in op.inputs)
    return makes and reads_floats and (op.primitive in _DISCRETISERS or _contains(op, "discretiser"))


def feedback(body: Graph, slots: range) -> tuple[list[int], list[str]]:
    """Which carry slots (by position among the body's outputs) bring a chosen token back, and why.

    `slots` are the positions of the carry among the body's inputs; the outputs start with the carry in the same order.
    """
    tensors: list[Tensor] = body.tensors  # type: ignore[assignment]
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
        if op.primitive in CONTRACTIONS or _contains(op, "contraction"):
            m |= r
        discretises = _discretises(op, tensors)
        for t in op.outputs:
            integral = discretises and not _floating(tensors[t])
            reach[t], mixed[t], chosen[t], plain[t] = r, m, c | m if integral else c, 0 if integral else p
    found, why = [], []
    for n, i in enumerate(slots):
        out, into = body.outputs[n], tensors[body.inputs[i]]
        bit = 1 << n
        if not _floating(into) and chosen.get(out, 0) & bit:
            found.append(n)
            why.append(f"slot {n} ({into.dtype}{list(into.shape)}) comes back through a contraction and then a choice")
        elif _floating(into) and mixed.get(out, 0) & bit and not plain.get(out, 0) & bit:
            found.append(n)
            why.append(f"slot {n} ({into.dtype}{list(into.shape)}) comes back through a choice on every path")
    return found, why


def _written(graph: Graph, out: int, into: int) -> bool:
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
            hit = next((outer for body_in, outer in pairs if _written(loop.body, inner, body_in)), None)
            if hit is None:
                return False
            seen_write, out = True, hit
        else:
            return False
    return seen_write


def find_token_loop(program: Program, loop: int | None = None) -> tuple[Op | None, tuple[str, ...]]:
    """The token loop of a program and the evidence; `loop` is the user's word and always wins."""
    graph = program.graph
    if loop is not None:
        op = next((o for o in graph.ops if o.id == loop and o.loop is not None), None)
        if op is None:
            raise PhaseError(f"op {loop} is no loop of the top level", where=program.entry.name,
                             mend="loops there: " + (", ".join(f"{o.id} ({o.primitive})" for o in graph.ops if o.loop) or "none"))  # fmt: skip
        return op, (f"op {loop} is the token loop because the caller says so",)
    if program.joint is not None:  # the request was made here: its token loop is the last thing that it does
        op = next(o for o in reversed(graph.ops) if o.loop is not None and o.loop.trips == program.joint.trips)
        return op, (f"token loop: op {op.id} ({op.primitive}), the decode callable once a token", *program.joint.how)
    found: list[tuple[Op, list[str]]] = []
    nested: list[Op] = []
    for op in graph.walk():
        if op.loop is None:
            continue
        slots, why = feedback(op.loop.body, range(op.loop.consts, op.loop.consts + op.loop.carry))
        if slots:
            (found if any(op is o for o in graph.ops) else nested).append((op, why) if any(op is o for o in graph.ops) else op)  # type: ignore[arg-type]
    if len(found) > 1:
        raise PhaseError(f"{len(found)} loops feed a chosen token back", where=", ".join(f"op {o.id} at {program.source(o)}" for o, _ in found),
                         mend="say which: tag(program, loop=<op id>)")  # fmt: skip
    if not found and nested:
        raise PhaseError("the token loop lies inside another loop or branch", where=f"op {nested[0].id} at {program.source(nested[0])}",
                         mend="trace the function that holds the token loop on its top level")  # fmt: skip
    if not found:
        return None, ("no loop feeds a chosen token back: one phase",)
    op, why = found[0]
    return op, (f"token loop: op {op.id} ({op.primitive}) at {program.source(op)}", *why)


def tag(program: Program, *, loop: int | None = None) -> Phases:
    """Find the phase of every op and what crosses. `loop` names the token loop by op id and overrides the search.

    Raises PhaseError, with the candidates, where the structure is ambiguous.
    """
    graph, tensors = program.graph, program.graph.tensors
    token_loop, how = find_token_loop(program, loop)
    of: dict[int, Phase] = {}
    if token_loop is None:
        of = {op.id: Phase.NONE for op in graph.walk()}
        return Phases(program=program, of=of, loop=None, handoff=(), how=how)
    dynamic = {t for t in graph.inputs if tensors[t].role is Role.INPUT}
    weighty = {t for t in graph.inputs if tensors[t].role is Role.PARAM}
    after: set[int] = set()
    late: list[Op] = []  # ops that follow the loop
    for op in graph.ops:
        if op is token_loop or not after.isdisjoint(op.inputs):
            after.update(op.outputs)
            late += [op] if op is not token_loop else []
        elif not dynamic.isdisjoint(op.inputs):
            of[op.id] = Phase.PREFILL
            dynamic.update(op.outputs)
        elif not weighty.isdisjoint(op.inputs):
            weighty.update(op.outputs)  # a weight in another form
    reads: set[int] = set()  # tensors on whose way to an output a weight is still read
    for op in reversed(late):
        decode = not weighty.isdisjoint(op.inputs) or not reads.isdisjoint(op.outputs)
        of[op.id] = Phase.DECODE if decode else Phase.NONE
        reads.update(op.inputs if decode else ())
    _by_need(graph, token_loop, of)
    for op in graph.ops:
        for inner in (o for body in bodies(op) for o in body.walk()):
            of[inner.id] = of[op.id]
    handoff = _handoff(graph, token_loop, of)
    return Phases(program=program, of=of, loop=token_loop.id, handoff=handoff, how=how, batch=_batch(token_loop))


def _batch(token_loop: Op) -> int:
    loop = token_loop.loop
    assert loop is not None
    slots, _ = feedback(loop.body, range(loop.consts, loop.consts + loop.carry))
    fed = [loop.body.tensors[loop.body.inputs[loop.consts + n]] for n in slots]
    sizes = [math.prod(t.shape[:-1]) if _floating(t) else t.size for t in fed]  # of carried logits, all but the vocabulary
    return int(min(sizes)) if sizes else 1


def _by_need(graph: Graph, token_loop: Op, of: dict[int, Phase]) -> None:
    """Give every op that depends on weights and constants alone the phase of those who need it; fills `of` in place."""
    of[token_loop.id] = Phase.DECODE
    needs: dict[int, set[Phase]] = {}
    for op in reversed(graph.ops):
        if op.id not in of:
            wanted = {p for t in op.outputs for p in needs.get(t, ())}
            phases = {Phase.PREFILL, Phase.DECODE} & wanted
            both = len(phases) == 2 or Phase.BOTH in wanted
            of[op.id] = Phase.BOTH if both else phases.pop() if phases else Phase.NONE
        for t in op.inputs:
            needs.setdefault(t, set()).add(of[op.id])


def _handoff(graph: Graph, token_loop: Op, of: Mapping[int, Phase]) -> tuple[Crossing, ...]:
    loop = token_loop.loop
    assert loop is not None
    first = loop.cond_consts + loop.consts
    crossings: dict[int, Crossing] = {}
    for n, t in enumerate(token_loop.inputs):
        made_by = graph.producer.get(t)
        if made_by is None or of[made_by.id] is not Phase.PREFILL or t in crossings:
            continue
        slot = n - first
        cache = 0 <= slot < loop.carry and _written(loop.body, loop.body.outputs[slot], loop.body.inputs[loop.consts + slot])
        crossings[t] = Crossing(tensor=t, kind="cache" if cache else "value", nbytes=graph.tensors[t].nbytes, scope=made_by.scope)
    return tuple(crossings.values())


def is_weight(program: Program) -> frozenset[int]:
    """Tensor ids that are weights, or slices of weights inside a body."""
    params = {t for t in program.graph.inputs if program.graph.tensors[t].role is Role.PARAM}
    return frozenset(params | {inner for inner, outer in roots(program.graph).items() if outer in params})
