"""check(): is the cut program the uncut one? Three questions, kept apart: is the cut right, does sharding matter, what would the target do.

The reference of the outputs is the jaxpr that JAX traced, compiled as one for one host device under the same options: nothing of the
planner's own reading is in it. The references of stage boundaries are computed from the planner's graph. A mismatch is traced to the
first op that diverges: the first boundary (input or output of a stage, trip by trip) that differs is found, then the first equation.
Where the outputs are within their bounds but not bit for bit, the reason is found by running the stages unsharded, and under strict options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from partition import callables, divergence, ties
from partition.arguments import checked
from partition.dispatch import transfers
from partition.distances import TOLERANCE, Choices, Difference, choices, compare, judged
from partition.errors import ExecutionError, PartitionError, told
from partition.execution import Record, Runner, bound_inputs, prepare, uncut
from partition.graph import Value
from partition.references import References, logits
from partition.stages import Stage, Stages
from partition.verdict import Verdict, beside, changing, compared, hold_numbers, largest, numberless, refused, roughest, rules

UNSHARDED = "no mesh is sharded: one host device stands for each"
"""The answer to the second question where it does not arise."""


@checked
def check(
    stages: Stages | Callable[..., Any], *args: Any, strict: bool = True, tolerance: Mapping[str, float] | float | None = None, trips: int = 2, oracle: bool = False, runner: Runner | None = None,
) -> Verdict:  # fmt: skip
    """Run cut and uncut and compare outputs and stage boundaries (inside a cut token loop: of its first `trips` trips and the last).

    strict: compile both under `execution.STRICT`, or as the runner's stages are. runner: `prepare(stages)`; further checks with it compile nothing. tolerance: dtype -> share of scale (or one number for all), in place of what TOLERANCE has for it. oracle: hold both against float64 too.
    `check(reference, candidate, args)` compares two callables instead, for those who partition by their own means.
    What is beyond the default tolerance is judged by float64: it is equal where it is as near to that as the uncut program's own numbers are.
    Raises EquivalenceError, with the verdict, where they differ by more than that, where every number of an output is NaN, and where the model
    does not give the same twice; ExecutionError where they cannot run.
    """
    of_each = isinstance(tolerance, Mapping)
    if tolerance is not None and not isinstance(tolerance, Mapping):
        tolerance = dict.fromkeys(TOLERANCE, float(tolerance))
    for name, share in (tolerance or {}).items():
        if name not in TOLERANCE or isinstance(share, bool) or not isinstance(share, numbers.Real) or not float(share) >= 0:
            raise ExecutionError(f"{share!r} is no tolerance" + (f" of {name!r}" if of_each else ""), where="check(..., tolerance=...)", mend=f"give a share of scale from 0, for one of {', '.join(TOLERANCE)}")
    if trips < 0:
        raise ExecutionError(f"{trips} trips cannot be compared", where="check(..., trips=...)", mend="give 0 or more")
    if not isinstance(stages, Stages):
        return callables.two(stages, *args, tolerance=tolerance, oracle=oracle)
    program = stages.program
    if runner is not None and runner.stages is not stages:
        raise ExecutionError("the runner was prepared from other stages", where="check(..., runner=...)", mend="pass prepare(stages) of the stages that are checked")
    loaded = bound_inputs(program, args)
    if (other := divergence.misplanned(stages)) is not None:  # such steps may hand on a buffer that is gone, which ends the process
        raise refused(_unrun(stages, other), "the steps are not those of the placement", where=other, mend="cut the program again: cut(program, placement)")
    try:
        runner = runner or prepare(stages, strict=strict)
        result, record = runner.run(loaded, keep=trips)
        planned = stages.problem.workload.trips
        ran = planned if record.trips is None else record.trips
        if ran != planned and ran > trips:  # which trip is the last of a loop that ends by itself, is known when it has
            record = runner.run(loaded, keep=trips, last=ran - 1)[1]  # the result stays that of the first run: both are held
    except PartitionError:
        raise
    except Exception as error:
        where = divergence.misread(stages)
        raise refused(_unrun(stages, where or told(error)), f"the stages cannot be run: {told(error)}", where=where or f"{len(stages.all)} stages", mend="look at the op named" if where else "report it: the steps are those of the placement") from error
    reference = _uncut(runner, runner.strict)(*args)
    chosen = logits(program)
    refs = References(runner, loaded, trips, more=frozenset(t for t, _ in chosen), ran=ran)
    outputs = compared(reference, result, tolerance)
    kept, misread = _kept(stages, record, refs), divergence.misread(stages)
    boundaries = tuple(compare(k.name, k.reference, k.array, tolerance) for k in kept)
    culprit = misread
    truth = functools.cache(lambda: References(runner, loaded, trips, wide=True, ran=ran))
    if culprit is None and tolerance is None and not all(d.equal for d in (*outputs, *boundaries)):
        ours, theirs = (jax.tree_util.tree_leaves(x) for x in (reference, result))
        rough, size = roughest(program), largest((*loaded.values(), reference))
        outputs = _judged(outputs, [(t, None) for t in program.graph.outputs], [-1] * len(outputs), ours, theirs, truth, rough, size)
        boundaries = _judged(boundaries, [k.value for k in kept], [k.trip for k in kept], [k.reference for k in kept], [k.array for k in kept], truth, rough, size)
    if culprit is None and not all(d.equal for d in boundaries):
        culprit = next(filter(None, (divergence.culprit(stages, record, refs, differs) for differs in rules(tolerance))), None)
    equal = all(d.equal for d in outputs) and culprit is None
    before = {s.id for s in itertools.takewhile(lambda s: isinstance(s, Stage), stages.steps) if isinstance(s, Stage)}
    seen = any(not d.equal and (k.trip < trips if k.trip >= 0 else k.stage in before) for d, k in zip(boundaries, kept, strict=True))
    longer = ran if any(s.region == "body" for s in stages.all) else 0
    if not equal and not seen and trips + 1 < longer and misread is None:  # it diverges later than was looked
        return check(stages, *args, tolerance=tolerance, trips=longer, oracle=oracle, runner=runner)
    right, sharding = _reasons(args, reference, runner, outputs, boundaries, tolerance, equal=equal)
    tie, broken = _tie(args, reference, result, outputs, record, ran, runner, loaded) if not equal and misread is None and tolerance is None else (None, None)
    if tie is not None:
        equal, culprit, (right, sharding) = True, None, tie
    elif culprit is not None and divergence.COMPILED in culprit:
        culprit = divergence.misplaced(refs) or broken or culprit  # what lies on the mesh, or op by op on it
    bitwise = equal and all(d.bitwise for d in outputs)
    if oracle:
        try:
            wanted = [truth().get((t, None), -1) for t in program.graph.outputs]
        except Exception as error:
            raise ExecutionError(f"the program has no form in float64: {told(error)}", where="check(..., oracle=True)", mend="check it without the oracle") from error
        outputs = beside(outputs, wanted, jax.tree_util.tree_leaves(reference), jax.tree_util.tree_leaves(result))
        boundaries = beside(boundaries, [truth().get(k.value, k.trip) for k in kept], [k.reference for k in kept], [k.array for k in kept])
    verdict = Verdict(
        equal=equal, bitwise=bitwise, outputs=outputs, boundaries=boundaries, culprit=culprit, cut=right, sharding=sharding, tie=tie is not None,
        tokens=() if bitwise and all(d.bitwise for d in boundaries) else _tokens(stages, record, refs, chosen),
        not_shown=_not_shown(stages) + numberless(outputs, reference) + _unseen(trips, longer), stages=len(stages.all), moved_bytes=sum(m.nbytes for m in record.moved), planned_bytes=int(sum(t.nbytes * t.times for t in transfers(stages))),
        trips=record.trips, planned_trips=planned, seconds=record.seconds,
        options=dict(runner.options),
    )  # fmt: skip
    hold_numbers(verdict, reference, args)
    if not equal and (fickle := divergence.fickle(program, [loaded[t] for t in program.graph.inputs])) is not None:
        raise changing(verdict, "the model", fickle)
    if not equal:
        raise refused(verdict, "cut and uncut program differ", where=culprit or "; ".join(str(d) for d in outputs if not d.equal), mend="look at the op named: its stage, its sharding, or the value that reached it" if culprit else "no value at a boundary differs: look at how outputs and the results of loops are put together")
    return verdict


def _uncut(runner: Runner, strict: bool) -> Callable[..., Any]:
    """The uncut program, compiled once for all checks with a runner."""
    return runner.once(("uncut", strict), lambda: uncut(runner.program, strict=strict))


def _alone(runner: Runner, strict: bool) -> Runner:
    """The same stages with nothing sharded."""
    return runner.once(("alone", strict), lambda: prepare(runner.stages, strict=strict, alone=True))


def _tie(args: tuple[Any, ...], reference: Any, result: Any, outputs: Sequence[Difference], record: Record, ran: int, runner: Runner, loaded: Mapping[int, Any]) -> tuple[tuple[str, str] | None, str | None]:
    """(what the first two questions are answered where only roundings tipped a choice, None where something else differs; the stage and op that differ, where one is found)."""
    said, broken, parted = None, None, False
    shared = any(mesh.size > 1 for mesh in runner.meshes.values())
    alone = compared(reference, _alone(runner, runner.strict)(*args), None) if shared else outputs
    with contextlib.suppress(Exception):  # a program whose ops do not run one by one is held to its numbers alone
        said, broken = ties.tipped(runner, loaded, References(runner, loaded, ran, ran=ran), result, record)
        parted = said is not None and not (shared and all(d.equal for d in alone))
        if parted and (whole := ties.op_by_op(runner, loaded)) is None:
            said = None
        elif parted and not said and not all(d.equal for d in compared(jax.tree_util.tree_leaves(reference), whole, None)):
            said = "It is in the uncut program, which gives otherwise op by op too"
    if not said:
        return None, broken
    follows = f"tips a choice at a near tie, and what follows is of another choice; each op gives what it should from what it reads. {said}"
    if parted:
        return (f"yes, op by op bit for bit; the order in which the compiler computes a part {follows}", "not told: the cut's own roundings tip a choice" if shared else UNSHARDED), None
    exact = "bit for bit" if all(d.bitwise for d in alone) else "within bounds"
    return (f"yes, {exact} on one host device a mesh", f"yes, the order of its sums {follows}"), None


def _unrun(stages: Stages, culprit: str) -> Verdict:
    """The verdict on stages that were not run."""
    return Verdict(
        equal=False, bitwise=False, outputs=(), boundaries=(), culprit=culprit, cut="NO", not_shown=(), stages=len(stages.all), moved_bytes=0, planned_bytes=0, trips=None,
        planned_trips=stages.problem.workload.trips, seconds=0.0, options={},
    )  # fmt: skip


def _reasons(
    args: tuple[Any, ...], reference: Any, runner: Runner, outputs: Sequence[Difference], boundaries: Sequence[Difference], tolerance: Mapping[str, float] | None, *, equal: bool,
) -> tuple[str, str]:  # fmt: skip
    """Whether the cut is right, and whether sharding matters; where bits differ, found by running the stages in another way."""
    shared, inner = any(mesh.size > 1 for mesh in runner.meshes.values()), sum(not d.bitwise for d in boundaries)
    if not equal:
        return "NO", "not told: the cut is not right" if shared else UNSHARDED
    if all(d.bitwise for d in outputs):
        if not inner:
            return "yes, bit for bit", "no: bit for bit with it too" if shared else UNSHARDED
        return "yes: the outputs are bit for bit", f"not to the outputs; {inner} values at boundaries differ within bounds" if shared else UNSHARDED
    alone, sharding = outputs, UNSHARDED
    if shared:
        alone, worst = compared(reference, _alone(runner, runner.strict)(*args), tolerance), max(outputs, key=lambda d: d.relative)
        sharding = f"yes, by the order of its sums: {worst}" if all(d.bitwise for d in alone) else f"it adds to what the cut changes: {worst}"
    if all(d.bitwise for d in alone):
        return "yes, bit for bit on one host device a mesh", sharding
    if not runner.strict and all(d.bitwise for d in compared(_uncut(runner, True)(*args), _alone(runner, True)(*args), tolerance)):
        return "yes: bit for bit under strict options; the default ones fuse across the cut and keep excess precision", sharding
    return "yes, within bounds: the compiler orders or fuses a part otherwise than the whole (such as a loop of one trip)", sharding


def _judged(differences: Sequence[Difference], values: Sequence[Value], trips: Sequence[int], reference: Sequence[Any], candidate: Sequence[Any], truth: Callable[[], References], rough: float, size: float) -> tuple[Difference, ...]:
    """Differences beyond their bounds, held against float64 where there is such a value."""
    found = []
    for d, value, trip, a, b in zip(differences, values, trips, reference, candidate, strict=True):
        wide = None
        if not d.equal:
            with contextlib.suppress(Exception):  # a program that has no form in float64 is held to its bounds alone
                wide = truth().get(value, trip)
        found.append(d if wide is None else judged(d, wide, a, b, rough, size))
    return tuple(found)


def _tokens(stages: Stages, record: Record, refs: References, chosen: tuple[tuple[int, str], ...]) -> tuple[Choices, ...]:
    """Distributions of tokens that stages computed, against the uncut program's, of the top level and the first trips of a cut loop."""
    found = []
    for t, name in chosen:
        made = {trip: array for (_, trip, v), array in {**record.read, **record.kept}.items() if v == (t, None)}
        if not made:
            made = divergence.recomputed(stages, record, refs, t)
        for trip, array in sorted(made.items()):
            reference = refs.get((t, None), trip)
            if reference is not None and reference.shape == array.shape:
                found.append(choices(f"tokens of {name}" + (f", trip {trip}" if trip >= 0 else ""), reference, array))
    return tuple(found)


def _not_shown(stages: Stages) -> tuple[str, ...]:
    cluster, lost = stages.problem.cluster, stages.program.lost
    assert cluster is not None
    used = sorted({s.mesh for s in stages.all})
    unlike = tuple(f"{m.name}: {m.stand_in} host devices stand for {m.count}; shardings {m.count} ways are not run"
                   for m in (cluster.meshes[i] for i in used) if m.stand_in != m.count)  # fmt: skip
    whole = ("nothing was cut: all of it is one stage",) if len(stages.all) == 1 else () if stages.all else ("nothing was cut: nothing is computed",)
    return unlike + whole + ((f"what the call writes into {', '.join(lost[:3])}{' and more' if len(lost) > 3 else ''}: let it return that too",) if lost else ())


def _unseen(trips: int, all_trips: int) -> tuple[str, ...]:
    return (f"inside the token loop, values at stage boundaries were compared for the first {trips} of {all_trips} trips and the last",) if trips + 1 < all_trips else ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """A value that a stage read or made, and the uncut program's."""

    name: str
    stage: int
    trip: int
    value: Value
    array: np.ndarray
    reference: np.ndarray


def _kept(stages: Stages, record: Record, refs: References) -> list[_Kept]:
    """What was kept of a run and the uncut program has as well: what stages read, in the order of the run, then what they made."""
    found, conditions = [], {s.id for s in stages.all if s.region == "cond"}
    maker = {t: f" ({op.scope + '/' if op.scope else ''}{op.primitive})" for op in stages.program.op.values() for t in op.outputs}
    for source, table in (("read by", record.read), ("made by", record.kept)):
        for (stage, trip, value), array in table.items():
            if stage not in conditions and (reference := refs.get(value, trip)) is not None:
                name = f"value {value[0]}{'' if value[1] is None else list(value[1])}{maker.get(value[0], '')} {source} stage {stage}" + (f", trip {trip}" if trip >= 0 else "")
                found.append(_Kept(name=name, stage=stage, trip=trip, value=value, array=array, reference=reference))
    return found
