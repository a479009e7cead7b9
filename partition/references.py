"""The values of the uncut program that a cut one is held against: of its top level, and of the first trips of its token loop.

They are computed from the planner's graph on one host device, in the program's own arithmetic or, as the oracle, in float64 with the program's own choices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from partition import _jax
from partition._jax.lifting import Shadowed, interpreted, widened
from partition.execution import Runner
from partition.graph import Item, Op, Role, Value, writes
from partition.program import Program


def logits(program: Program) -> tuple[tuple[int, str], ...]:
    """(tensor, phase) of what tokens are chosen from: the floats that an argmax or a top-k over the last axis reads, outside of the token loop and in its body; of the
    longest such axis, for a router chooses from fewer experts than a vocabulary has words."""
    loop = next((op.loop for op in program.graph.ops if op.loop is not None and op.loop.kind in ("scan", "while") and _chooses(op.loop.body.ops)), None)
    found = [(t, "the top level") for t in _chosen(program.graph.ops, program)]
    found = list(dict.fromkeys([*found, *((t, "the token loop") for t in (_chosen(loop.body.ops, program) if loop is not None else ()))]))
    length = {t: program.graph.tensors[t].shape[-1] for t, _ in found}
    return tuple((t, name) for t, name in found if length[t] == max(length.values()))


def _chooses(ops: Sequence[Op]) -> bool:
    return any(op.primitive in ("argmax", "top_k") for op in ops)


def _chosen(ops: Sequence[Op], program: Program) -> list[int]:
    tensors = program.graph.tensors
    read = [op.inputs[0] for op in ops if op.primitive == "top_k" or (op.primitive == "argmax" and tuple(op.params["axes"]) == (len(tensors[op.inputs[0]].shape) - 1,))]
    return [t for t in read if "float" in tensors[t].dtype and tensors[t].role is Role.ACTIVATION and tensors[t].shape]


def chosen_from(runner: Runner, loaded: Mapping[int, Any], trips: int = 2) -> dict[str, np.ndarray]:
    """What the uncut program chooses tokens from, by name: at the top level, in the first trips of its token loop and in the last."""
    wanted = logits(runner.program)
    refs = References(runner, loaded, trips, more=frozenset(t for t, _ in wanted), enter=True)
    found = {f"what tokens of {name} are chosen from" + (f", trip {trip}" if trip >= 0 else ""): refs.get((t, None), trip) for t, name in wanted for trip in (-1, *sorted(refs.inner)) if (t in refs.top) == (trip < 0)}
    return {name: array for name, array in found.items() if array is not None}


def argument(runner: Runner, loaded: Mapping[int, Any], value: Value) -> np.ndarray:
    """An argument, a weight or a constant on the host, or its rows."""
    t, span = value
    whole, aval = _jax.to_numpy(loaded[t] if t in loaded else runner.lowered.values[t]), runner.lowered.avals[t]
    array = whole if _jax.is_key(aval) else whole.astype(aval.dtype, copy=False)
    return array if span is None else array[span[0] : span[1]]


class References:
    """Values of the uncut program on one host device. runner: of the stages, whose compiler options are used here too; it keeps what is compiled for the next check. more: tensors that are
    wanted beside those at stage boundaries; wide: in float64; enter: into a token loop that no stage cuts, too; ran: how many trips it made, as planned
    unless told."""

    def __init__(self, runner: Runner, loaded: Mapping[int, Any], trips: int, *, more: frozenset[int] = frozenset(), wide: bool = False, enter: bool = False, ran: int | None = None):
        self.runner, self.stages, self.program, self.loaded = runner, runner.stages, runner.program, loaded
        self.lowered = self.program.entry.lowered
        self.options = runner.options
        self.trips, self.more, self.wide = trips, more, wide
        self.ran = runner.stages.problem.workload.trips if ran is None else ran
        self.given = {t: v if np.ndim(v) else np.asarray(v, self.lowered.avals[t].dtype) for t, v in self.lowered.values.items()}
        self.top: dict[int, Any] = {}
        self.inner: dict[int, dict[int, Any]] = {}  # of the first trips and the last
        self._compute(enter)

    def get(self, value: Value, trip: int) -> np.ndarray | None:
        """The reference of a value, None where the uncut program has no such value (a carry between ranges of a scan)."""
        t, span = value
        if span is not None and span[0] == span[1]:
            return None
        table = self.inner[trip] if t in self.inner.get(trip, ()) else self.top
        if t not in table:
            return None
        array = _jax.to_numpy(widened(table[t]))
        return array if span is None else array[span[0] : span[1]]

    def compiled(self, items: list[Item], wanted: list[int]) -> Callable[[Mapping[int, Any]], dict[int, Any]]:
        """Ops as a function from known tensors to wanted ones, compiled once."""
        made = {v[0] for op, _ in items for v in writes(op, None)}
        tensors = self.program.graph.tensors
        inputs = sorted({t for op, _ in items for t in op.inputs if t not in made and tensors[t].role is not Role.LITERAL})
        wanted = [t for t in wanted if t in made]
        jaxpr = _jax.write(items, [(t, None) for t in inputs], [(t, None) for t in wanted], self.lowered, name="reference")

        def compiled() -> Callable[..., Any]:
            return jax.jit(interpreted(jaxpr, Shadowed()) if self.wide else _jax.as_function(jaxpr), compiler_options=self.options)

        fn = self.runner.once(("reference", self.wide, *(op.id for op, _ in items), tuple(wanted)), compiled)

        def call(known: Mapping[int, Any]) -> dict[int, Any]:
            with jax.enable_x64(True) if self.wide else contextlib.nullcontext():
                return dict(zip(wanted, fn(*[known[t] for t in inputs]), strict=True))

        return call

    def _compute(self, enter: bool) -> None:
        graph = self.program.graph
        values = self.more | {v[0] for s in self.stages.all for v in (*s.inputs, *s.outputs)}
        loop_op = self.stages.problem.phases.token_loop if self.stages.problem.phases else None
        known = {**self.given, **self.loaded}
        entering = set(loop_op.inputs) if loop_op is not None else set()
        top = [t for op in graph.ops for t in op.outputs if t in values | entering | set(graph.outputs)]
        self.top = self.compiled([(op, None) for op in graph.ops], top)(known)
        known.update(self.top)
        if loop_op is None or loop_op.loop is None or not (enter or any(s.region != "top" for s in self.stages.all)):
            return
        loop, own = loop_op.loop, loop_op.inputs[loop_op.loop.cond_consts :]
        inside = dict(zip(loop.body.inputs, own, strict=True))
        state = {t: known[outer] for t, outer in inside.items()}
        after = loop.consts + loop.carry
        stacked = {t: state.pop(t) for t in loop.body.inputs[after:]}
        wanted = [t for op in loop.body.ops for t in op.outputs if t in values or t in loop.body.outputs]
        body = self.compiled([(op, None) for op in loop.body.ops], wanted)
        for trip in range(self.ran):
            row = trip if not loop.reverse else (loop.trips or 1) - 1 - trip
            rows = {t: jax.tree_util.tree_map(lambda a, row=row: a[row], whole) for t, whole in stacked.items()}
            made = body({**known, **state, **rows})
            if trip < self.trips or trip == self.ran - 1:
                self.inner[trip] = {**state, **made}
            new = {t: made.get(o, {**known, **state, **rows}.get(o)) for t, o in zip(loop.body.inputs[loop.consts : after], loop.body.outputs, strict=False)}
            state = {**state, **new}
