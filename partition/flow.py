"""What passes between blocks, and what lies still: flows (a value, who makes it, who reads it, how often) and residents.

A flow inside the token loop passes once a trip, a carry from one trip to the next, the hand-off once a request. Weights and loop
state do not flow: they are resident wherever a block reads or writes them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from partition.coarsen import Block
from partition.graph import Op, Role, Value, reads, roots, value_bytes, writes
from partition.phases import Phases


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """`value` [nbytes] goes from block `src` to the blocks `dst`, `times` a request.

    kind: "forward" (before its readers run), "handoff" (from before the loop into it), "carry" (from one trip to the next) or
    "result" (out of the loop).
    """

    value: Value
    src: int
    dst: tuple[int, ...]
    nbytes: float
    times: int
    kind: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """Bytes that lie in the memory of every mesh that holds one of `blocks`. kind: "weights" or "state"."""

    name: str
    kind: str
    value: Value
    blocks: tuple[int, ...]
    nbytes: float


def by_value(flows: Sequence[Flow]) -> list[list[int]]:
    """The numbers of the flows of each value of each block, which crosses once to each mesh: the one that goes most often first."""
    found: dict[tuple[Value, int], list[int]] = {}
    for i, f in enumerate(flows):
        found.setdefault((f.value, f.src), []).append(i)
    return [sorted(numbers, key=lambda i: -flows[i].times) for numbers in found.values()]


class _Sources:
    """Who makes what, by tensor."""

    def __init__(self, blocks: Sequence[Block]):
        self.made: dict[int, list[tuple[Value, int]]] = {}
        for n, b in enumerate(blocks):
            for op, span in b.items:
                for v in writes(op, span):
                    self.made.setdefault(v[0], []).append((v, n))

    def of(self, value: Value) -> list[tuple[Value, int]]:
        """(value that passes, block) for each part of `value`: itself, rows of the whole, or the pieces of the whole."""
        made = self.made.get(value[0], [])
        for v, n in made:
            if v == value:
                return [(v, n)]
        if value[1] is not None and value[1][0] == value[1][1]:
            return []
        whole = [(value, n) for v, n in made if v[1] is None]
        if whole:
            return whole
        pieces = [(v, n) for v, n in made if v[1] is not None and v[1][0] < v[1][1]]
        return [(v, n) for v, n in pieces if value[1] is None or (v[1][0] < value[1][1] and value[1][0] < v[1][1])]  # type: ignore[index]


def flows(blocks: Sequence[Block], phases: Phases, trips: int) -> tuple[list[Flow], list[Resident]]:
    """Every flow between different blocks, and every resident tensor, of a coarsened program."""
    graph, loop_op = phases.program.graph, phases.token_loop
    tensors, outer = graph.tensors, roots(graph)
    sources = _Sources(blocks)
    found: dict[tuple[Value, int, str, int], set[int]] = {}
    sizes: dict[Value, float] = {}
    weights: dict[Value, set[int]] = {}
    state: dict[Value, set[int]] = {}
    slots = _slots(loop_op)
    results = _results(loop_op)
    rebinds = max(trips - 1, 0) if loop_op is not None and loop_op.loop is not None and loop_op.loop.kind == "scan" else trips

    @functools.cache
    def rows(t: int, n: int | None) -> float:
        return value_bytes((t, None if n is None else (0, n)), tensors)

    def nbytes(value: Value) -> float:
        return rows(value[0], None if value[1] is None else value[1][1] - value[1][0])

    def flow(value: Value, dst: int, kind: str, times: int) -> None:
        for v, src in sources.of(value):
            if src != dst:
                sizes[v] = nbytes(v)
                found.setdefault((v, src, kind, times), set()).add(dst)

    for n, b in enumerate(blocks):
        inside = b.region != "top"
        for value in {v for op, span in b.items for v in reads(op, span)}:
            t, span = value
            role = tensors[t].role
            if t in slots and inside:
                init, carried = slots[t]
                if init is None:  # a constant of the loop, handed in unchanged
                    t = outer.get(t, t)
                    role = tensors[t].role
                else:
                    chain = {t}
                    while init is not None:  # a carry that only takes another's place is needed where that one is
                        flow((init, span), n, "handoff", 1)
                        flow((carried, span), n, "carry", rebinds)
                        if carried in chain or carried not in slots:
                            break
                        chain.add(carried)
                        init, carried = slots[carried]
                    continue
            if role in (Role.PARAM, Role.CONST):
                weights.setdefault((t, span), set()).add(n)
            elif role is Role.ACTIVATION:
                if t in results:
                    for _, src in sources.of((results[t], None))[:1]:
                        if src != n:
                            sizes[value] = tensors[t].nbytes
                            found.setdefault((value, src, "result", 1), set()).add(n)
                else:
                    entering = inside and t != value[0]
                    flow((t, span), n, "handoff" if entering else "forward", trips if inside and not entering else 1)
    _state(blocks, loop_op, sources, state)
    made = [Flow(value=v, src=src, dst=tuple(sorted(dst)), nbytes=sizes[v], times=times, kind=kind)
            for (v, src, kind, times), dst in found.items()]  # fmt: skip
    made.sort(key=lambda f: (f.src, f.kind, f.value[0], f.value[1] or (0, 0)))
    lying = [Resident(name=tensors[v[0]].name, kind="weights", value=v, blocks=tuple(sorted(w)), nbytes=nbytes(v))
             for v, w in sorted(weights.items(), key=_order)]  # fmt: skip
    lying += [Resident(name=f"state {v[0]}", kind="state", value=v, blocks=tuple(sorted(w)), nbytes=nbytes(v))
              for v, w in sorted(state.items(), key=_order)]  # fmt: skip
    return made, lying


def _order(item: tuple[Value, object]) -> tuple[int, tuple[int, int]]:
    (t, span), _ = item
    return t, span or (0, 0)


def _slots(loop_op: Op | None) -> dict[int, tuple[int | None, int]]:
    """Tensor that enters body or condition -> (tensor it starts from, tensor that replaces it); (None, 0) for a constant."""
    if loop_op is None or loop_op.loop is None:
        return {}
    loop, own = loop_op.loop, loop_op.inputs[loop_op.loop.cond_consts :]
    found: dict[int, tuple[int | None, int]] = {t: (None, 0) for t in loop.body.inputs}
    views = [loop.body.inputs[loop.consts : loop.consts + loop.carry]]
    if loop.cond is not None:
        found |= {t: (None, 0) for t in loop.cond.inputs}
        views.append(loop.cond.inputs[loop.cond_consts :])
    for view in views:
        for n, t in enumerate(view):
            found[t] = (own[loop.consts + n], loop.body.outputs[n])
    return found


def _results(loop_op: Op | None) -> dict[int, int]:
    """Result of the token loop -> the tensor of its body that it is (the last one, or all of them stacked)."""
    if loop_op is None or loop_op.loop is None:
        return {}
    return dict(zip(loop_op.outputs, loop_op.loop.body.outputs, strict=True))


def _state(blocks: Sequence[Block], loop_op: Op | None, sources: _Sources, state: dict[Value, set[int]]) -> None:
    """State is what the loop carries: it lies with whoever makes its first value, and with whoever reads or writes it in the loop."""
    if loop_op is None or loop_op.loop is None:
        return
    slots = {t: s for t, s in _slots(loop_op).items() if s[0] is not None}
    for n, b in enumerate(blocks):
        if b.region == "top":
            continue
        for t, span in {v for op, s in b.items for v in reads(op, s)}:
            if t in slots:
                init, _ = slots[t]
                assert init is not None
                state.setdefault((init, span), set()).update([n, *(src for _, src in sources.of((init, span)))])

