"""What every stage of a run has to read, by the program alone: the value that was made under a name, in a token loop the carry of the trip and its rows.

Nothing of a plan's steps, and nothing of the walk that follows them, is in it: a run that brings a stage another value is told from one that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from partition.graph import Op, Role, Value
from partition.program import Program
from partition.stages import find


class _Table:
    """Values by name, whole or in rows."""

    def __init__(self) -> None:
        self.arrays: dict[Value, np.ndarray] = {}
        self.names: dict[int, list[Value]] = {}

    def put(self, value: Value, array: np.ndarray) -> None:
        if value not in self.arrays:
            self.names.setdefault(value[0], []).append(value)
        self.arrays[value] = array

    def get(self, value: Value) -> np.ndarray | None:
        """A value, of the pieces that make it up; None where they are not all there."""
        span, parts = value[1], []
        at = span[0] if span is not None else 0
        for source in find(value, self.names):
            array = self.arrays[source]
            if source == value:
                return array
            first = source[1][0] if source[1] is not None else 0
            if first > at:
                return None
            part = array[at - first : span[1] - first if span is not None else None]
            parts.append(part)
            at += len(part)
        return np.concatenate(parts) if parts and (span is None or at == span[1]) else None


class Wiring:
    """The values of a run as they are made, on the host. trips: of a token loop that is a scan. given: an argument, a weight or a constant."""

    def __init__(self, program: Program, loop_op: Op | None, trips: int, given: Callable[[Value], np.ndarray]):
        self.tensors, self.op, self.trips, self.given = program.graph.tensors, loop_op, trips, given
        self.top, self.now = _Table(), _Table()  # at the top level, and in this trip
        self.trip = -1
        self.state: dict[int, np.ndarray | None] = {}  # the constants, the carry and the rows of this trip
        self.stacked: dict[int, np.ndarray | None] = {}  # what the rows are of
        self.rows: list[list[np.ndarray | None]] = []  # what each trip adds to the stacked results

    def read(self, value: Value, trip: int) -> np.ndarray | None:
        """What a stage has to read in a trip; after the last one (-1), what the program gives. None where the program has no such value there."""
        self._enter(trip)
        return self._get(value)

    def made(self, value: Value, trip: int, array: np.ndarray) -> None:
        """Note what a stage made."""
        self._enter(trip)
        (self.top if trip < 0 else self.now).put(value, array)

    def _get(self, value: Value) -> np.ndarray | None:
        t, span = value
        if self.tensors[t].role is not Role.ACTIVATION:
            return self.given(value)
        if t not in self.state:
            return self.now.get(value) if t in self.now.names else self.top.get(value)
        whole = self.state[t]
        return whole if whole is None or span is None else whole[span[0] : span[1]]

    def _enter(self, trip: int) -> None:
        """Go on to another trip, or leave the loop."""
        if trip == self.trip or self.op is None or self.op.loop is None:
            return
        loop, own = self.op.loop, self.op.inputs[self.op.loop.cond_consts :]
        after = loop.consts + loop.carry
        if self.trip < 0:
            self.state = {inside: self._get((outer, None)) for inside, outer in zip(loop.body.inputs, own, strict=True)}
            self.stacked, self.rows = {t: self.state[t] for t in loop.body.inputs[after:]}, []
        else:
            goes_on = self.trip + 1 < self.trips if loop.cond is None else self._get((loop.cond.outputs[0], None))
            if goes_on is None or bool(goes_on) != (trip >= 0):
                self.state = dict.fromkeys(self.state)  # the run is in another trip than the program
            elif trip >= 0 or loop.cond is None:
                made = [self._get((t, None)) for t in loop.body.outputs]
                self.rows.append(made[loop.carry :])
                self.state.update(zip(loop.body.inputs[loop.consts : after], made, strict=False))
        self.now, self.trip = _Table(), trip
        if trip >= 0:
            row = self.trips - 1 - trip if loop.reverse else trip
            self.state.update((t, None if whole is None else whole[row]) for t, whole in self.stacked.items())
            return
        stacked = [_stack(rows[::-1] if loop.reverse else rows) for rows in zip(*self.rows, strict=True)]
        for t, array in zip(self.op.outputs, [*(self.state[t] for t in loop.body.inputs[loop.consts : after]), *stacked], strict=False):
            if array is not None:
                self.top.put((t, None), array)
        self.state = {}


def _stack(rows: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [row for row in rows if row is not None]
    return np.stack(known) if len(known) == len(rows) else None
