"""Whether a run that came out otherwise is right all the same: where sums in another order tip a choice at a near tie, all that follows is of another choice.

It is shown link by link, in a run of its own. Every stage reads what was made for it, bit for bit (`wiring.py`). What a stage makes is what its equations give on one device from what it
read; where it is not, because the stage is sharded, every op in it, trip by trip in the bodies of its loops, gives what it gives on one device from the very numbers that
it read. And the stages are those of the program: unsharded they give what it gives, or, where the compiler orders parts otherwise than the whole, both give the same bits op by op.
Then only roundings part the run from the uncut program, until numbers that roundings tell apart are chosen from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from partition import _jax
from partition._jax.bodies import environment, expose, inside, kept, one_by_one, stepped
from partition._jax.lifting import Float64, bind
from partition._jax.rewriting import unconstrained
from partition.dispatch import Machine
from partition.distances import alike, compare, floating, near
from partition.divergence import describe
from partition.execution import Record, Runner
from partition.graph import Role, Value
from partition.references import References, argument
from partition.stages import Stage
from partition.wiring import Wiring

JUMPS = frozenset({"sort", "sign", "floor", "ceil", "round", "rem"})
"""Ops that choose and give floats all the same."""


def tipped(runner: Runner, loaded: Mapping[int, Any], refs: References, result: Any, record: Record) -> tuple[str | None, str | None]:
    """(the choice that was tipped, where every link of a run holds that gives the same as one did before, its result and record, empty where no stage chooses otherwise than the uncut program;
    None where a link does not hold; its stage and op, where it is one of theirs). refs: of all trips of the token loop."""
    witnesses: list[_Witness] = []

    def watched(machine: Machine) -> Machine:
        witnesses.append(_Witness(machine, runner, loaded, refs, record))
        return witnesses[0]

    try:
        again, _ = runner.run(loaded, beside=watched)
        for t, made, before in zip(runner.program.graph.outputs, jax.tree_util.tree_leaves(again), jax.tree_util.tree_leaves(result), strict=True):
            _same("an output is another one than before", before, made)
            if not any(alike(copy, made) for copy in witnesses[0].wiring.copies((t, None))):
                raise _BrokenError("an output is not what was made")
    except _BrokenError as broken:
        return None, broken.where
    return witnesses[0].choice or "", None


def op_by_op(runner: Runner, loaded: Mapping[int, Any]) -> list[Any] | None:
    """What the uncut program gives where one op is computed after the other on one device; None where the stages, computed so too, do not give the same bits."""
    parts, _ = runner.run(loaded, beside=lambda machine: _OpByOp(machine, runner, loaded))
    program = runner.program
    whole = one_by_one(unconstrained(program.entry.jaxpr), [loaded[t] for t in program.graph.inputs])
    same = all(alike(a, b) for a, b in zip(whole, jax.tree_util.tree_leaves(parts), strict=True))
    return whole if same else None


class _OpByOp:
    """A machine in the place of a run's, which computes one op after the other and moves nothing."""

    def __init__(self, machine: Machine, runner: Runner, loaded: Mapping[int, Any]):
        self.runner, self.loaded = runner, loaded
        self.arrays, self.stack = machine.arrays, machine.stack
        self.jaxprs = {s.id: unconstrained(s.jaxpr) for s in runner.stages.all}

    def given(self, value: Value, mesh: int) -> Any:
        return _jax.from_numpy(argument(self.runner, self.loaded, value), self.runner.lowered.avals[value[0]])

    def compute(self, stage: Stage, arrays: Sequence[Any], trip: int) -> Sequence[Any]:
        return one_by_one(self.jaxprs[stage.id], arrays)

    def move(self, array: Any, value: Value, src: int, dst: int) -> Any:
        return array

    def settle(self, array: Any, value: Value, mesh: int) -> Any:
        return array


class _BrokenError(Exception):
    """A link that does not hold: how, inside which equations, and where in the program, where a stage is at fault."""

    def __init__(self, how: str, way: Sequence[Any] = (), where: str | None = None):
        super().__init__(how)
        self.how, self.way, self.where = how, way, where


def _same(what: str, want: Any, got: Any, where: str | None = None) -> None:
    if want is None or not alike(want, got):
        raise _BrokenError(what, (), where and f"{where}: {what}")


class _Ways:
    """How a jaxpr is computed with every result kept: on one device, or as it lies on a mesh."""

    def __init__(self, form: Callable[[Any], Callable[..., Any]], options: Mapping[str, Any]):
        self.form, self.options = form, options
        self.compiled: dict[tuple[int, bool], tuple[Any, Callable[..., list[Any]]]] = {}  # by the id of the jaxpr, which is held so that it stays its

    def function(self, jaxpr: Any, within: bool) -> Callable[..., list[Any]]:
        """A jaxpr as a compiled function; within: of every result in it."""
        key = id(jaxpr), within
        if key not in self.compiled:
            self.compiled[key] = jaxpr, jax.jit(self.form(expose(jaxpr)[0] if within else jaxpr), compiler_options=dict(self.options))
        return self.compiled[key][1]

    def read(self, jaxpr: Any, inputs: Sequence[Any]) -> Callable[[Any], Any]:
        """How to read each operand and result of a jaxpr's equations, given its inputs."""
        return environment(jaxpr, inputs, self.function(jaxpr, within=True)(*inputs))

    def __call__(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
        read = self.read(jaxpr, inputs)
        return [read(v) for v in _jax.body_of(jaxpr).outvars]

    def held(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
        """The same; raises _BrokenError for an op that does not give what it gives on one device from the numbers that it read here."""
        read = self.read(jaxpr, inputs)
        for eqn in _jax.body_of(jaxpr).eqns:
            given = [read(a) for a in eqn.invars]
            try:
                want = stepped(eqn, given, self.held)
                _hold(eqn, given, want, [read(v) if v in kept(eqn) else None for v in eqn.outvars])
            except _BrokenError as broken:
                raise _BrokenError(broken.how, (eqn, *broken.way)) from None
        return [read(v) for v in _jax.body_of(jaxpr).outvars]


def _hold(eqn: Any, given: Sequence[Any], want: Sequence[Any] | None, got: Sequence[Any]) -> None:
    """Raises _BrokenError where the results of an equation are not what it gives on one device, or what its trips gave (want)."""
    here = jax.devices("cpu")[0]
    alone = [jax.device_put(x, here) for x in given]
    made = bind(eqn, alone) if want is None else want
    wide = None
    for n, (a, b) in enumerate(zip(made, got, strict=True)):
        if b is None or near(a, b):
            continue
        if want is None and wide is None and floating(str(b.dtype)):
            with jax.enable_x64(True):
                exact = Float64()
                wide = exact.leaf(eqn, [exact.enter(x, v.aval) for x, v in zip(alone, eqn.invars, strict=True)])
        if wide is None or not near(a, b, wide[n], alone):
            raise _BrokenError(f"its result {compare('on one device and on the mesh', a, b)}")


class _Witness:
    """A machine around a run's, which holds every link of what that does."""

    def __init__(self, machine: Machine, runner: Runner, loaded: Mapping[int, Any], refs: References, record: Record):
        self.machine, self.runner, self.refs, self.record = machine, runner, refs, record
        self.arrays, self.given, self.move, self.stack, self.settle = machine.arrays, machine.given, machine.move, machine.stack, machine.settle
        phases = runner.stages.problem.phases
        self.wiring = Wiring(runner.program, phases.token_loop if phases else None, runner.stages.problem.workload.trips, functools.partial(argument, runner, loaded))
        self.weights: dict[tuple[Value, int], Any] = {}  # what was held once, and is read in every trip
        self.choice: str | None = None
        self.own = _Ways(_jax.as_function, runner.options)
        self.meshes = {m: _Ways(functools.partial(runner.form, mesh=m), runner.options) for m in runner.meshes}
        self.jaxprs = {s.id: unconstrained(s.jaxpr) for s in runner.stages.all}

    def compute(self, stage: Stage, arrays: Sequence[Any], trip: int) -> Sequence[Any]:
        read = []
        for v, array in zip(stage.inputs, arrays, strict=True):
            read.append(self.wiring.read(v, trip, stage.mesh))
            if self.weights.get((v, stage.mesh)) is not array:
                _same(f"it reads another value {v[0]} than was made for it", read[-1], array, self._at(stage, trip))
            if self.runner.program.graph.tensors[v[0]].role is not Role.ACTIVATION:
                self.weights[v, stage.mesh] = array
        made = self.machine.compute(stage, arrays, trip)
        hosts = [_jax.to_numpy(a).copy() for a in made]
        for table, values, arrays_now in ((self.record.read, stage.inputs, read), (self.record.kept, stage.outputs, hosts)):
            for v, now in zip(values, arrays_now, strict=True):
                _same(f"run again, it has another value {v[0]}", table.get((stage.id, trip, v), now), now, self._at(stage, trip))
        for v, host in zip(stage.outputs, hosts, strict=True):
            self.wiring.made(v, trip, stage.mesh, host)
        inputs = [_jax.from_numpy(a, self.runner.lowered.avals[v[0]]) for v, a in zip(stage.inputs, read, strict=True)]
        jaxpr, mesh = self.jaxprs[stage.id], self.meshes[stage.mesh]
        shared = self.runner.meshes[stage.mesh].size > 1
        alone = self.own.function(jaxpr, within=False)(*inputs)
        if not (_near(alone, hosts) if shared else all(map(alike, alone, hosts))):
            try:
                if not shared or not _near(mesh.held(jaxpr, self._spread(stage, inputs)), hosts):
                    raise _BrokenError("it does not make what its equations give from what it read")
            except _BrokenError as broken:
                raise _BrokenError(broken.how, broken.way, f"{self._at(stage, trip)}: {self._named(stage, jaxpr, broken.way)}{broken.how}") from None
        if self.choice is None:
            uncut = [self.refs.get(v, trip) for v in stage.outputs]
            if any(a is None for a in uncut) or not _near(uncut, hosts):  # what passes between ranges of a scan the uncut program does not have
                self.choice = self._choice(stage, jaxpr, trip, inputs)
        return made

    def _choice(self, stage: Stage, jaxpr: Any, trip: int, read: Sequence[Any]) -> str | None:
        """The first op of a stage that chooses otherwise than in the uncut program; than on one device, where the uncut program does not have what the stage read."""
        wanted = [self.refs.get(v, trip) for v in stage.inputs]
        uncut = [a if want is None else _jax.from_numpy(want, self.runner.lowered.avals[v[0]]) for v, want, a in zip(stage.inputs, wanted, read, strict=True)]
        found = _other(self.own, self.meshes[stage.mesh], jaxpr, uncut, self._spread(stage, read))
        return None if found is None else f"{self._at(stage, trip)}: {self._named(stage, jaxpr, found[0])}{found[1]}"

    def _spread(self, stage: Stage, inputs: Sequence[Any]) -> list[Any]:
        """What a stage reads as it lies on its mesh."""
        return [jax.device_put(x, self.runner.sharding(v, stage.mesh)) for x, v in zip(inputs, stage.inputs, strict=True)]

    def _at(self, stage: Stage, trip: int) -> str:
        return f"stage {stage.id} on {self.runner.stages.problem.meshes[stage.mesh]}" + (f", trip {trip}" if trip >= 0 else "")

    def _named(self, stage: Stage, jaxpr: Any, way: Sequence[Any]) -> str:
        """The op of a stage that stands at the end of a way into it; empty for none."""
        if not way:
            return ""
        op = stage.items[_jax.body_of(jaxpr).eqns.index(way[0])][0]
        inner = f", inside it {way[-1].primitive.name} at {_jax.source(way[-1], (way[0], None))}" if len(way) > 1 else ""
        return f"{describe(self.runner.program, op)}{inner}, "


def _near(want: Sequence[Any], got: Sequence[Any]) -> bool:
    return all(a is None or near(a, b) for a, b in zip(want, got, strict=True))


def _other(one: _Ways, other: _Ways, jaxpr: Any, uncut: Sequence[Any], given: Sequence[Any]) -> tuple[list[Any], str] | None:
    """(the way to the first equation that chooses otherwise, how far what it chooses from differs), of one jaxpr computed in two ways from two sets of inputs."""
    want, got = one.read(jaxpr, uncut), other.read(jaxpr, given)
    for eqn in _jax.body_of(jaxpr).eqns:
        pairs = [compare("it", want(v), got(v)) for v in kept(eqn)]
        if all(d.bitwise for d in pairs):
            continue
        for (body, _, a), (rival, _, b) in zip(inside(eqn, eqn, want, one), inside(eqn, eqn, got, other), strict=False):
            if body is rival and (found := _other(one, other, body, a, b)) is not None:
                return [eqn, *found[0]], found[1]
        if any(not d.equal and (not floating(d.dtype) or eqn.primitive.name in JUMPS) for d in pairs):
            read = [d for a in eqn.invars if floating((d := compare("it", want(a), got(a))).dtype) and not d.bitwise]
            return [eqn], f"which chooses from numbers {max((d.relative for d in read), default=0.0):.2g} of scale apart"
    return None
