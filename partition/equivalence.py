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
import html
import itertools
import numbers
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from partition import _jax, divergence
from partition._jax.lifting import float64
from partition.arguments import checked
from partition.counterparts import parting
from partition.dispatch import transfers
from partition.distances import NARROW, TOLERANCE, Choices, Difference, against, apart, choices, compare, floating, held_wide, judged, parts
from partition.errors import EquivalenceError, ExecutionError, PartitionError, told, written_at
from partition.execution import Record, Runner, bound_inputs, prepare, uncut
from partition.graph import Value
from partition.program import Program, trace
from partition.references import References, logits
from partition.stages import Stage, Stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """outputs and boundaries: every comparison. culprit: the first op or transfer that diverges, where something does.

    cut, sharding, target: the answers to the three questions. tokens: distributions that choose tokens, where stages compute them and they are not
    bit for bit. not_shown: what a run on these stand-ins cannot tell. moved_bytes and planned_bytes: what really crossed between meshes, and what
    the plan says crosses; they differ where a token loop that may stop early ran `trips` times and not as often as planned.
    """

    equal: bool
    bitwise: bool
    outputs: tuple[Difference, ...]
    boundaries: tuple[Difference, ...]
    culprit: str | None
    not_shown: tuple[str, ...]
    stages: int
    moved_bytes: int
    planned_bytes: int
    trips: int | None
    planned_trips: int
    seconds: float
    options: Mapping[str, Any]
    cut: str = ""
    sharding: str = ""
    target: str = ""
    tokens: tuple[Choices, ...] = ()

    def __str__(self) -> str:
        word = "outputs EQUAL BIT FOR BIT" if self.bitwise else "EQUAL within bounds" if self.equal else "NOT EQUAL"
        exact = sum(d.bitwise for d in self.boundaries)
        cut = bool(self.planned_trips or self.stages)  # else two callables were compared
        lines = [f"{word}: {len(self.outputs)} outputs" + (f", {len(self.boundaries)} values at stage boundaries ({exact} bit for bit), {self.stages} stages" if cut else " of reference and candidate")]
        asked = (("is the cut right?" if cut else "is the candidate right?", self.cut), ("does sharding matter?", self.sharding), ("what would the target do?", self.target))
        lines += [f"  {question:<26}{answer}" for question, answer in asked if answer]
        lines += [f"  first divergence: {self.culprit}"] if self.culprit else []
        lines += [f"  {d}" for d in self.outputs]
        lines += [f"  {c}" for c in self.tokens]
        worst = sorted((d for d in self.boundaries if not d.bitwise), key=lambda d: (d.equal, -d.relative))
        lines += [f"  boundary {d}" for d in worst[:5]] + ([f"  ... and {len(worst) - 5} more boundaries that are not bit for bit"] if len(worst) > 5 else [])
        lines += [f"  against float64, the worst boundary: {max(held, key=lambda d: d.oracle or (0, 0))}"] if (held := [d for d in self.boundaries if d.oracle is not None]) else []
        lines += [f"  moved {self.moved_bytes:,} B between meshes, planned {self.planned_bytes:,} B{self._stopped()}"] if cut else []
        return "\n".join([*lines, *(f"  not shown: {n}" for n in self.not_shown)])

    def _repr_html_(self) -> str:
        """A verdict in a notebook: its word in colour, the rest as it prints."""
        first, *rest = html.escape(str(self)).splitlines()
        colour = "#1e8449" if self.bitwise else "#2e86c1" if self.equal else "#c0392b"
        return f"<p style='color:{colour};font-weight:bold'>{first}</p><pre>{chr(10).join(rest)}</pre>"

    def _stopped(self) -> str:
        early = self.trips is not None and self.trips < self.planned_trips
        return f": the token loop ended by itself after {self.trips} of {self.planned_trips} trips" if early else ""


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
    if tolerance is not None and not isinstance(tolerance, Mapping):
        tolerance = dict.fromkeys(TOLERANCE, float(tolerance))
    for name, share in (tolerance or {}).items():
        if name not in TOLERANCE or isinstance(share, bool) or not isinstance(share, numbers.Real) or not float(share) >= 0:
            raise ExecutionError(f"{share!r} is no tolerance of {name!r}", where="check(..., tolerance=...)", mend=f"give a share of scale from 0, for one of {', '.join(TOLERANCE)}")
    if trips < 0:
        raise ExecutionError(f"{trips} trips cannot be compared", where="check(..., trips=...)", mend="give 0 or more")
    if not isinstance(stages, Stages):
        return _two(stages, *args, tolerance=tolerance, oracle=oracle)
    program = stages.program
    if runner is not None and runner.stages is not stages:
        raise ExecutionError("the runner was prepared from other stages", where="check(..., runner=...)", mend="pass prepare(stages) of the stages that are checked")
    loaded = bound_inputs(program, args)
    if (other := divergence.misplanned(stages)) is not None:  # such steps may hand on a buffer that is gone, which ends the process
        raise _refused(_unrun(stages, other), "the steps are not those of the placement", where=other, mend="cut the program again: cut(program, placement)")
    try:
        runner = runner or prepare(stages, strict=strict)
        result, record = runner.run(loaded, keep=trips)
    except PartitionError:
        raise
    except Exception as error:
        where = divergence.misread(stages)
        raise _refused(_unrun(stages, where or told(error)), f"the stages cannot be run: {told(error)}", where=where or f"{len(stages.all)} stages", mend="look at the op named" if where else "report it: the steps are those of the placement") from error
    reference = _uncut(runner, runner.strict)(*args)
    chosen = logits(program)
    refs = References(runner, loaded, trips, more=frozenset(t for t, _ in chosen))
    outputs = _compared(reference, result, tolerance)
    kept, misread = _kept(stages, record, refs), divergence.misread(stages)
    boundaries = tuple(compare(k.name, k.reference, k.array, tolerance) for k in kept)
    culprit = misread
    truth = functools.cache(lambda: References(runner, loaded, trips, wide=True))
    if culprit is None and tolerance is None and not all(d.equal for d in (*outputs, *boundaries)):
        ours, theirs = (jax.tree_util.tree_leaves(x) for x in (reference, result))
        rough, size = _roughest(program), _size((*loaded.values(), reference))
        outputs = _judged(outputs, [(t, None) for t in program.graph.outputs], [-1] * len(outputs), ours, theirs, truth, rough, size)
        boundaries = _judged(boundaries, [k.value for k in kept], [k.trip for k in kept], [k.reference for k in kept], [k.array for k in kept], truth, rough, size)
    if culprit is None and not all(d.equal for d in boundaries):
        culprit = next(filter(None, (divergence.culprit(stages, record, refs, differs) for differs in _rules(tolerance))), None)
    equal = all(d.equal for d in outputs) and culprit is None
    before = {s.id for s in itertools.takewhile(lambda s: isinstance(s, Stage), stages.steps) if isinstance(s, Stage)}
    seen = any(not d.equal and (k.trip < trips if k.trip >= 0 else k.stage in before) for d, k in zip(boundaries, kept, strict=True))
    longer = stages.problem.workload.trips if any(s.region == "body" for s in stages.all) else 0
    if not equal and not seen and trips + 1 < longer and misread is None:  # it diverges later than was looked
        return check(stages, *args, tolerance=tolerance, trips=longer, oracle=oracle, runner=runner)
    bitwise = equal and all(d.bitwise for d in outputs)
    right, sharding = _reasons(args, reference, runner, outputs, boundaries, tolerance, equal=equal)
    if oracle:
        wanted = [truth().get((t, None), -1) for t in program.graph.outputs]
        outputs = _against(outputs, wanted, jax.tree_util.tree_leaves(reference), jax.tree_util.tree_leaves(result))
        boundaries = _against(boundaries, [truth().get(k.value, k.trip) for k in kept], [k.reference for k in kept], [k.array for k in kept])
    verdict = Verdict(
        equal=equal, bitwise=bitwise, outputs=outputs, boundaries=boundaries, culprit=culprit, cut=right, sharding=sharding,
        tokens=() if bitwise and all(d.bitwise for d in boundaries) else _tokens(stages, record, refs, chosen),
        not_shown=_not_shown(stages) + _unseen(trips, longer) + (("nothing was cut: all of it is one stage; a policy such as random cuts it",) if len(stages.all) < 2 else ()), stages=len(stages.all), moved_bytes=sum(m.nbytes for m in record.moved), planned_bytes=int(sum(t.nbytes * t.times for t in transfers(stages))),
        trips=record.trips, planned_trips=stages.problem.workload.trips, seconds=record.seconds,
        options=dict(runner.options),
    )  # fmt: skip
    _hold_numbers(verdict, reference, args)
    if not equal and (fickle := divergence.fickle(program, [loaded[t] for t in program.graph.inputs])) is not None:
        raise _refused(verdict, "the model does not give the same numbers twice", where=fickle, mend="give it keys as arguments, or take out what changes from run to run")
    if not equal:
        raise _refused(verdict, "cut and uncut program differ", where=culprit or "; ".join(str(d) for d in outputs if not d.equal), mend="look at the op named: its stage, its sharding, or the value that reached it")
    return verdict


def _uncut(runner: Runner, strict: bool) -> Callable[..., Any]:
    """The uncut program, compiled once for all checks with a runner."""
    return runner.once(("uncut", strict), lambda: uncut(runner.program, strict=strict))


def _alone(runner: Runner, strict: bool) -> Runner:
    """The same stages with nothing sharded."""
    return runner.once(("alone", strict), lambda: prepare(runner.stages, strict=strict, alone=True))


def _rules(tolerance: Mapping[str, float] | None) -> Iterator[divergence.Differs]:
    """What to look for, in turn: values beyond their bounds, and where nothing is, those whose differences are too many for roundings."""
    def how(held: Mapping[str, float] | None, reference: Any, candidate: Any) -> str:
        return "" if (d := compare("", reference, candidate, held)).equal else str(d).strip()

    yield from (functools.partial(how, held) for held in ((TOLERANCE, None) if tolerance is None else (tolerance,)))


def _unrun(stages: Stages, culprit: str) -> Verdict:
    """The verdict on stages that were not run."""
    return Verdict(
        equal=False, bitwise=False, outputs=(), boundaries=(), culprit=culprit, cut="NO", not_shown=(), stages=len(stages.all), moved_bytes=0, planned_bytes=0, trips=None,
        planned_trips=stages.problem.workload.trips, seconds=0.0, options={},
    )  # fmt: skip


def _refused(verdict: Verdict, what: str, *, where: str, mend: str) -> EquivalenceError:
    error = EquivalenceError(what, where=where, mend=mend)
    error.verdict = verdict
    return error


def _hold_numbers(verdict: Verdict, reference: Any, args: Any) -> None:
    """Raises EquivalenceError for an output or an argument without a number: NaN that equals NaN shows nothing."""
    given = ((f"argument {jax.tree_util.keystr(path)}", leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(args)[0])
    for name, leaf in (*((f"output {d.name}", leaf) for d, leaf in zip(verdict.outputs, jax.tree_util.tree_leaves(reference), strict=True)), *given):
        if floating(str(getattr(leaf, "dtype", ""))) and leaf.size and _is_nan(_jax.to_numpy(leaf).ravel()):
            what = f"every number of {name} is NaN, so nothing is shown"
            empty = dataclasses.replace(verdict, equal=False, bitwise=False, culprit=what, cut="not told: there are no numbers", sharding="")
            raise _refused(empty, what, where=f"{leaf.dtype}{list(leaf.shape)}", mend="look for the first NaN: jax.config.update('jax_debug_nans', True)")


def _is_nan(flat: np.ndarray) -> bool:
    """Whether every number is NaN; of most arrays the first one tells."""
    return all(bool(np.isnan(parts(part).astype(np.float64)).all()) for part in (flat[:1], flat))


def _two(reference: Any, candidate: Any = None, args: Any = (), *extra: Any, tolerance: Mapping[str, float] | None, oracle: bool) -> Verdict:
    """Two callables on the same arguments."""
    if not callable(reference) or not callable(candidate) or not isinstance(args, tuple | list) or extra:
        raise ExecutionError("check takes stages and the arguments of the model, or two callables and a tuple of arguments", where="check(...)", mend="write check(stages, *args) or check(reference, candidate, args)")
    start = time.perf_counter()
    want, got = (_called(name, fn, args) for name, fn in (("reference", reference), ("candidate", candidate)))
    one, other = jax.tree_util.tree_structure(want), jax.tree_util.tree_structure(got)
    if str(one) != str(other):
        raise EquivalenceError("the two give results of other structures", where=f"{str(one)[:80]} and {str(other)[:80]}", mend="let both give the same tree of arrays")
    outputs, culprit = _compared(want, got, tolerance), None
    beyond = tolerance is None and not all(d.equal for d in outputs)
    traced = functools.cache(lambda: trace(reference, *args))
    if oracle or beyond:
        truth = _wide(reference, args) or [None] * len(outputs)
        rows = (jax.tree_util.tree_leaves(want), jax.tree_util.tree_leaves(got))
        outputs = _against(outputs, truth, *rows) if oracle else outputs
        if beyond:
            rough, size = 0.0, _size((args, want))
            with contextlib.suppress(Exception):  # what JAX cannot trace has no float64 either
                rough = _roughest(traced())
            outputs = tuple(d if t is None else judged(d, t, a, b, rough, size) for d, t, a, b in zip(outputs, truth, *rows, strict=True))
            if rough >= NARROW and any(d.rounding for d in outputs) and (wide := _wide(candidate, args)) is not None:
                outputs = tuple(held_wide(d, t, u, rough) for d, t, u in zip(outputs, truth, wide, strict=True))
    equal = all(d.equal for d in outputs)
    if not equal:
        with contextlib.suppress(Exception):  # what JAX cannot trace is held by its numbers alone
            both = traced(), trace(candidate, *args)
            culprit = next(filter(None, (parting(*both, tuple(args), differs) for differs in _rules(tolerance))), None)
    bitwise = equal and all(d.bitwise for d in outputs)
    verdict = Verdict(
        equal=equal, bitwise=bitwise, outputs=outputs, boundaries=(), culprit=culprit, cut="yes, bit for bit" if bitwise else "yes, within bounds" if equal else "NO", not_shown=(*_tokens_alone(outputs), *apart(outputs)), stages=0, moved_bytes=0, planned_bytes=0,
        trips=None, planned_trips=0, seconds=time.perf_counter() - start, options={},
    )  # fmt: skip
    _hold_numbers(verdict, want, args)
    for name, fn, before in (("reference", reference, want), ("candidate", candidate, got)):
        if not equal and not all(d.bitwise for d in _compared(before, _called(name, fn, args), None)):
            raise _refused(verdict, f"the {name} does not give the same numbers twice", where=getattr(fn, "__qualname__", name), mend="give it keys as arguments, or take out what changes from run to run")
    if not equal:
        raise _refused(verdict, "reference and candidate differ", where="; ".join([*([culprit] if culprit else []), *(str(d) for d in outputs if not d.equal)]), mend="look at the op named" if culprit else "no op is found where they part: give more of what is inside as outputs")
    return verdict


def _tokens_alone(outputs: Sequence[Difference]) -> tuple[str, ...]:
    """What is not shown where no output is a float."""
    if not sum(int(np.prod(d.shape)) for d in outputs):
        return ("no output holds a number",)
    return () if any(floating(d.dtype) for d in outputs) else ("whole numbers alone were compared: what changes no token is not seen; give logits as an output too",)


def _called(name: str, fn: Callable[..., Any], args: Any) -> Any:
    """What a callable of the user's gives. Raises ExecutionError for one that raises."""
    try:
        result = fn(*_copied(args))  # it may donate its arguments, or write into them
    except Exception as error:
        try:  # some only run traced, such as those that index NumPy weights by traced tokens
            result = jax.jit(fn)(*_copied(args))
        except Exception:
            raise ExecutionError(f"the {name} raised {told(error)}", where=written_at(error), mend="make it run by itself first") from error
    for path, leaf in jax.tree_util.tree_flatten_with_path(result)[0]:
        if np.asarray(_jax.to_numpy(leaf)).dtype.kind in "OUSMm":
            raise ExecutionError(f"output {jax.tree_util.keystr(path) or 'result'} of the {name} is a {type(leaf).__name__}", where=getattr(fn, "__qualname__", name), mend="give arrays and numbers")
    return result


def _copied(args: Any) -> Any:
    """The same arguments in memory of their own."""
    return jax.tree_util.tree_map(lambda leaf: jax.random.clone(leaf) if hasattr(leaf, "dtype") and _jax.is_key(leaf) else leaf.copy() if isinstance(leaf, np.ndarray | jax.Array) else leaf, args)


def _wide(reference: Callable[..., Any], args: Any) -> list[Any] | None:
    """What a callable gives in float64; None where JAX cannot trace it."""
    try:
        return list(float64(jax.make_jaxpr(reference)(*args), jax.tree_util.tree_leaves(args)))
    except Exception:  # it is no JAX program: held to its bounds alone
        return None


def _compared(reference: Any, result: Any, tolerance: Mapping[str, float] | None) -> tuple[Difference, ...]:
    """Every leaf of a result against that of the reference."""
    paths = [jax.tree_util.keystr(path) or "result" for path, _ in jax.tree_util.tree_flatten_with_path(reference)[0]]
    pairs = zip(paths, jax.tree_util.tree_leaves(reference), jax.tree_util.tree_leaves(result), strict=True)
    return tuple(compare(name, a, b, tolerance) for name, a, b in pairs)


def _reasons(
    args: tuple[Any, ...], reference: Any, runner: Runner, outputs: Sequence[Difference], boundaries: Sequence[Difference], tolerance: Mapping[str, float] | None, *, equal: bool,
) -> tuple[str, str]:  # fmt: skip
    """Whether the cut is right, and whether sharding matters; where bits differ, found by running the stages in another way."""
    shared, inner = any(mesh.size > 1 for mesh in runner.meshes.values()), sum(not d.bitwise for d in boundaries)
    none = "no mesh is sharded: one host device stands for each"
    if not equal:
        return "NO", "not told: the cut is not right" if shared else none
    if all(d.bitwise for d in outputs):
        if not inner:
            return "yes, bit for bit", "no: bit for bit with it too" if shared else none
        return "yes: the outputs are bit for bit", f"not to the outputs; {inner} values at boundaries differ by the order of its sums" if shared else none
    alone, sharding = outputs, none
    if shared:
        alone, worst = _compared(reference, _alone(runner, runner.strict)(*args), tolerance), max(outputs, key=lambda d: d.relative)
        sharding = f"yes, by the order of its sums: {worst}" if all(d.bitwise for d in alone) else f"it adds to what the cut changes: {worst}"
    if all(d.bitwise for d in alone):
        return "yes, bit for bit on one host device a mesh", sharding
    if not runner.strict and all(d.bitwise for d in _compared(_uncut(runner, True)(*args), _alone(runner, True)(*args), tolerance)):
        return "yes: bit for bit under strict options; the default ones fuse across the cut and keep excess precision", sharding
    return "yes, within bounds: the compiler orders or fuses a part otherwise than the whole (such as a loop of one trip)", sharding


def _against(differences: Sequence[Difference], truth: Sequence[Any], reference: Sequence[Any], candidate: Sequence[Any]) -> tuple[Difference, ...]:
    """Differences with the errors of both sides against float64, where there is such a value."""
    rows = zip(differences, truth, reference, candidate, strict=True)
    return tuple(d if t is None else against(d, t, a, b) for d, t, a, b in rows)


def _size(values: Any) -> float:
    """The largest finite number among all floats of a tree."""
    arrays = [parts(_jax.to_numpy(leaf)).astype(np.float64) for leaf in jax.tree_util.tree_leaves(values) if floating(str(getattr(leaf, "dtype", "")))]
    return max((float(np.abs(a[np.isfinite(a)]).max(initial=0.0)) for a in arrays), default=0.0)


def _roughest(program: Program) -> float:
    """The bound of the narrowest floats of a program."""
    return max((TOLERANCE.get(t.dtype, 0.0) for t in program.graph.tensors), default=0.0)


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
    cluster = stages.problem.cluster
    assert cluster is not None
    used = sorted({s.mesh for s in stages.all})
    return tuple(f"{m.name}: {m.stand_in} host devices stand for {m.count}; shardings {m.count} ways are not run"
                 for m in (cluster.meshes[i] for i in used) if m.stand_in != m.count)  # fmt: skip


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
    for source, table in (("read by", record.read), ("made by", record.kept)):
        for (stage, trip, value), array in table.items():
            if stage not in conditions and (reference := refs.get(value, trip)) is not None:
                name = f"value {value[0]}{'' if value[1] is None else list(value[1])} {source} stage {stage}" + (f", trip {trip}" if trip >= 0 else "")
                found.append(_Kept(name=name, stage=stage, trip=trip, value=value, array=array, reference=reference))
    return found
