"""Where a cut program first differs: the value that arrives wrong, or the op that computes wrong, with its scope and source line.

The values kept of a run are compared with the uncut program's in the order of the run. Within the first stage that goes wrong, the
stage's equations and the program's own are run on the same inputs; where the first that differs is a loop or a call, the search goes on
inside it, trip by trip.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition import _jax
from partition._jax.bodies import environment, expose, inside
from partition._jax.likeness import unlike
from partition.dispatch import Machine
from partition.distances import compare
from partition.execution import Record
from partition.graph import Op, Value, writes
from partition.program import Program
from partition.references import References, argument
from partition.stages import LoopPlan, Stage, Stages, cut

Differs = Callable[[Any, Any], str]
"""(reference, candidate) -> how they differ beyond the bound; empty where they do not."""

COMPILED = "the divergence comes from how the stage was compiled or sharded"
AGREES = f"every equation agrees on its own: {COMPILED}"
OTHERS = "there are other equations than the program's"
FAITHFUL = 64.0
"""Roundings, as a share of scale, by which a stage may differ from its own equations on one device."""


def culprit(stages: Stages, record: Record, refs: References, differs: Differs) -> str | None:
    """The first thing that diverges in the order of the run: a value that arrives wrong, or an op that computes wrong."""
    by_id = {s.id: s for s in stages.all}
    order = list(dict.fromkeys((s, trip) for s, trip, _ in record.kept))
    meshes = stages.problem.meshes
    for stage_id, trip in order:
        stage = by_id[stage_id]
        at = f"stage {stage_id} on {meshes[stage.mesh]}" + (f", trip {trip}" if trip >= 0 else "")
        for v in stage.inputs:
            got, reference = record.read.get((stage_id, trip, v)), refs.get(v, trip)
            if got is not None and reference is not None and (how := differs(reference, got)):
                return f"{at}: tensor {v[0]} arrives wrong (a transfer or a stale value), {how}"
        for v in stage.outputs:
            got, reference = record.kept.get((stage_id, trip, v)), refs.get(v, trip)
            if got is not None and reference is not None and differs(reference, got):
                said = _first_op(stages, stage, record, refs, trip, differs)
                found = _unfaithful(stages, record, refs, order[: order.index((stage_id, trip)) + 1]) if said == AGREES else None
                return found or f"{at}: {said}"
    return None


def misplaced(refs: References) -> str | None:
    """The first weight, argument or constant that lies on a mesh otherwise than it was given; None where all are as they were. It is found in a run of its own."""
    runner, found = refs.runner, list[str]()

    def watched(machine: Machine) -> Any:
        def given(value: Value, mesh: int) -> Any:
            array = machine.given(value, mesh)
            d = None if found else compare("it", argument(runner, refs.loaded, value), _jax.to_numpy(array))
            if d is not None and not d.bitwise:
                tensor = runner.tensors[value[0]]
                found.append(f"{tensor.role.value} {tensor.name or value[0]} arrives wrong on {refs.stages.problem.meshes[mesh]}, {d}")
            return array

        return types.SimpleNamespace(arrays=machine.arrays, given=given, compute=machine.compute, move=machine.move, stack=machine.stack, settle=machine.settle)

    runner.run(refs.loaded, beside=watched)
    return found[0] if found else None


def _unfaithful(stages: Stages, record: Record, refs: References, order: Sequence[tuple[int, int]]) -> str | None:
    """The first stage that did not make what its own equations give from what it read, though it may be within bounds: its fault grew in stages behind it."""
    by_id = {s.id: s for s in stages.all}
    compiled: dict[int, Callable[..., Any]] = {}
    for stage_id, trip in order:
        stage = by_id[stage_id]
        if stage_id not in compiled:
            compiled[stage_id] = jax.jit(_jax.as_function(stage.jaxpr), compiler_options=refs.options)
        for v, want in zip(stage.outputs, compiled[stage_id](*_read(stages, stage, record, refs, trip)), strict=True):
            got, want = record.kept.get((stage_id, trip, v)), _jax.to_numpy(want)
            if got is not None and (d := compare("it", want, got)).relative > (FAITHFUL * float(jnp.finfo(want.dtype).eps) if jnp.issubdtype(want.dtype, jnp.inexact) else 0.0):  # type: ignore[no-untyped-call]
                return f"stage {stage_id} on {stages.problem.meshes[stage.mesh]}" + (f", trip {trip}" if trip >= 0 else "") + f": what it made is not what its equations give from what it read: {COMPILED}; tensor {v[0]}, {d}"
    return None


def fickle(program: Program, inputs: Sequence[Any]) -> str | None:
    """The first equation of the uncut program that gives other numbers when it is run again; None where all give the same."""
    jaxpr = program.entry.jaxpr
    found = _first_equation(jaxpr, jaxpr, inputs, {}, lambda a, b: "" if _jax.to_numpy(a).tobytes() == _jax.to_numpy(b).tobytes() else "differs from run to run")
    if found is None or found[0] < 0:
        return None
    eqn = _jax.body_of(jaxpr).eqns[found[0]]
    return f"{eqn.primitive.name} at {_jax.source(eqn)}" + (f", inside it {found[2]}" if found[2] else "")


def misplanned(stages: Stages) -> str | None:
    """The first step that is not what the placement is cut into, whatever its equations: a carry, what a stage reads, where it runs; None where all are."""
    found: list[str] = []
    for streamed in (False, True):
        clean = cut(stages.program, stages.placement, streamed=streamed)
        if len(clean.all) == len(stages.all) and len(clean.steps) == len(stages.steps):
            if (said := next(filter(None, map(_other_step, clean.steps, stages.steps)), None)) is None:
                return None
            found.append(said)
    return found[0] if found else "the steps are others than those that the placement is cut into"


def _other_step(want: Stage | LoopPlan, got: Stage | LoopPlan) -> str:
    """How a step differs from the one that `cut` makes; empty where it does not."""
    if type(want) is not type(got):
        return "a stage and a loop stand in each other's place"
    fields = ("id", "mesh", "region", "inputs", "outputs", "donated") if isinstance(want, Stage) else ("trips", "carry", "xs", "results", "answer")
    name = f"stage {want.id}" if isinstance(want, Stage) else "the token loop"
    if isinstance(want, LoopPlan) and isinstance(got, LoopPlan) and want.op is not got.op:
        return f"{name}: it is op {got.op.id} where the placement's is op {want.op.id}"
    for field in fields:
        one, other = getattr(want, field), getattr(got, field)
        if one != other:
            one, other = (next(((a, b) for a, b in zip(one, other, strict=False) if a != b), (len(one), len(other))) if isinstance(one, tuple) else (one, other))
            return f"{name}: its {field} has {other} where the placement's has {one}" if isinstance(getattr(want, field), tuple) else f"{name}: {field} is {other} where the placement's has {one}"
    if isinstance(want, LoopPlan) and isinstance(got, LoopPlan):
        return next(filter(None, map(_other_step, want.body, got.body)), "") or (_other_step(want.cond, got.cond) if want.cond is not None and got.cond is not None else "")
    return ""


def misread(stages: Stages) -> str | None:
    """The first equation of a stage that is not the program's own, whatever it computes; None where all are."""
    for stage in stages.all:
        clean = _jax.write(stage.items, stage.reads, stage.outputs, stages.program.entry.lowered, name="clean")
        if (found := unlike(clean, stage.jaxpr)) is None:
            continue
        way, _, how = found
        at = f"stage {stage.id} on {stages.problem.meshes[stage.mesh]}"
        if not way:
            return f"{at}: {how}, other than the program's"
        op = stage.items[_jax.body_of(clean).eqns.index(way[0])][0]
        inner = f", inside it {way[-1].primitive.name} at {_jax.source(way[-1], (way[0], None))}" if len(way) > 1 else ""
        return f"{at}: {describe(stages.program, op)}{inner}: the stage's {how}"
    return None


def _first_op(stages: Stages, stage: Stage, record: Record, refs: References, trip: int, differs: Differs) -> str:
    """The first equation of a stage whose result differs from the uncut program's, given the same inputs."""
    program, inputs = stages.program, _read(stages, stage, record, refs, trip)
    made = [v for op, span in stage.items for v in writes(op, span)]
    clean = _jax.write(stage.items, stage.reads, made, program.entry.lowered, name="clean")
    found = _first_equation(clean, stage.jaxpr, inputs, refs.options, differs)
    if found is None:
        return AGREES
    number, how, inner = found
    if number < 0:
        return how
    return describe(program, stage.items[number][0]) + (f", inside it {inner}" if inner else "") + f": its result {how}"


def _read(stages: Stages, stage: Stage, record: Record, refs: References, trip: int) -> list[Any]:
    """What a stage read in a trip: values that were kept, and arguments."""
    inputs = []
    for v in stage.inputs:
        array = record.read.get((stage.id, trip, v))
        if array is None:
            raw = refs.loaded[v[0]]
            array = raw if v[1] is None else raw[v[1][0] : v[1][1]]
        inputs.append(_jax.from_numpy(array, stages.program.entry.lowered.avals[v[0]]))
    return inputs


def recomputed(stages: Stages, record: Record, refs: References, tensor: int) -> dict[int, np.ndarray]:
    """Trip -> a value inside a stage as its mesh computes it, from the inputs that the run read; empty where no stage makes it as one."""
    stage = next((s for s in stages.all if any((tensor, None) in writes(op, span) for op, span in s.items)), None)
    if stage is None:
        return {}
    runner, mesh = refs.runner, stage.mesh

    def compiled() -> Callable[..., Any]:
        inner = runner.form(expose(stage.jaxpr)[0], mesh)
        at = [v for op, span in stage.items for v in writes(op, span)].index((tensor, None))
        return jax.jit(lambda *inputs: inner(*inputs)[at], compiler_options=refs.options)

    fn = runner.once(("inside", stage.id, tensor), compiled)
    trips = sorted({trip for s, trip, _ in record.kept if s == stage.id})
    return {trip: np.asarray(fn(*[jax.device_put(x, runner.sharding(v, mesh)) for x, v in zip(_read(stages, stage, record, refs, trip), stage.inputs, strict=True)])) for trip in trips}


def _first_equation(clean: Any, given: Any, inputs: Sequence[Any], options: Any, differs: Differs, theirs: bool = False) -> tuple[int, str, str] | None:
    """(number of the first equation that differs, how, what differs inside it) of two jaxprs on the same inputs."""
    want, owners = results(clean, inputs, options)
    got, others = results(given, inputs, options)
    if owners != others:
        return -1, f"{OTHERS} ({len(others)} results for {len(owners)})", ""
    for number, a, b in zip(owners, want, got, strict=True):
        if how := differs(a, b):
            env = environment(clean, inputs, want)
            return number, how, within(_jax.body_of(clean).eqns[number], _jax.body_of(given).eqns[number], env, options, differs, theirs)
    return None


def results(jaxpr: Any, inputs: Sequence[Any], options: Any) -> tuple[list[Any], list[int]]:
    exposed, owners = expose(jaxpr)
    return jax.jit(_jax.as_function(exposed), compiler_options=options)(*inputs), owners


def within(want: Any, got: Any, env: Any, options: Any, differs: Differs, theirs: bool = False) -> str:
    """What differs inside a loop or a call, trip by trip; empty where the equation is neither, or nothing inside differs by itself. theirs: say the line of `got`."""
    for clean, given, inputs in inside(want, got, env):
        if [str(v.aval) for v in _jax.body_of(clean).invars] != [str(v.aval) for v in _jax.body_of(given).invars]:
            return f"{OTHERS} (it has other inputs)"
        found = _first_equation(clean, given, inputs, options, differs, theirs)
        if found is not None:
            number, how, inner = found
            if number < 0:
                return how
            eqn, outer = (_jax.body_of(given).eqns[number], got) if theirs else (_jax.body_of(clean).eqns[number], want)
            return inner or f"{eqn.primitive.name} at {_jax.source(eqn, (outer, None))}, whose result {how}"
    return ""


def describe(program: Program, op: Op) -> str:
    """An op for people: its primitive, scope and source line."""
    return f"op {op.id} ({op.primitive}) in {op.scope or 'the top scope'} at {program.source(op) or 'a line that JAX does not keep'}"
