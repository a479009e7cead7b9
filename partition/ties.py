"""Whether a run that came out otherwise is right all the same: where sums in another order tip a choice at a near tie, all that follows is of another choice.

It is shown link by link, in a run of its own. Every stage reads what was made, bit for bit. What a stage makes is what its equations give on one device from what it
read; where it is not, because the stage is sharded, every op in it, trip by trip in the bodies of its loops, gives what it gives on one device from the very numbers that
it read. Then only roundings part the run from the uncut program, until numbers that roundings tell apart are chosen from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from partition import _jax
from partition._jax.bodies import environment, expose, inside, kept, stepped
from partition._jax.lifting import Float64, bind
from partition._jax.rewriting import unconstrained
from partition.dispatch import Arrays, Machine
from partition.distances import compare, floating, judged
from partition.divergence import describe
from partition.execution import Record, Runner
from partition.graph import Value
from partition.references import References
from partition.stages import Stage
from partition.verdict import largest


def tipped(runner: Runner, loaded: Mapping[int, Any], refs: References, result: Any, record: Record) -> str | None:
    """The choice that was tipped, where every link of a run holds that gives the same as one did before (its result and record); None where one does not, or where no choice is another
    one. refs: of all trips of the token loop."""
    witnesses: list[_Witness] = []

    def watched(machine: Machine) -> Machine:
        witnesses.append(_Witness(machine, runner, loaded, refs, record))
        return witnesses[0]

    try:
        again, _ = runner.run(loaded, beside=watched)
        for made, before in zip(jax.tree_util.tree_leaves(again), jax.tree_util.tree_leaves(result), strict=True):
            _same("an output is not what was made", made.host, made.real)
            _same("an output is another one than before", before, made.real)
    except _BrokenError:
        return None
    return witnesses[0].choice


class _BrokenError(Exception):
    """A link that does not hold."""


def _same(what: str, want: Any, got: Any) -> None:
    if _jax.to_numpy(want).tobytes() != _jax.to_numpy(got).tobytes():
        raise _BrokenError(what)


@dataclasses.dataclass(frozen=True, slots=True)
class _Twice:
    """A value as the machine has it, and on the host as it was made."""

    real: Any
    host: np.ndarray


class _Ways:
    """How a jaxpr is computed with every result kept: on one device, or as it lies on a mesh."""

    def __init__(self, form: Callable[[Any], Callable[..., Any]], options: Mapping[str, Any]):
        self.form, self.options = form, options
        self.compiled: dict[int, tuple[Any, Any]] = {}  # by the id of the jaxpr, which is held so that it stays its

    def read(self, jaxpr: Any, inputs: Sequence[Any]) -> Callable[[Any], Any]:
        """How to read each operand and result of a jaxpr's equations, given its inputs."""
        if id(jaxpr) not in self.compiled:
            self.compiled[id(jaxpr)] = jaxpr, jax.jit(self.form(expose(jaxpr)[0]), compiler_options=dict(self.options))
        return environment(jaxpr, inputs, self.compiled[id(jaxpr)][1](*inputs))

    def __call__(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
        read = self.read(jaxpr, inputs)
        return [read(v) for v in _jax.body_of(jaxpr).outvars]

    def held(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
        """The same; raises _BrokenError for an op that does not give what it gives on one device from the numbers that it read here."""
        read = self.read(jaxpr, inputs)
        for eqn in _jax.body_of(jaxpr).eqns:
            given = [read(a) for a in eqn.invars]
            want = stepped(eqn, given, self.held)
            _hold(eqn, given, want, [read(v) if v in kept(eqn) else None for v in eqn.outvars])
        return [read(v) for v in _jax.body_of(jaxpr).outvars]


def _hold(eqn: Any, given: Sequence[Any], want: Sequence[Any] | None, got: Sequence[Any]) -> None:
    """Raises _BrokenError where the results of an equation are not what it gives on one device, or what its trips gave (want)."""
    here = jax.devices("cpu")[0]
    alone = [jax.device_put(x, here) for x in given]
    made = bind(eqn, alone) if want is None else want
    wide = None
    for n, (a, b) in enumerate(zip(made, got, strict=True)):
        if b is None or (d := compare("it", a, b)).equal:
            continue
        if want is None and wide is None and floating(d.dtype):
            with jax.enable_x64(True):
                exact = Float64()
                wide = exact.leaf(eqn, [exact.enter(x, v.aval) for x, v in zip(alone, eqn.invars, strict=True)])
        if wide is None or not judged(d, wide[n], a, b, size=largest(given)).equal:
            raise _BrokenError(f"{eqn.primitive.name}: {d}")


class _Witness:
    """A machine that has each value twice: as the run's machine has it, and on the host as it was made, never moved."""

    def __init__(self, machine: Machine, runner: Runner, loaded: Mapping[int, Any], refs: References, record: Record):
        self.machine, self.runner, self.loaded, self.refs, self.record = machine, runner, loaded, refs, record
        self.arrays: Arrays = self
        self.choice: str | None = None
        self.own = _Ways(_jax.as_function, runner.options)
        self.meshes = {m: _Ways(functools.partial(runner.form, mesh=m), runner.options) for m in runner.meshes}
        self.jaxprs = {s.id: unconstrained(s.jaxpr) for s in runner.stages.all}

    def compute(self, stage: Stage, arrays: Sequence[_Twice], trip: int) -> Sequence[_Twice]:
        at = f"stage {stage.id}, trip {trip}"
        for v, array in zip(stage.inputs, arrays, strict=True):
            _same(f"{at} reads another value {v}", array.host, array.real)
        made = self.machine.compute(stage, [a.real for a in arrays], trip)
        hosts = [_jax.to_numpy(a).copy() for a in made]
        for table, values, arrays_now in ((self.record.read, stage.inputs, [a.host for a in arrays]), (self.record.kept, stage.outputs, hosts)):
            for v, now in zip(values, arrays_now, strict=True):
                _same(f"{at} has another value {v} than before", table.get((stage.id, trip, v), now), now)
        inputs = [_jax.from_numpy(a.host, self.runner.lowered.avals[v[0]]) for v, a in zip(stage.inputs, arrays, strict=True)]
        spread = [jax.device_put(x, self.runner.sharding(v, stage.mesh)) for x, v in zip(inputs, stage.inputs, strict=True)]
        jaxpr, mesh = self.jaxprs[stage.id], self.meshes[stage.mesh]
        shared = self.runner.meshes[stage.mesh].size > 1
        if not _alike(self.own(jaxpr, inputs), hosts) and not (shared and _alike(mesh.held(jaxpr, spread), hosts)):
            raise _BrokenError(f"{at} does not make what its equations give")
        if self.choice is None and not _alike([self.refs.get(v, trip) for v in stage.outputs], hosts):
            self.choice = self._choice(stage, jaxpr, trip, spread)
        return [_Twice(a, host) for a, host in zip(made, hosts, strict=True)]

    def _choice(self, stage: Stage, jaxpr: Any, trip: int, spread: Sequence[Any]) -> str | None:
        """The first op of a stage whose whole numbers are other ones than in the uncut program."""
        wanted = [self.refs.get(v, trip) for v in stage.inputs]
        uncut = [_jax.from_numpy(self._argument(v) if a is None else a, self.runner.lowered.avals[v[0]]) for v, a in zip(stage.inputs, wanted, strict=True)]
        found = _other(self.own, self.meshes[stage.mesh], jaxpr, uncut, spread)
        if found is None:
            return None
        (first, *rest), how = found
        op = stage.items[_jax.body_of(jaxpr).eqns.index(first)][0]
        inner = f", inside it {rest[-1].primitive.name} at {_jax.source(rest[-1], (first, None))}" if rest else ""
        where = f"stage {stage.id} on {self.runner.stages.problem.meshes[stage.mesh]}" + (f", trip {trip}" if trip >= 0 else "")
        return f"{where}: {describe(self.runner.program, op)}{inner}, {how}"

    def given(self, value: Value, mesh: int) -> _Twice:
        return _Twice(self.machine.given(value, mesh), self._argument(value))

    def _argument(self, value: Value) -> np.ndarray:
        t, span = value
        whole, aval = _jax.to_numpy(self.loaded[t] if t in self.loaded else self.runner.lowered.values[t]), self.runner.lowered.avals[t]
        array = whole if _jax.is_key(aval) else whole.astype(aval.dtype)
        return array if span is None else array[span[0] : span[1]]

    def move(self, array: _Twice, value: Value, src: int, dst: int) -> _Twice:
        return _Twice(self.machine.move(array.real, value, src, dst), array.host)

    def stack(self, arrays: Sequence[_Twice], value: Value) -> _Twice:
        real = self.machine.stack([a.real for a in arrays], value)
        return _Twice(real, np.stack([a.host for a in arrays]) if arrays else _jax.to_numpy(real))

    def settle(self, array: _Twice, value: Value, mesh: int) -> _Twice:
        return _Twice(self.machine.settle(array.real, value, mesh), array.host)

    def rows(self, array: _Twice, start: int, stop: int) -> _Twice:
        return _Twice(self.machine.arrays.rows(array.real, start, stop), array.host[start:stop])

    def row(self, array: _Twice, index: int) -> _Twice:
        return _Twice(self.machine.arrays.row(array.real, index), array.host[index])

    def join(self, arrays: Sequence[_Twice]) -> _Twice:
        return _Twice(self.machine.arrays.join([a.real for a in arrays]), np.concatenate([a.host for a in arrays]))

    def copy(self, array: _Twice) -> _Twice:
        return _Twice(self.machine.arrays.copy(array.real), array.host)

    def truth(self, array: _Twice) -> bool:
        _same("a loop's condition is not what was made", array.host, array.real)
        return self.machine.arrays.truth(array.real)


def _alike(want: Sequence[Any], got: Sequence[Any]) -> bool:
    return all(a is None or compare("it", a, b).equal for a, b in zip(want, got, strict=True))


def _other(one: _Ways, other: _Ways, jaxpr: Any, uncut: Sequence[Any], given: Sequence[Any]) -> tuple[list[Any], str] | None:
    """(the way to the first equation whose whole numbers differ, how far what it chooses from does), of one jaxpr computed in two ways from two sets of inputs."""
    want, got = one.read(jaxpr, uncut), other.read(jaxpr, given)
    for eqn in _jax.body_of(jaxpr).eqns:
        pairs = [compare("it", want(v), got(v)) for v in kept(eqn)]
        if all(d.bitwise for d in pairs):
            continue
        for (body, _, a), (rival, _, b) in zip(inside(eqn, eqn, want, one), inside(eqn, eqn, got, other), strict=False):
            if body is rival and (found := _other(one, other, body, a, b)) is not None:
                return [eqn, *found[0]], found[1]
        if any(not d.equal and not floating(d.dtype) for d in pairs):
            read = [d for a in eqn.invars if floating((d := compare("it", want(a), got(a))).dtype) and not d.bitwise]
            return [eqn], f"which chooses from numbers {max((d.relative for d in read), default=0.0):.2g} of scale apart"
    return None
