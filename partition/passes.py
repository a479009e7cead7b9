"""Phases of a program without a token loop: tokens unrolled in Python, one callable of either phase, both side by side, or training.

- Unrolled: a token is chosen from what a weight made of a prompt, and then looked up in the table that the prompt was looked up in. What
  precedes the first such look-up is PREFILL, what follows it DECODE.
- Else each pass over the weights stands alone (no activation leads from one to another). A pass that reads one token a sequence and
  hands on a state that it was given is DECODE, any other PREFILL. One pass: the program is of one phase. Both: a step of continuous
  batching.
- A program that gives back most of its weights changed, or a gradient of their shapes, trains: it has no phase of inference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from partition.graph import Graph, Op, Role, Tensor, components, weights
from partition.loops import CONTRACTIONS, Finding, discretises, holds, looked_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
    """Op id -> "prefill", "decode" or "none", for ops that depend on inputs; how many sequences run together; the evidence."""

    of: dict[int, str]
    batch: int
    findings: tuple[Finding, ...]


def passes(graph: Graph) -> Passes:
    """Find the phases of the ops of a program that has no token loop."""
    moving = dependents(graph, (t for t in graph.inputs if graph.tensors[t].role is Role.INPUT))
    if (share := trained(graph)) >= 0.5:
        why = f"{share:.0%} of the weights come back with another value of their own shape"
        return Passes(of={op.id: "none" for op in graph.ops}, batch=1, findings=(Finding(what="no phase of inference", why=why, confidence=0.9),))
    unrolled = _unrolled(graph, moving)
    if unrolled is not None:
        return unrolled
    found = [p for p in components(op for op in graph.ops if not moving.isdisjoint(op.inputs)) if any(holds(op, CONTRACTIONS) for op in p)]
    if not found:
        why = "nothing that depends on an input is contracted with anything"
        return Passes(of={}, batch=1, findings=(Finding(what="no phase of inference", why=why, confidence=0.6),))
    of: dict[int, str] = {}
    findings, batches = [], []
    for ops in found:
        queries, sequences, state = _reads(graph, ops)
        phase = "decode" if queries == 1 and state else "prefill"
        of.update((op.id, phase) for op in ops)
        batches.append(sequences)
        findings.append(Finding(what=f"one pass of {len(ops)} ops is {phase}", confidence=0.6 if len(found) == 1 else 0.9,
                                why=f"it reads {queries} token{'s'[:queries != 1]} of each of {sequences} sequences and hands on {state} tensors of state"))  # fmt: skip
    if len(set(of.values())) == 1:
        findings.insert(0, Finding(what="one phase", why="no token that the program chooses is read again in it", confidence=0.9))
    return Passes(of=of, batch=max(batches), findings=tuple(findings))


def dependents(graph: Graph, sources: Iterable[int]) -> set[int]:
    """Tensors of the top level that depend on some others, those included."""
    found = set(sources)
    for op in graph.ops:
        if not found.isdisjoint(op.inputs):
            found.update(op.outputs)
    return found


def trained(graph: Graph) -> float:
    """Which share of the float weights has a result of its own shape and dtype that an op made: new weights, or gradients."""
    tensors = graph.tensors
    params = [t for t in graph.inputs if tensors[t].role is Role.PARAM and "float" in tensors[t].dtype]
    made = [(tensors[t].shape, tensors[t].dtype) for t in graph.outputs if t in graph.producer]
    if len(params) == 1:  # a coincidence of shapes is likely: the new weight must come straight from the old one
        return float(any(params[0] in graph.producer[t].inputs and _replaces(graph, t, params[0]) for t in graph.outputs if t in graph.producer))
    hits = 0
    for t in params:
        if (key := (tensors[t].shape, tensors[t].dtype)) in made:
            made.remove(key)
            hits += 1
    return hits / len(params) if params else 0.0


def _replaces(graph: Graph, new: int, old: int) -> bool:
    """Whether a result is a weight plus something, or what a loop's carry makes of it."""
    op = graph.producer[new]
    if op.loop is not None:
        slot = op.outputs.index(new)
        return slot < op.loop.carry and op.inputs[op.loop.cond_consts + op.loop.consts + slot] == old
    return op.primitive in ("add", "sub")


def _unrolled(graph: Graph, moving: set[int]) -> Passes | None:
    """Tokens that are written one after the other without a loop; None where none is."""
    tensors: Sequence[Tensor] = graph.tensors
    weighty = dependents(graph, weights(graph)) - moving
    level: dict[int, int] = {}
    mixed: set[int] = set()  # came through a contraction
    chosen: dict[int, int] = {}  # was chosen at this level, and not looked up since
    tables: set[int] = set()
    first: Op | None = None
    feeding: set[int] = set()  # chosen tokens on their way to the next look-up
    for op in graph.ops:
        at, choice = max((level.get(t, 0) for t in op.inputs), default=0), max((chosen.get(t, -1) for t in op.inputs), default=-1)
        table = next((t for t in op.inputs if t in weighty), None) if op.primitive in ("gather", "dot_general") else None
        if table is not None and op.primitive == "gather" and choice < 0 and any(t in moving for t in op.inputs):
            tables.add(table)
        elif table is not None and choice >= 0 and table in tables:
            at = max(at, choice + 1)
            feeding.update(t for t in op.inputs if chosen.get(t, -1) >= 0)
            first = first or op
        through = holds(op, CONTRACTIONS) or not mixed.isdisjoint(op.inputs)
        picks = through and discretises(op, tensors)
        for t in op.outputs:
            level[t] = at
            if through:
                mixed.add(t)
            if picks and "float" not in tensors[t].dtype:
                chosen[t] = at
            elif choice >= 0 and table is None and op.primitive not in CONTRACTIONS:
                chosen[t] = choice
    if first is None:
        return None
    of: dict[int, str] = {}
    ahead: set[int] = set()  # tensors on whose way a weight is still read
    for op in reversed(graph.ops):
        on_the_way = not feeding.isdisjoint(op.outputs) and any(chosen.get(t, -1) >= 0 for t in op.inputs)
        feeding.update(t for t in op.inputs if on_the_way and chosen.get(t, -1) >= 0)
        goes_on = not weighty.isdisjoint(op.inputs) or not ahead.isdisjoint(op.outputs)
        ahead.update(op.inputs if goes_on else ())
        if moving.isdisjoint(op.outputs):
            continue
        after = not goes_on and all(chosen.get(t, -1) >= 0 for t in op.inputs if tensors[t].role is Role.ACTIVATION)
        of[op.id] = "none" if after else "decode" if on_the_way or max(level[t] for t in op.outputs) else "prefill"
    why = f"a token that it chose is looked up again in the prompt's table {max(level.values())} times, first by op {first.id}"
    batch = min((tensors[t].size for t in feeding if tensors[t].shape), default=1)
    return Passes(of=of, batch=int(batch), findings=(Finding(what="tokens are unrolled", why=why, confidence=0.9),))


def _reads(graph: Graph, ops: Iterable[Op]) -> tuple[int, int, int]:
    """(tokens a sequence, sequences, tensors of state) of one pass, by the ids that it looks up and the state that it is given."""
    tensors, weighty = graph.tensors, dependents(graph, weights(graph))
    inputs = {t for t in graph.inputs if tensors[t].role is Role.INPUT}
    used = {t for op in ops for t in op.inputs if t in inputs}
    made = [(tensors[t].shape, tensors[t].dtype) for op in ops for t in op.outputs if t in graph.outputs]
    state = [t for t in used if tensors[t].shape and (tensors[t].shape, tensors[t].dtype) in made]
    state = state if len(state) < len(used) else []  # what a pass reads is not all state
    ids = [t for t in used - set(state) if "int" in tensors[t].dtype and tensors[t].shape]
    if ids:  # tokens are what is looked up in the largest table
        shape = tensors[max(ids, key=lambda t: (looked_up(graph, t), tensors[t].size, -t))].shape
        if len(shape) > 1:
            return int(shape[-1]), int(math.prod(shape[:-1])), len(state)
        return (1, int(shape[0]), len(state)) if state else (int(shape[0]), 1, 0)
    for op in ops:
        if op.primitive == "dot_general" and not weighty.isdisjoint(op.inputs):
            shape = max((tensors[t].shape for t in op.inputs if t not in graph.inputs or t in inputs), key=len, default=())
            if len(shape) > 2:
                return int(shape[-2]), int(math.prod(shape[:-2])), len(state)
            break
    return 1, 1, len(state)
