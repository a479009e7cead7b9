"""Walks the steps of a cut program in order and knows what lies where. What computing and moving mean is up to a `Machine`.

`execution.py` walks with a machine that computes; `transfers()` walks with one that only counts, so that the bytes of the plan and
the bytes that a run moves come from one and the same walk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from partition.arguments import checked
from partition.graph import Role, Value, value_bytes
from partition.stages import LoopPlan, Stage, Stages, find


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """A value (or the rows of it that are read) goes from mesh `src` to mesh `dst`, `times` a request, `nbytes` each time."""

    value: Value
    src: int
    dst: int
    nbytes: float
    times: int


class Arrays(Protocol):
    """What a walk does with arrays, which are opaque to it, wherever they lie."""

    def rows(self, array: Any, start: int, stop: int) -> Any:
        """Rows [start, stop) of a stacked array."""

    def row(self, array: Any, index: int) -> Any:
        """One row of a stacked array, without its leading dimension."""

    def join(self, arrays: Sequence[Any]) -> Any:
        """Rows of several arrays one after the other."""

    def copy(self, array: Any) -> Any:
        """An array of the same numbers that may be donated."""

    def truth(self, array: Any, mesh: int) -> bool:
        """The value of a loop's condition, which lies on a mesh."""


class Machine(Protocol):
    """What a walk needs done by who computes."""

    arrays: Arrays

    def given(self, value: Value, mesh: int) -> Any:
        """An argument, weight, constant or literal, as it lies on a mesh."""

    def compute(self, stage: Stage, arrays: Sequence[Any], trip: int) -> Sequence[Any]:
        """Run a stage; trip is -1 outside the token loop."""

    def move(self, array: Any, value: Value, src: int, dst: int) -> Any:
        """Bring an array to another mesh."""

    def stack(self, arrays: Sequence[Any], value: Value) -> Any:
        """The results of all trips under a new leading dimension."""

    def settle(self, array: Any, value: Value, mesh: int) -> Any:
        """The array laid out as `value` lies on its mesh."""


class Walk:
    """One run over the steps. `env` maps a value to the array on each mesh that holds it."""

    def __init__(self, stages: Stages, machine: Machine):
        self.stages, self.machine = stages, machine
        self.tensors = stages.program.graph.tensors
        self.env: dict[Value, dict[int, Any]] = {}
        self.made: dict[int, list[Value]] = {}
        self.trips: int | None = None  # of a cut loop, once it has run

    def put(self, value: Value, mesh: int, array: Any) -> None:
        """Note that an array lies on a mesh."""
        if value not in self.env:
            self.env[value] = {}
            self.made.setdefault(value[0], []).append(value)
        self.env[value][mesh] = array

    def forget(self, tensors: set[int]) -> None:
        """Let go of every value of these tensors."""
        for t in tensors:
            for value in self.made.pop(t, ()):
                del self.env[value]

    def fetch(self, value: Value, mesh: int) -> Any:
        """The array of a value on a mesh: it lies there, or is brought there whole or in parts."""
        held = self.env.get(value, {})
        if mesh in held:
            return held[mesh]
        if self.tensors[value[0]].role is not Role.ACTIVATION:
            array = self.machine.given(value, mesh)
        else:
            parts = [self.part(source, value, mesh) for source in find(value, self.made)]
            array = self.machine.settle(parts[0] if len(parts) == 1 else self.machine.arrays.join(parts), value, mesh)
        self.put(value, mesh, array)
        return array

    def part(self, source: Value, wanted: Value, mesh: int) -> Any:
        """What `source` holds of the wanted value, on a mesh."""
        held = self.env[source]
        src = mesh if mesh in held else next(iter(held))  # whoever made it comes first
        array, span = held[src], wanted[1]
        if source != wanted and span is not None:
            first = source[1][0] if source[1] is not None else 0
            start, stop = max(span[0], first), span[1] if source[1] is None else min(span[1], source[1][1])
            array, source = self.machine.arrays.rows(array, start - first, stop - first), (wanted[0], (start, stop))
        return array if src == mesh else self.machine.move(array, source, src, mesh)

    def run(self) -> None:
        """Walk all steps, letting go of what no later step reads."""
        keep = set(self.stages.program.graph.outputs)
        steps = self.stages.steps
        last: dict[int, int] = {}
        for n, step in enumerate(steps):
            last.update((t, n) for t in _tensors_read(step))
        for n, step in enumerate(steps):
            if isinstance(step, Stage):
                self.compute(step)
            else:
                self.loop(step)
            self.forget({t for t in self.made if last.get(t, -1) <= n and t not in keep})

    def compute(self, stage: Stage, trip: int = -1) -> None:
        """Run one stage where it belongs."""
        arrays = [self.fetch(v, stage.mesh) for v in stage.inputs]
        for v, array in zip(stage.outputs, self.machine.compute(stage, arrays, trip), strict=True):
            self.put(v, stage.mesh, array)
        for i in stage.donated:
            self.env.get(stage.inputs[i], {}).pop(stage.mesh, None)

    def loop(self, plan: LoopPlan) -> None:
        """Run a token loop trip by trip."""
        carry = {t: (init, new) for t, init, new in plan.carry}
        inner = [*plan.body, *([plan.cond] if plan.cond is not None else [])]
        needed = {(v, s.mesh) for s in inner for v in s.inputs if v[0] in carry}
        needed |= {((plan.answer, None), inner[0].mesh)} if plan.answer in carry else set()
        for _ in plan.carry:  # a carry that only takes another's place is needed where that one is
            needed |= {((carry[v[0]][1], v[1]), m) for v, m in needed if carry[v[0]][1] in carry}
        kept = {t for t, _, new in plan.carry if {t, new} & {r[1] for r in plan.results}} - {v[0] for v, _ in needed}
        needed |= {((t, None), inner[0].mesh) for t in kept}
        xs = {(v, s.mesh) for s in inner for v in s.inputs if v[0] in dict(plan.xs)}
        xs |= {((new, None), inner[0].mesh) for _, _, new in plan.carry if new in dict(plan.xs)}
        state, rows = sorted(needed, key=str), sorted(xs, key=str)
        for (t, span), m in state:
            self.put((t, span), m, self.machine.settle(self.machine.arrays.copy(self.fetch((carry[t][0], span), m)), (t, span), m))
        maker = {v[0]: s.mesh for s in plan.body for v in s.outputs}
        stacks: dict[int, list[Any]] = {outside: [] for outside, _, stacked in plan.results if stacked}
        inside = {v[0] for s in plan.body for v in s.outputs} | set(carry)
        trip = 0
        while self.goes_on(plan, trip):
            if trip and plan.op.loop is not None and plan.op.loop.kind == "scan":
                self.rebind(state, carry, inside)
            for v, m in rows:
                place = trip if plan.op.loop is None or not plan.op.loop.reverse else plan.trips - 1 - trip
                self.put(v, m, self.machine.settle(self.machine.arrays.row(self.fetch((dict(plan.xs)[v[0]], None), m), place), v, m))
            for stage in plan.body:
                self.compute(stage, trip)
            for outside, tensor, stacked in plan.results:
                if stacked:
                    stacks[outside].append(self.fetch((tensor, None), maker.get(tensor, inner[0].mesh)))
            trip += 1
            if plan.answer is not None:
                self.rebind(state, carry, inside)
        self.trips = trip
        self.finish(plan, stacks, inner[0].mesh, rebound=plan.answer is not None or not trip)
        self.forget(inside)

    def goes_on(self, plan: LoopPlan, trip: int) -> bool:
        """Whether another trip follows."""
        if plan.answer is None:
            return trip < plan.trips
        mesh = plan.body[0].mesh
        if plan.cond is not None:
            mesh = plan.cond.mesh
            self.forget({v[0] for v in plan.cond.outputs})
            self.compute(plan.cond, trip)
        return self.machine.arrays.truth(self.fetch((plan.answer, None), mesh), mesh)

    def rebind(self, needed: Sequence[tuple[Value, int]], carry: dict[int, tuple[int, int]], inside: set[int]) -> None:
        """What the last trip made becomes what the next one reads."""
        new = {(v, m): self.machine.settle(self.fetch((carry[v[0]][1], v[1]), m), v, m) for v, m in needed}
        self.forget(inside)
        for (v, m), array in new.items():
            self.put(v, m, array)

    def home(self, tensor: int, wanted: int) -> int:
        """The mesh `wanted` where it holds a tensor, else whoever made it."""
        holders = [m for v in self.made.get(tensor, ()) for m in self.env[v]]
        return wanted if wanted in holders or not holders else holders[0]

    def finish(self, plan: LoopPlan, stacks: dict[int, list[Any]], fallback: int, rebound: bool) -> None:
        """Name the loop's results as the outside knows them; `rebound`: the last carry already goes by the body's name for it."""
        enters = {new: t for t, _, new in plan.carry}
        maker = {v[0]: s.mesh for s in plan.body for v in s.outputs}
        for outside, tensor, stacked in plan.results:
            if stacked:
                backwards = plan.op.loop is not None and plan.op.loop.reverse
                array = self.machine.stack(stacks[outside][::-1] if backwards else stacks[outside], (outside, None))
                mesh = maker.get(tensor, fallback)
            else:
                last = enters[tensor] if rebound else tensor
                mesh = self.home(last, maker.get(tensor, fallback))
                array = self.fetch((last, None), mesh)
            self.put((outside, None), mesh, self.machine.settle(array, (outside, None), mesh))


def _tensors_read(step: Stage | LoopPlan) -> set[int]:
    if isinstance(step, Stage):
        return {v[0] for v in step.inputs}
    inner = [*step.body, *([step.cond] if step.cond is not None else [])]
    found = {v[0] for s in inner for v in s.inputs} | {t for _, t in step.xs} | ({step.answer} if step.answer is not None else set())
    return found | {t for _, init, new in step.carry for t in (init, new)} | {t for _, t, _ in step.results}


class _Counter:
    """A machine that computes nothing and notes every move."""

    def __init__(self, stages: Stages, trips: int):
        self.tensors = stages.program.graph.tensors
        self.trip, self.trips, self.asked = -1, trips, 0
        self.arrays: Arrays = self
        self.moves: list[tuple[int, Value, int, int]] = []

    def given(self, value: Value, mesh: int) -> Any:
        return None

    def compute(self, stage: Stage, arrays: Sequence[Any], trip: int) -> Sequence[Any]:
        self.trip = trip
        return [None] * len(stage.outputs)

    def move(self, array: Any, value: Value, src: int, dst: int) -> Any:
        self.moves.append((self.trip, value, src, dst))

    def rows(self, array: Any, start: int, stop: int) -> Any:
        return None

    def row(self, array: Any, index: int) -> Any:
        return None

    def join(self, arrays: Sequence[Any]) -> Any:
        return None

    def stack(self, arrays: Sequence[Any], value: Value) -> Any:
        return None

    def copy(self, array: Any) -> Any:
        return None

    def settle(self, array: Any, value: Value, mesh: int) -> Any:
        return None

    def truth(self, array: Any, mesh: int) -> bool:
        self.asked += 1
        return self.asked <= self.trips


@checked
def transfers(stages: Stages) -> tuple[Transfer, ...]:
    """Every transfer of one request, found by walking the steps without computing.

    Of a loop, three trips are walked: the first, one that stands for all in the middle, the last.
    """
    trips = next((s.trips for s in stages.steps if isinstance(s, LoopPlan)), 0)
    walked = min(trips, 3)
    steps = tuple(dataclasses.replace(s, trips=walked) if isinstance(s, LoopPlan) else s for s in stages.steps)
    counter = _Counter(stages, walked)
    Walk(dataclasses.replace(stages, steps=steps), counter).run()
    found: dict[tuple[Value, int, int], int] = {}
    for trip, value, src, dst in counter.moves:
        key = (value, src, dst)
        found[key] = found.get(key, 0) + (trips - 2 if trip == 1 and trips > 2 else 1)
    return tuple(
        Transfer(value=v, src=a, dst=b, nbytes=value_bytes(v, counter.tensors), times=n)
        for (v, a, b), n in sorted(found.items(), key=str) if n
    )  # fmt: skip
