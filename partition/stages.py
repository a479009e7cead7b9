"""cut(): a placement into stages, sub-jaxprs that each run on one mesh, and what crosses between them.

Ops are ordered by mesh: a stage takes every op of its mesh that can run, before another mesh gets its turn, so stages are convex
and as few as the greedy order allows (up to three first meshes are tried). A token loop whose body lies on one mesh stays one op,
one compiled loop. Where the body is cut, the loop becomes a `LoopPlan`: its body's stages, run once a trip, the carry rebound
between trips. Adjacent iterations of a layer scan on one mesh are one shorter scan.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from partition import _jax
from partition.arguments import checked
from partition.coarsen import Block
from partition.errors import PlacementError
from partition.evaluation import verify
from partition.graph import Item, Op, Role, Value, reads, writes
from partition.phases import Phases
from partition.problem import Placement, Problem
from partition.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """Ops that run together on mesh number `mesh`. inputs and outputs are values, in the jaxpr's order.

    donated: positions of inputs whose memory the outputs may take over. An input that is a constant of the token loop goes by its
    name outside the loop; reads: the inputs as the stage's ops name them.
    """

    id: int
    mesh: int
    region: str
    items: tuple[Item, ...]
    jaxpr: Any = dataclasses.field(repr=False)
    inputs: tuple[Value, ...] = dataclasses.field(repr=False)
    outputs: tuple[Value, ...] = dataclasses.field(repr=False)
    donated: tuple[int, ...] = ()
    reads: tuple[Value, ...] = dataclasses.field(default=(), repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoopPlan:
    """A token loop whose body is cut: `answer` says whether another trip follows (None: `trips` times), `body` runs in order, then the carry is rebound.

    cond: what makes the answer; None where that is a carry as it is. carry: (tensor as the body reads it, tensor it starts from, tensor that replaces it); xs: (tensor as the body reads it, stacked
    tensor outside); results: (tensor outside, tensor of the body, whether all trips are stacked). Constants of the loop go by their
    names outside.
    """

    op: Op
    trips: int
    cond: Stage | None
    body: tuple[Stage, ...]
    carry: tuple[tuple[int, int, int], ...]
    xs: tuple[tuple[int, int], ...]
    results: tuple[tuple[int, int, bool], ...]
    answer: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stages:
    """A program cut by a placement: steps in an order that runs."""

    program: Program = dataclasses.field(repr=False)
    problem: Problem = dataclasses.field(repr=False)
    placement: Placement = dataclasses.field(repr=False)
    steps: tuple[Stage | LoopPlan, ...]

    @property
    def all(self) -> tuple[Stage, ...]:
        """Every stage, those of a cut loop included."""
        found: list[Stage] = []
        for step in self.steps:
            found += [step] if isinstance(step, Stage) else [*([step.cond] if step.cond else []), *step.body]
        return tuple(found)

    def __str__(self) -> str:
        p = self.problem
        lines = [f"{len(self.all)} stages"]
        for s in self.all:
            lines.append(f"  stage {s.id} [{s.region}] on {p.meshes[s.mesh]}: {len(s.items)} ops, {len(s.inputs)} in, {len(s.outputs)} out")
        return "\n".join(lines)


def find(value: Value, made: Mapping[int, Collection[Value]]) -> list[Value]:
    """The made values that give `value`: itself, the whole of which it is rows, or the pieces that make it up."""
    have = made.get(value[0], ())
    if value in have:
        return [value]
    if (value[0], None) in have:
        return [(value[0], None)]
    pieces = [v for v in have if v[1] is not None and v[1][0] < v[1][1]]
    if value[1] is not None:
        pieces = [v for v in pieces if v[1][0] < value[1][1] and value[1][0] < v[1][1]]  # type: ignore[index]
    return sorted(pieces, key=lambda v: v[1] or (0, 0))


@checked
def cut(program: Program, placement: Placement, *, streamed: bool = False) -> Stages:
    """Cut a program into stages. Raises PlacementError where the placement is of another program, or not valid.

    streamed: before the token loop, a stage also ends with a layer that made something which later stages read, so that it can be sent
    (the KV cache layer by layer) while the next layer runs; layers that are alike are then compiled once.
    """
    problem = placement.problem
    if problem is None or problem.phases is None or problem.phases.program is not program:
        raise PlacementError("the placement was not made for this program", where="cut(program, placement)",
                             mend="pose, place and cut the same traced program")  # fmt: skip
    verify(problem, placement)
    collecting = gc.isenabled()
    gc.disable()  # hundreds of thousands of new values, none of them garbage: the collector would only walk them again and again
    try:
        return _Cutter(program, problem, placement, streamed).run()
    finally:
        if collecting:
            gc.enable()


def merge(items: Iterable[tuple[Item, int]]) -> list[tuple[Item, int]]:
    """Join neighbouring ranges of one scan on one mesh; a range that has grown to all iterations is the whole op."""
    merged: list[tuple[Item, int]] = []
    for (op, span), mesh in items:
        if span is not None and merged:
            (last, before), where = merged[-1]
            if last is op and where == mesh and before is not None and before[1] == span[0]:
                merged[-1] = ((op, (before[0], span[1])), mesh)
                continue
        merged.append(((op, span), mesh))
    return [((op, None if span is not None and op.loop is not None and span == (0, op.loop.trips) else span), m) for (op, span), m in merged]


def order(units: Sequence[tuple[Item, int]]) -> list[tuple[int, list[int]]]:
    """Units (item, mesh) into runs (mesh, unit numbers), each convex: greedy orders from up to three first meshes, the shortest kept."""
    if len({m for _, m in units}) == 1 and all(span is None for (_, span), _ in units):
        return [(units[0][1], list(range(len(units))))]
    after, degree = _edges(units)
    first = list(dict.fromkeys(units[u][1] for u in range(len(units)) if not degree[u]))
    tries = [_greedy(units, after, degree, m) for m in first[:3]] or [[]]
    return min(tries, key=len)


def _edges(units: Sequence[tuple[Item, int]]) -> tuple[list[list[tuple[int, bool]]], list[int]]:
    """For each unit, who waits for it, and whether in a later stage (a value that passes in parts); and how many it waits for."""
    made: dict[int, list[Value]] = {}
    makers: dict[Value, list[int]] = {}
    for u, ((op, span), _) in enumerate(units):
        for v in writes(op, span):
            if v not in makers:
                made.setdefault(v[0], []).append(v)
            makers.setdefault(v, []).append(u)
    after: list[list[tuple[int, bool]]] = [[] for _ in units]
    degree = [0] * len(units)
    for u, ((op, span), mesh) in enumerate(units):
        wanted: dict[int, bool] = {}
        for value in reads(op, span):
            for v in find(value, made):
                local = [w for w in makers[v] if units[w][1] == mesh] or makers[v][:1]
                for w in local:
                    wanted[w] = wanted.get(w, False) or v != value
        for w, later in wanted.items():
            after[w].append((u, later))
            degree[u] += 1
    return after, degree


def _greedy(units: Sequence[tuple[Item, int]], after: Sequence[Sequence[tuple[int, bool]]], degree: Sequence[int], first: int) -> list[tuple[int, list[int]]]:
    waiting, left = list(degree), {m: 0 for _, m in units}
    ready: dict[int, deque[int]] = {m: deque() for m in left}
    for u, (_, m) in enumerate(units):
        left[m] += 1
        if not waiting[u]:
            ready[m].append(u)

    def closure(m: int, waiting: list[int] | _Undo) -> tuple[list[int], list[int]]:
        """Units that run now on mesh m, and those that become free for later stages."""
        run: list[int] = []
        freed: list[int] = []
        queue, held = deque(ready[m]), set[int]()
        while queue:
            u = queue.popleft()
            run.append(u)
            for v, later in after[u]:
                waiting[v] -= 1
                if later:
                    held.add(v)
                if not waiting[v]:
                    (queue if units[v][1] == m and v not in held else freed).append(v)
        return run, freed

    runs: list[tuple[int, list[int]]] = []
    mesh = first
    while True:
        run, freed = closure(mesh, waiting)
        ready[mesh] = deque()
        left[mesh] -= len(run)
        runs.append((mesh, sorted(run)))
        for v in freed:
            ready[units[v][1]].append(v)
        able = [m for m in sorted(ready) if ready[m]]
        if not able:
            return runs
        if len(able) == 1:
            mesh = able[0]
            continue
        sizes = {m: len(closure(m, _Undo(waiting))[0]) for m in able}
        mesh = min(able, key=lambda m: (sizes[m] != left[m], -sizes[m], m))


class _Undo(dict[int, int]):
    """A view of a list of counts whose changes stay here."""

    def __init__(self, base: list[int]):
        super().__init__()
        self.base = base

    def __missing__(self, key: int) -> int:
        return self.base[key]


class _Cutter:
    """Turns blocks and their meshes into stages, region by region."""

    def __init__(self, program: Program, problem: Problem, placement: Placement, streamed: bool):
        self.program, self.problem, self.placement, self.streamed = program, problem, placement, streamed
        self.phases: Phases = problem.phases  # type: ignore[assignment]
        self.lowered = program.entry.lowered
        self.tensors = program.graph.tensors
        self.loop_op = self.phases.token_loop
        self.count = 0
        self.alias = self._aliases()

    def _aliases(self) -> dict[int, int]:
        """Constant of the token loop as its body or condition reads it -> the tensor outside."""
        if self.loop_op is None or (loop := self.loop_op.loop) is None:
            return {}
        own = self.loop_op.inputs[loop.cond_consts :]
        found = dict(zip(loop.body.inputs[: loop.consts], own, strict=False))
        if loop.cond is not None:
            found |= dict(zip(loop.cond.inputs[: loop.cond_consts], self.loop_op.inputs, strict=False))
            found |= dict(zip(loop.cond.inputs[loop.cond_consts :], loop.body.inputs[loop.consts :], strict=True))
        return found

    def outside(self, value: Value) -> Value:
        """The value under the name that it has outside the body, where it is a constant of the loop."""
        return (self.alias.get(value[0], value[0]), value[1])

    def units(self, region: str, blocks: Iterable[tuple[int, Block]]) -> list[tuple[Item, int]]:
        """Items with their meshes, in order; a replicated block gives one for each of its meshes."""
        found: list[tuple[Item, int]] = []
        for n, b in blocks:
            if b.region == region:
                found += [(item, m) for m in self.placement.of(n) for item in b.items]
        return found if self.streamed and region == "top" else merge(found)

    def run(self) -> Stages:
        numbered = list(enumerate(self.problem.blocks))
        inside = [m for n, b in numbered if b.region != "top" for m in self.placement.of(n)]
        whole_loop = self.loop_op is not None and len(set(inside)) == 1
        tops = [(n, b) for n, b in numbered if b.region == "top"]
        outputs: set[Value] = {(t, None) for t in self.program.graph.outputs}
        if self.loop_op is None:
            steps: list[Stage | LoopPlan] = list(self.stages("top", self.units("top", tops), outputs))
        elif whole_loop or not inside:
            mesh = inside[0] if inside else self.placement.of(tops[-1][0])[0]
            at = next((i for i, (n, b) in enumerate(tops) if any(set(op.inputs) & set(self.loop_op.outputs) for op, _ in b.items)), len(tops))
            units = [*self.units("top", tops[:at]), ((self.loop_op, None), mesh), *self.units("top", tops[at:])]
            steps = list(self.stages("top", units, outputs))
        else:
            steps = self.cut_loop(tops, outputs)
        return Stages(program=self.program, problem=self.problem, placement=self.placement, steps=tuple(steps))

    def cut_loop(self, tops: Sequence[tuple[int, Block]], outputs: set[Value]) -> list[Stage | LoopPlan]:
        """Stages before the loop, the loop's plan, stages after it."""
        op = self.loop_op
        assert op is not None and op.loop is not None
        loop, own = op.loop, op.inputs[op.loop.cond_consts :]
        first_late = min((n for n, b in tops if any(set(o.inputs) & self.late for o, _ in b.items)), default=len(self.problem))
        early, late = [x for x in tops if x[0] < first_late], [x for x in tops if x[0] >= first_late]
        numbered = list(enumerate(self.problem.blocks))
        body_units, cond_units = self.units("body", numbered), self.units("cond", numbered)
        carry = tuple((loop.body.inputs[loop.consts + n], own[loop.consts + n], self.outside((loop.body.outputs[n], None))[0])
                      for n in range(loop.carry))  # fmt: skip
        after = loop.consts + loop.carry
        xs = tuple(zip(loop.body.inputs[after:], own[after:], strict=True))
        results = tuple((t, self.outside((loop.body.outputs[n], None))[0], n >= loop.carry) for n, t in enumerate(op.outputs))
        late_units = self.units("top", late)
        needed_late = {v for (o, span), _ in late_units for v in reads(o, span)} | outputs
        results = tuple(r for r in results if (r[0], None) in needed_late)
        read = {self.outside(v) for (o, span), _ in [*body_units, *cond_units] for v in reads(o, span)}
        answer = self.outside((loop.cond.outputs[0], None))[0] if loop.cond is not None else None
        slots = {t: (init, new) for t, init, new in carry}
        enters = read | {(slots[v[0]][0], v[1]) for v in read if v[0] in slots}
        enters |= {(init, None) for _, init, _ in carry} | {(outer, None) for _, outer in xs} | {(new, None) for _, _, new in carry} | ({(answer, None)} if answer is not None else set())
        before = self.stages("top", self.units("top", early), outputs | needed_late | enters)
        kept = {(slots[v[0]][1], v[1]) for v in read if v[0] in slots}
        kept |= {(new, None) for _, new, _ in results} | {(new, None) for t, _, new in carry if new in slots or t == answer}
        while more := {(slots[t][1], span) for t, span in kept if t in slots} - kept:  # a carry that takes another's place
            kept |= more
        stacked = {new for _, new, every in results if every}  # what every trip keeps must not be overwritten by the next
        body = self.stages("body", body_units, kept, [c for c in carry if c[2] not in stacked and c[0] not in stacked])
        cond = self.stages("cond", cond_units, {(t, None) for t in loop.cond.outputs}) if loop.cond is not None else []
        plan = LoopPlan(op=op, trips=self.problem.workload.trips, cond=cond[0] if cond else None, body=tuple(body), carry=carry, xs=xs, results=results, answer=answer)  # fmt: skip
        return [*before, plan, *self.stages("top", late_units, outputs)]

    @functools.cached_property
    def late(self) -> set[int]:
        """Tensors that depend on the token loop."""
        found = set(self.loop_op.outputs) if self.loop_op is not None else set()
        for op in self.program.graph.ops:
            if not found.isdisjoint(op.inputs):
                found.update(op.outputs)
        return found

    def stages(self, region: str, units: list[tuple[Item, int]], kept: set[Value], carry: Sequence[tuple[int, int, int]] = ()) -> list[Stage]:
        """Order units into stages; `kept` values outlive the region, the `carry` enters it anew each trip."""
        runs = order(units)
        made: dict[int, list[Value]] = {}
        for (op, span), _ in units:
            for v in writes(op, span):
                if v not in made.setdefault(v[0], []):
                    made[v[0]].append(v)
        final = {v for value in kept for v in find(value, made)}
        if self.streamed and region == "top":
            runs = self.by_layer(units, runs, final)
        reading = [dict.fromkeys(v for u in run for v in reads(*units[u][0])) for _, run in runs]
        readers: dict[Value, set[int]] = {}
        for i, values in enumerate(reading):
            for value in values:
                for v in {value, *find(value, made)}:
                    readers.setdefault(v, set()).add(i)
        out = []
        for i, (mesh, run) in enumerate(runs):
            items = tuple(units[u][0] for u in run)
            inside = {v for op, span in items for v in writes(op, span)}
            inputs = tuple(v for v in reading[i] if v not in inside and self.tensors[v[0]].role is not Role.LITERAL)
            outputs = tuple(v for op, span in items for v in writes(op, span) if v in final or readers.get(v, set()) - {i})
            last = {v for v in inputs if max(readers[v]) == i and v not in final}
            donated = self.donations(inputs, outputs, last, set(made), carry)
            jaxpr = _jax.write(items, inputs, outputs, self.lowered, name=f"stage{self.count}")
            bound = tuple(self.outside(v) for v in inputs)
            out.append(Stage(id=self.count, mesh=mesh, region=region, items=items, jaxpr=jaxpr, inputs=bound, outputs=outputs, donated=donated, reads=inputs))
            self.count += 1
        return out

    def by_layer(self, units: Sequence[tuple[Item, int]], runs: Sequence[tuple[int, list[int]]], final: set[Value]) -> list[tuple[int, list[int]]]:
        """Runs cut once more behind each layer that made something which another run reads, or which outlives them all."""
        layer = {(op.id, span): int(n) for b, n in zip(self.problem.blocks, self.problem.layer, strict=True) for op, span in b.items}

        def at(u: int) -> int:
            (op, span), _ = units[u]
            return layer.get((op.id, span), -1)

        read: dict[int, set[int]] = {}
        for i, (_, run) in enumerate(runs):
            for u in run:
                for t, _ in reads(*units[u][0]):
                    read.setdefault(t, set()).add(i)
        parts = []
        for i, (mesh, run) in enumerate(runs):
            parts.append((mesh, list[int]()))
            due = False
            for before, u in zip([run[0], *run], run, strict=False):
                if due and at(u) != at(before):
                    parts.append((mesh, []))
                    due = False
                parts[-1][1].append(u)
                due = due or any(v in final or read.get(v[0], set()) - {i} for v in writes(*units[u][0]))
        return parts

    def donations(self, inputs: Sequence[Value], outputs: Sequence[Value], last: set[Value], made: set[int], carry: Sequence[tuple[int, int, int]]) -> tuple[int, ...]:
        """Inputs that nobody reads after this stage (`last`) and whose memory an output of the same shape can take over.

        Of what enters a loop's trip, only a carry that is replaced by a tensor of its own; never an argument or a weight.
        """
        news = [new for _, _, new in carry]
        ours = made | {t for t, _, new in carry if news.count(new) == 1 and t not in news}

        def shape(v: Value) -> tuple[Any, ...]:
            t = self.tensors[v[0]]
            return t.shape, t.dtype, v[1] and v[1][1] - v[1][0]

        free = [shape(v) for v in outputs]
        found = []
        for n, v in enumerate(inputs):
            if v in last and v[0] in ours and shape(v) in free and not self.tensors[v[0]].dtype.startswith("key<"):
                free.remove(shape(v))
                found.append(n)
        return tuple(found)
