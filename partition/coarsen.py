"""Ops -> blocks, so that policies see hundreds of nodes and not tens of thousands.

A block is a run of ops of one phase in an order that is topological, so blocks never form a cycle. The order is the program's,
with ops that depend on no input moved down to their first reader. Runs are cut where few bytes are alive (in a transformer:
where only the residual stream is), found as valleys between peaks at least twice as high. A scan over stacked weights becomes one
block an iteration, so that it can be cut by layer ranges.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

from partition.graph import Op, Role, Span, Tensor
from partition.loops import CONTRACTIONS, holds
from partition.phases import Phase, Phases, is_weight

Region = Literal["top", "cond", "body"]
PROMINENCE = 2.0
"""How much higher the live bytes must be on both sides of a valley."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Ops (each with the iteration range of a split scan, None for all) that are placed together."""

    items: tuple[tuple[Op, Span], ...]
    phase: Phase
    region: Region

    @property
    def scope(self) -> str:
        """The scope that most of its contractions stand in (of all its ops, where it has none)."""
        scopes = [op.scope for op, _ in self.items if op.primitive in CONTRACTIONS] or [op.scope for op, _ in self.items]
        common = scopes[0].split("/")
        for s in scopes[1:]:
            parts = s.split("/")
            while common and parts[: len(common)] != common:
                common.pop()
        name = "/".join(common) or max(scopes, key=scopes.count).split("/")[0]
        span = self.items[0][1] if len(self.items) == 1 else None
        return name if span is None else f"{name}[{span[0]}:{span[1]}]"


def coarsen(phases: Phases, *, level: Literal["block", "op"] = "block", most: float = float("inf")) -> tuple[Block, ...]:
    """Blocks in a topological order: what precedes the token loop, its condition, its body, what follows.

    level "op" makes every op a block of its own. A block that reads more than `most` bytes of weights is cut further, so that the
    memory of a small machine can be filled.
    """
    graph, loop = phases.program.graph, phases.token_loop
    tensors = graph.tensors
    inputs = {t for t in graph.inputs if tensors[t].role is Role.INPUT}
    weights = is_weight(phases.program)
    after: set[int] = set(loop.outputs) if loop is not None else set()
    before: list[Op] = []
    behind: list[Op] = []
    for op in graph.ops:
        if op is loop:
            continue
        late = not after.isdisjoint(op.inputs)
        (behind if late else before).append(op)
        after.update(op.outputs if late else ())

    def cut(ops: Sequence[Op], region: Region, moving: set[int]) -> list[Block]:
        ordered = late_statics(ops, moving)
        if level == "op":
            return [Block(items=((op, None),), phase=phases.of[op.id], region=region) for op in ordered]
        blocks = []
        for mine in rounds(ordered, phases.of):
            phase = phases.of[mine[0].id]
            runs = components(mine) if phase is Phase.BOTH else split_runs(mine, tensors, weights, most)
            blocks += [Block(items=items, phase=phase, region=region) for items in runs]
        return blocks

    blocks = cut(before, "top", set(inputs) if loop is not None else set(graph.inputs))
    if loop is not None:
        assert loop.loop is not None
        moving = set(loop.loop.body.inputs[loop.loop.consts :])
        if loop.loop.cond is not None:
            blocks.append(Block(items=tuple((op, None) for op in loop.loop.cond.ops), phase=Phase.DECODE, region="cond"))
        blocks += cut(loop.loop.body.ops, "body", moving)
        blocks += cut(behind, "top", set(loop.outputs))
    return tuple(b for b in blocks if b.items)


def rounds(ops: Sequence[Op], of: Mapping[int, Phase]) -> list[list[Op]]:
    """Ops by phase, in an order that is topological: once through the phases, and once more for each time that an op needs a later phase
    (the prompt of a chat's second turn, which reads what the first turn's token loop made)."""
    ranks = {phase: n for n, phase in enumerate((Phase.BOTH, Phase.PREFILL, Phase.DECODE, Phase.NONE))}
    made: dict[int, tuple[int, int]] = {}  # tensor -> (round, rank) of who made it
    groups: dict[tuple[int, int], list[Op]] = {}
    for op in ops:
        rank = ranks[of[op.id]]
        place = max((n + (before > rank) for n, before in (made[t] for t in op.inputs if t in made)), default=0), rank
        made.update(dict.fromkeys(op.outputs, place))
        groups.setdefault(place, []).append(op)
    return [groups[place] for place in sorted(groups)]


def late_statics(ops: Sequence[Op], moving: set[int]) -> list[Op]:
    """The ops in an order where those that depend on nothing in `moving` stand just before their first reader."""
    moving, maker, emitted, order = set(moving), {t: op for op in ops for t in op.outputs}, set[int](), list[Op]()
    static = set()
    for op in ops:
        if moving.isdisjoint(op.inputs):
            static.add(op.id)
        else:
            moving.update(op.outputs)

    def emit(op: Op) -> None:
        stack = [op]
        while stack:
            top = stack[-1]
            missing = [m for t in top.inputs if (m := maker.get(t)) is not None and m.id not in emitted and m is not top]
            if missing:
                stack += missing[::-1]
                continue
            stack.pop()
            if top.id not in emitted:
                emitted.add(top.id)
                order.append(top)

    for op in ops:
        if op.id not in static:
            emit(op)
    for op in ops:  # statics that only another region reads
        emit(op)
    return order


def components(ops: Sequence[Op]) -> list[tuple[tuple[Op, Span], ...]]:
    """Weakly connected groups of ops, each in order, by the place of their first op."""
    group: dict[int, int] = {}
    maker = {t: op.id for op in ops for t in op.outputs}

    def find(i: int) -> int:
        while group.setdefault(i, i) != i:
            i = group[i]
        return i

    for op in ops:
        find(op.id)
        for t in op.inputs:
            if t in maker:
                a, b = find(maker[t]), find(op.id)
                group[max(a, b)] = min(a, b)
    runs: dict[int, list[tuple[Op, Span]]] = {}
    for op in ops:
        runs.setdefault(find(op.id), []).append((op, None))
    return [tuple(r) for r in runs.values()]


def split_runs(ops: Sequence[Op], tensors: Sequence[Tensor], weights: frozenset[int], most: float) -> list[tuple[tuple[Op, Span], ...]]:
    """Cut a run of ops at its valleys and where it is too heavy; a scan over stacked weights stands alone, one block an iteration."""
    runs: list[tuple[tuple[Op, Span], ...]] = []
    rest: list[Op] = []

    def flush() -> None:
        if rest:
            light = [p for piece in valleys(rest, tensors) for p in split_heavy(piece, tensors, weights, most)]
            runs.extend(tuple((op, None) for op in piece) for piece in light)
            rest.clear()

    for op in ops:
        if layer_scan(op, weights):
            flush()
            assert op.loop is not None and op.loop.trips is not None
            runs += [((op, (i, i + 1)),) for i in range(op.loop.trips)]
        else:
            rest.append(op)
    flush()
    return runs


def layer_scan(op: Op, weights: frozenset[int]) -> bool:
    """Whether an op is a forward scan of 2 to 512 iterations that slices stacked weights: a stack of layers."""
    loop = op.loop
    if loop is None or loop.kind != "scan" or loop.reverse or loop.trips is None or not 1 < loop.trips <= 512:
        return False
    return any(t in weights for t in op.inputs[loop.consts + loop.carry :])


def live_bytes(ops: Sequence[Op], tensors: Sequence[Tensor]) -> list[float]:
    """Bytes that are alive after each op: made in this run and still to be read in it; what lives nearly throughout is left out."""
    last: dict[int, int] = {}
    for n, op in enumerate(ops):
        last.update(dict.fromkeys(op.inputs, n))
    change = [0.0] * (len(ops) + 1)
    for n, op in enumerate(ops):
        for t in op.outputs:
            end = last.get(t, n)
            if end > n and not (len(ops) >= 64 and end - n > len(ops) / 4):
                change[n] += tensors[t].nbytes
                change[end] -= tensors[t].nbytes
    total, live = 0.0, []
    for c in change[:-1]:
        total += c
        live.append(total)
    return live


def valleys(ops: Sequence[Op], tensors: Sequence[Tensor]) -> list[list[Op]]:
    """Cut ops after each valley of live bytes; a piece without any contraction joins the next one."""
    live = live_bytes(ops, tensors)
    cuts: list[int] = []
    peak, low, at = 0.0, float("inf"), -1
    for n, bytes_ in enumerate(live[:-1]):
        if at < 0 or bytes_ <= low:
            if peak >= PROMINENCE * bytes_:
                low, at = bytes_, n
            peak = max(peak, bytes_)
        elif bytes_ >= PROMINENCE * low:
            cuts.append(at)
            peak, low, at = bytes_, float("inf"), -1
    if at >= 0:
        cuts.append(at)
    pieces: list[list[Op]] = []
    pending: list[Op] = []
    bounds = [0, *(c + 1 for c in cuts), len(ops)]
    for a, b in itertools.pairwise(bounds):
        pending += ops[a:b]
        if any(holds(op, CONTRACTIONS) for op in ops[a:b]):
            pieces.append(pending)
            pending = []
    if pending:
        pieces = [*pieces[:-1], pieces[-1] + pending] if pieces else [pending]
    return pieces


def split_heavy(ops: list[Op], tensors: Sequence[Tensor], weights: frozenset[int], most: float) -> list[list[Op]]:
    """Halve a piece that reads more than `most` bytes of weights, where fewest bytes are alive, until none can be halved."""
    read = {t for op in ops for t in op.inputs if t in weights}
    if sum(tensors[t].nbytes for t in read) <= most:
        return [ops]
    marks = [n for n, op in enumerate(ops) if holds(op, CONTRACTIONS) and not weights.isdisjoint(op.inputs)]
    if len(marks) < 2:
        return [ops]
    live = live_bytes(ops, tensors)
    middle = len(marks) // 2
    at = min(range(marks[middle - 1], marks[middle]), key=lambda n: (live[n], n))
    return [*split_heavy(ops[: at + 1], tensors, weights, most), *split_heavy(ops[at + 1 :], tensors, weights, most)]


def share(op: Op, span: Span) -> float:
    """What an iteration range of an op is of all its iterations."""
    return 1.0 if span is None or op.loop is None or op.loop.trips is None else (span[1] - span[0]) / op.loop.trips
