"""What every stage of a run has to read, by the program alone: the value that was made under a name, in a token loop the carry of the trip and its rows.

Nothing of a plan's steps, and nothing of the walk that follows them, is in it: a run that brings a stage another value is told from one that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from partition.graph import Op, Role, Value
from partition.program import Program
from partition.stages import find

Copies = dict[int, np.ndarray]
"""Mesh -> an array that was made there, in the order in which they were made: of what several meshes compute, each has its own roundings."""


def _on(copies: Copies | None, mesh: int) -> np.ndarray | None:
    """What a mesh reads: its own, or else what was made first."""
    return copies.get(mesh, next(iter(copies.values()))) if copies else None


def _each(how: Callable[..., np.ndarray], parts: Sequence[Copies | None]) -> Copies | None:
    """An array for each mesh that made a part, of what it reads of all; None where a part is not there."""
    known = [part for part in parts if part]
    return {m: how([_on(part, m) for part in known]) for m in dict.fromkeys(m for part in known for m in part)} if known and len(known) == len(parts) else None


class _Table:
    """Values by name, whole or in rows."""

    def __init__(self) -> None:
        self.made: dict[int, dict[Value, Copies]] = {}  # by tensor

    def put(self, value: Value, copies: Copies) -> None:
        self.made.setdefault(value[0], {}).setdefault(value, {}).update(copies)

    def get(self, value: Value) -> Copies | None:
        """A value, of the pieces that make it up; None where they are not all there."""
        span, parts = value[1], list[Copies | None]()
        at = span[0] if span is not None else 0
        for source in find(value, self.made):
            held = self.made[value[0]][source]
            if source == value:
                return held
            first = source[1][0] if source[1] is not None else 0
            if first > at:
                return None
            parts.append({m: a[at - first : span[1] - first if span is not None else None] for m, a in held.items()})
            at += len(next(iter(parts[-1].values())))  # type: ignore[union-attr]
        return _each(np.concatenate, parts) if span is None or at == span[1] else None


class Wiring:
    """The values of a run as they are made, on the host. trips: of a token loop that is a scan. given: an argument, a weight or a constant."""

    def __init__(self, program: Program, loop_op: Op | None, trips: int, given: Callable[[Value], np.ndarray]):
        self.tensors, self.op, self.trips, self.given = program.graph.tensors, loop_op, trips, given
        self.top, self.now = _Table(), _Table()  # at the top level, and in this trip
        self.trip = -1
        self.state: dict[int, Copies | None] = {}  # the constants, the carry and the rows of this trip
        self.stacked: dict[int, Copies | None] = {}  # what the rows are of
        self.rows: list[list[Copies | None]] = []  # what each trip adds to the stacked results
        self.lost = False  # whether the run made other trips than the program

    def read(self, value: Value, trip: int, mesh: int) -> np.ndarray | None:
        """What a stage on a mesh has to read in a trip (-1: outside of the loop). None where the program has no such value there."""
        self._enter(trip)
        return _on(self._get(value), mesh)

    def copies(self, value: Value) -> list[np.ndarray]:
        """What a program that has run may give of a value."""
        self._enter(-1)
        return list((self._get(value) or {}).values())

    def made(self, value: Value, trip: int, mesh: int, array: np.ndarray) -> None:
        """Note what a stage made."""
        self._enter(trip)
        (self.top if trip < 0 else self.now).put(value, {mesh: array})

    def _get(self, value: Value) -> Copies | None:
        t, span = value
        if self.lost:
            return None
        if self.tensors[t].role is not Role.ACTIVATION:
            return {-1: self.given(value)}
        if t not in self.state:
            return self.now.get(value) if t in self.now.made else self.top.get(value)
        whole = self.state[t]
        return whole if whole is None or span is None else {m: a[span[0] : span[1]] for m, a in whole.items()}

    def _enter(self, trip: int) -> None:
        """Go on to the next trip, or leave the loop; a run that goes elsewhere than the program finds nothing there."""
        if trip == self.trip or self.op is None or self.op.loop is None:
            return
        loop, own = self.op.loop, self.op.inputs[self.op.loop.cond_consts :]
        after = loop.consts + loop.carry
        if self.trip < 0:
            self.state = {inside: self._get((outer, None)) for inside, outer in zip(loop.body.inputs, own, strict=True)}
            self.stacked, self.rows = {t: self.state[t] for t in loop.body.inputs[after:]}, []
        goes_on = self._goes_on()
        if goes_on is None or goes_on != (trip >= 0) or trip not in (self.trip + 1, -1):
            self.lost = True
        elif self.trip >= 0 and (trip >= 0 or loop.cond is None or not loop.cond.ops):  # else the last trip is that in which the condition said no
            made = [self._get((t, None)) for t in loop.body.outputs]
            self.rows.append(made[loop.carry :])
            self.state.update(zip(loop.body.inputs[loop.consts : after], made, strict=False))
        self.now, self.trip = _Table(), trip
        if trip >= 0:
            row = self.trips - 1 - trip if loop.reverse else trip
            self.state.update((t, whole and {m: a[row] for m, a in whole.items()}) for t, whole in self.stacked.items())
            return
        stacked = [_each(np.stack, rows[::-1] if loop.reverse else rows) for rows in zip(*self.rows, strict=True)]
        for t, copies in zip(self.op.outputs, [*(self.state[t] for t in loop.body.inputs[loop.consts : after]), *stacked], strict=False):
            if copies is not None:
                self.top.put((t, None), copies)
        self.state = {}

    def _goes_on(self) -> bool | None:
        """Whether another trip follows; None where the condition was not asked."""
        assert self.op is not None and self.op.loop is not None
        loop = self.op.loop
        if loop.cond is None:
            return self.trip + 1 < self.trips
        if self.trip < 0:
            return True  # where the condition is asked, it is so in the trip
        answer, carry = loop.cond.outputs[0], loop.cond.inputs[loop.cond_consts :]
        if answer in carry:  # as it is, for the trip that follows
            answer = loop.body.outputs[carry.index(answer)]
        elif answer in loop.cond.inputs:
            answer = self.op.inputs[loop.cond.inputs.index(answer)]
        copies = self._get((answer, None))
        return bool(next(iter(copies.values()))) if copies else None
