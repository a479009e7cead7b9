"""tag(): which phase each op is in, found in the structure alone, and the KV hand-off between the phases.

- The token loop's body is DECODE (`loops.py` finds it); what the loop needs and what depends on the inputs is PREFILL; what depends on
  weights and constants alone goes to the phase that needs it, BOTH if both do; what follows the loop is DECODE if it still reads
  weights, else NONE. A program without a token loop is told by its passes over the weights (`passes.py`).
- The hand-off is what PREFILL makes and the loop takes, as carry or as constant (without a loop: what DECODE ops read of it).

Every decision is a `Finding` with its reason and its confidence. The caller's word (`loop=`, `phases=`) always wins.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from partition.arguments import checked
from partition.errors import NameUnknownError, PhaseError
from partition.graph import Graph, Op, Role, bodies, held, to_nx, uncollected, weights
from partition.loops import Finding, batch_of, find_token_loop, written
from partition.passes import dependents, passes

if TYPE_CHECKING:
    import networkx as nx

    from partition.anatomy import Anatomy
    from partition.program import Program

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
    """The phase of every op by id (bodies included), the token loop (an op id, None if there is none), the hand-off, the evidence.

    batch is how many sequences run together: the size of the smallest slot that brings the chosen tokens back.
    """

    program: Program = dataclasses.field(repr=False)
    of: Mapping[int, Phase] = dataclasses.field(repr=False)
    loop: int | None
    handoff: tuple[Crossing, ...] = dataclasses.field(repr=False)
    findings: tuple[Finding, ...]
    batch: int = 1

    @property
    def how(self) -> tuple[str, ...]:
        """The findings as text."""
        return tuple(map(str, self.findings))

    @property
    def token_loop(self) -> Op | None:
        """The token loop's op, on the top level."""
        return None if self.loop is None else self.program.op[self.loop]

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """What part of the model each op is, and in which layer."""
        from partition.anatomy import anatomy

        return anatomy(self)

    @functools.cached_property
    def handoff_bytes(self) -> float:
        """Bytes of everything that crosses from prefill to decode."""
        return sum(c.nbytes for c in self.handoff)

    @functools.cached_property
    def handoff_by_layer(self) -> dict[int | None, float]:
        """Bytes that cross from prefill to decode, by the layer that makes them (None: outside of any); a scan of layers shares its own out."""
        graph, found = self.program.graph, dict[int | None, float]()
        for crossing in self.handoff:
            op, t = graph.producer[crossing.tensor], crossing.tensor
            while op.loop is not None and t in op.outputs and (inner := op.loop.body.outputs[op.outputs.index(t)]) in op.loop.body.producer:
                op, t = op.loop.body.producer[inner], inner
            layers = self.anatomy.layers.of[op.id] or (None,)
            for n in layers:
                found[n] = found.get(n, 0.0) + crossing.nbytes / len(layers)
        return found

    def ops(self, phase: Phase | str) -> list[Op]:
        """The ops of a phase: of the top level, and of the token loop's body in place of the loop. Raises NameUnknownError."""
        if phase not in list(Phase):
            raise NameUnknownError.among("phase", str(phase), map(str, Phase))
        return [op for op in _flat(self.program.graph, self.loop) if self.of[op.id] == Phase(phase)]

    def nx(self, phase: Phase | str) -> nx.DiGraph[int]:
        """A phase as a NetworkX DiGraph: op ids as nodes (primitive, scope, op), tensors and bytes on the edges."""
        return to_nx(self.ops(phase), self.program.graph.tensors, name=str(phase))

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.ops(p))} {p}" for p in Phase)
        at = ", ".join(f"{n} = {s}" for n, s in self.program.sizes.items())
        how = [f"sizes for shapes: {at} stand in for the program's symbols"] if at else []
        return "\n".join([f"{counts}; {len(self.handoff)} tensors cross ({self.handoff_bytes / 1e6:.4g} MB)", *how, *self.how])


def _flat(graph: Graph, loop: int | None) -> list[Op]:
    """Top-level ops with the token loop replaced by the ops of its condition and body."""
    out: list[Op] = []
    for op in graph.ops:
        out.extend([o for body in bodies(op) for o in body.ops] if op.id == loop else [op])
    return out


@uncollected()
@checked
def tag(program: Program, *, loop: int | Literal["none"] | None = None, phases: Mapping[int | str, Phase | str] | None = None) -> Phases:
    """Find the phase of every op and what crosses.

    The caller's word wins over what is found: `loop` names the token loop by op id, or "none" where there is none; `phases` gives the phase of ops by op id, or by
    scope (an op in that scope or below it). Raises PhaseError, with the candidates, where the structure is ambiguous, and where
    phases given for ops contradict the order in which they run.
    """
    graph = program.graph
    loops = find_token_loop(program, loop)
    token_loop, findings = loops.op, loops.findings
    of: dict[int, Phase] = {}
    if token_loop is None:
        single = passes(graph)
        of, batch, findings = {n: Phase(p) for n, p in single.of.items()}, single.batch, (*findings, *single.findings)
    else:
        of, batch = _around(graph, token_loop, loops.others), batch_of(token_loop)
    _by_need(graph, token_loop, of)
    given = _given(graph, phases or {})
    of.update(given)
    if token_loop is not None and of[token_loop.id] is not Phase.DECODE:  # the caller says that it is none
        token_loop, findings = None, ()
    for op in graph.ops:
        for inner in (o for body in bodies(op) for o in body.walk()):
            of[inner.id] = given.get(inner.id, of[op.id])
    if given:
        _hold(graph, of, program)
        findings = (Finding(what=f"{len(given)} ops are of the phase given", why="the caller says so", confidence=1.0), *findings)
    handoff = _handoff(graph, of) if token_loop is None else _loop_handoff(graph, (*loops.others, token_loop), of)
    return Phases(program=program, of=of, loop=token_loop.id if token_loop else None, handoff=handoff, findings=findings, batch=batch)


def _around(graph: Graph, token_loop: Op, others: Sequence[Op]) -> dict[int, Phase]:
    """The phases of ops that depend on inputs, before and after a token loop; other loops that choose tokens are decode as well."""
    tensors, of = graph.tensors, dict.fromkeys((token_loop.id, *(o.id for o in others)), Phase.DECODE)
    dynamic = {t for t in graph.inputs if tensors[t].role is Role.INPUT}
    weighty = weights(graph)
    after: set[int] = set()
    late: list[Op] = []  # ops that follow the loop
    for op in graph.ops:
        if op is token_loop or not after.isdisjoint(op.inputs):
            after.update(op.outputs)
            late += [op] if op is not token_loop else []
        elif not dynamic.isdisjoint(op.inputs):
            of.setdefault(op.id, Phase.PREFILL)
            dynamic.update(op.outputs)
        elif not weighty.isdisjoint(op.inputs):
            weighty.update(op.outputs)  # a weight in another form
    reads: set[int] = set()  # tensors on whose way to an output a weight is still read
    for op in reversed(late):
        decode = not weighty.isdisjoint(op.inputs) or not reads.isdisjoint(op.outputs)
        of.setdefault(op.id, Phase.DECODE if decode else Phase.NONE)
        reads.update(op.inputs if decode else ())
    return of


def _given(graph: Graph, wanted: Mapping[int | str, Phase | str]) -> dict[int, Phase]:
    """Op id -> the phase that the caller gives it. Raises PhaseError for an op, a scope or a phase that does not exist."""
    found: dict[int, Phase] = {}
    for key, phase in wanted.items():
        if phase not in list(Phase):
            raise NameUnknownError.among("phase", str(phase), map(str, Phase), where=f"phases[{key!r}]")
        hits = [o.id for o in graph.walk() if (o.id == key if isinstance(key, int) else f"{o.scope}/".startswith(f"{key}/"))]
        if not hits:
            raise PhaseError(f"no op is called {key!r}", where="tag(phases=...)", mend="give an op's id, or a scope as program.graph.ops have them")
        found.update(dict.fromkeys(hits, Phase(phase)))
    return found


def _hold(graph: Graph, of: Mapping[int, Phase], program: Program) -> None:
    """Raise PhaseError where prefill would need what decode makes."""
    for op in graph.ops:
        if of[op.id] in (Phase.PREFILL, Phase.BOTH):
            for maker in (graph.producer[t] for t in op.inputs if t in graph.producer):
                if of[maker.id] in (Phase.DECODE, Phase.NONE):
                    raise PhaseError(f"{of[op.id]} op {op.id} ({op.primitive}) needs what {of[maker.id]} op {maker.id} ({maker.primitive}) makes",
                                     where=program.source(op), mend="give both the same phase, or the later one decode")  # fmt: skip


def _by_need(graph: Graph, token_loop: Op | None, of: dict[int, Phase]) -> None:
    """Give every op that depends on weights and constants alone the phase of those who need it; fills `of` in place.

    The state that a loop starts from is prefill's product, as far as it is made of weights: only the loop's constants need it as decode.
    """
    needs: dict[int, set[Phase | str]] = {}
    weighty = dependents(graph, weights(graph))
    for op in reversed(graph.ops):
        if op.id not in of:
            wanted = {p for t in op.outputs for p in needs.get(t, ())}
            if Phase.BOTH in wanted or {Phase.PREFILL, Phase.DECODE} <= wanted:
                of[op.id] = Phase.BOTH
            elif Phase.PREFILL in wanted or (wanted == {"state"} and not weighty.isdisjoint(op.outputs)):
                of[op.id] = Phase.PREFILL
            else:
                of[op.id] = Phase.DECODE if wanted - {Phase.NONE} else Phase.NONE
        state = range(0)
        if op is token_loop and op.loop is not None:
            first = op.loop.cond_consts + op.loop.consts
            state = range(first, first + op.loop.carry)
        for n, t in enumerate(op.inputs):
            needs.setdefault(t, set()).add("state" if n in state else of[op.id])


def _handoff(graph: Graph, of: Mapping[int, Phase]) -> tuple[Crossing, ...]:
    """What decode ops read of what prefill made, without a loop between them."""
    crossings: dict[int, Crossing] = {}
    for op in (o for o in graph.ops if of[o.id] is Phase.DECODE):
        for n, t in enumerate(op.inputs):
            maker = graph.producer.get(t)
            if maker is not None and of[maker.id] is Phase.PREFILL:
                cache = n == 0 and op.primitive.startswith(("dynamic_update_slice", "scatter"))
                if t not in crossings or cache:
                    crossings[t] = Crossing(tensor=t, kind="cache" if cache else "value", nbytes=graph.tensors[t].nbytes, scope=maker.scope)
    return tuple(crossings.values())


def _loop_handoff(graph: Graph, token_loops: Sequence[Op], of: Mapping[int, Phase]) -> tuple[Crossing, ...]:
    crossings: dict[int, Crossing] = {}
    for op in token_loops:
        loop = op.loop
        assert loop is not None
        first = loop.cond_consts + loop.consts
        for n, t in enumerate(op.inputs):
            made_by = graph.producer.get(t)
            if made_by is None or of[made_by.id] is not Phase.PREFILL or t in crossings:
                continue
            slot = n - first
            cache = 0 <= slot < loop.carry and written(loop.body, loop.body.outputs[slot], loop.body.inputs[loop.consts + slot])
            crossings[t] = Crossing(tensor=t, kind="cache" if cache else "value", nbytes=graph.tensors[t].nbytes, scope=made_by.scope)
    return tuple(crossings.values())


def is_weight(program: Program) -> frozenset[int]:
    """Tensor ids that are weights, or slices of weights inside a body."""
    return frozenset(held(program.graph))
