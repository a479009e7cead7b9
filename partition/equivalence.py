"""check(): is the cut program the uncut one? Comparison in NumPy, NaN first, per output and per stage boundary.

The reference of the outputs is the jaxpr that JAX traced, compiled as one for one host device under the same options: nothing of the
planner's own reading is in it. The references of stage boundaries are computed from the planner's graph. A mismatch is traced to the
first op that diverges: the first boundary (input or output of a stage, trip by trip) that differs is found, then the first equation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from partition import _jax, divergence
from partition.dispatch import transfers
from partition.errors import EquivalenceError
from partition.execution import Record, Runner, _bind, prepare, strict_options, uncut
from partition.graph import Item, Role, Value, writes
from partition.stages import Stages

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""How far a float may be off, as a share of the largest magnitude of its tensor: a hundred or so roundings of the dtype. Integers,
truth values and keys must be equal."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One tensor of the cut program against the uncut one.

    bitwise: every bit equal. invalid: places where one is NaN or infinite and the other is not the same. max_abs, max_ulp: largest
    distance, in value and in units in the last place. relative: max_abs over the largest magnitude of the reference. wrong: elements
    that differ. equal: within the stated bound.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bitwise: bool
    invalid: int
    max_abs: float
    relative: float
    max_ulp: int
    wrong: int
    bound: float
    equal: bool

    def __str__(self) -> str:
        if self.bitwise:
            return f"{self.name} {self.dtype}{list(self.shape)}: equal bit for bit"
        what = f"{self.wrong} of {int(np.prod(self.shape))} elements differ, max abs {self.max_abs:.3g} ({self.relative:.2g} of scale), max {self.max_ulp} ULP"
        bad = f", {self.invalid} NaN or infinite on one side only" if self.invalid else ""
        return f"{self.name} {self.dtype}{list(self.shape)}: {what}{bad}; bound {self.bound:g} of scale: {'within' if self.equal else 'BEYOND'}"


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of two float arrays in units in the last place, as int64 (or float for float64)."""
    kind = {2: np.int16, 4: np.int32, 8: np.int64}.get(a.dtype.itemsize)
    if kind is None:
        return np.zeros(a.shape, np.int64)

    def ordered(x: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(x).view(kind).astype(object if a.dtype.itemsize == 8 else np.int64)
        low = -(1 << (8 * a.dtype.itemsize - 1))
        return np.where(bits < 0, low - bits, bits)

    distance: np.ndarray = np.abs(ordered(a) - ordered(b))
    return distance


def compare(name: str, reference: Any, candidate: Any, tolerance: Mapping[str, float] | None = None) -> Difference:
    """Compare two arrays: shapes and dtypes, then NaN and infinity, then values."""
    a, b = _jax.to_numpy(reference), _jax.to_numpy(candidate)
    dtype, shape = str(a.dtype), tuple(a.shape)
    if a.shape != b.shape or a.dtype != b.dtype:
        return Difference(name=f"{name} (cut: {b.dtype}{list(b.shape)})", shape=shape, dtype=dtype, bitwise=False, invalid=0, max_abs=np.inf,
                          relative=np.inf, max_ulp=0, wrong=max(a.size, 1), bound=0.0, equal=False)  # fmt: skip
    bound = (tolerance or TOLERANCE).get(dtype, 0.0)
    bitwise = a.tobytes() == b.tobytes()
    if "float" not in dtype:
        wrong = int((a != b).sum())
        gap = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) if wrong and a.dtype != bool else float(bool(wrong))
        return Difference(name=name, shape=shape, dtype=dtype, bitwise=bitwise, invalid=0, max_abs=gap, relative=gap, max_ulp=0,
                          wrong=wrong, bound=0.0, equal=not wrong)  # fmt: skip
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    same = (np.isnan(x) & np.isnan(y)) | (x == y)
    invalid = int((~finite & ~same).sum())
    gaps = np.where(finite, np.abs(np.where(finite, x, 0) - np.where(finite, y, 0)), 0.0)
    gap = float(gaps.max(initial=0.0))
    scale = float(np.abs(np.where(np.isfinite(x), x, 0.0)).max(initial=0.0))
    relative = gap / scale if scale > 0 else (0.0 if gap == 0 else np.inf)
    most = int(np.where(finite, ulps(a, b), 0).max(initial=0)) if gap > 0 else 0
    return Difference(name=name, shape=shape, dtype=dtype, bitwise=bitwise, invalid=invalid, max_abs=gap, relative=relative, max_ulp=most,
                      wrong=int((~same).sum()), bound=bound, equal=invalid == 0 and relative <= bound)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """outputs and boundaries: every comparison. culprit: the first op or transfer that diverges, where something does.

    not_shown: what a run on these stand-ins cannot tell. moved_bytes and planned_bytes: what really crossed between meshes, and what
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

    def __str__(self) -> str:
        word = "outputs EQUAL BIT FOR BIT" if self.bitwise else "EQUAL within bounds" if self.equal else "NOT EQUAL"
        exact = sum(d.bitwise for d in self.boundaries)
        lines = [f"{word}: {len(self.outputs)} outputs, {len(self.boundaries)} values at stage boundaries ({exact} bit for bit), {self.stages} stages"]
        lines += [f"  {d}" for d in self.outputs]
        lines += [f"  boundary {d}" for d in self.boundaries if not d.equal][:5]
        lines.append(f"  moved {self.moved_bytes:,} B between meshes, planned {self.planned_bytes:,} B{self._stopped()}")
        lines += [f"  first divergence: {self.culprit}"] if self.culprit else []
        return "\n".join([*lines, *(f"  not shown: {n}" for n in self.not_shown)])


    def _stopped(self) -> str:
        early = self.trips is not None and self.trips < self.planned_trips
        return f": the token loop ended by itself after {self.trips} of {self.planned_trips} trips" if early else ""


def check(stages: Stages, *args: Any, strict: bool = True, tolerance: Mapping[str, float] | None = None, trips: int = 2, runner: Runner | None = None) -> Verdict:
    """Run cut and uncut and compare outputs and stage boundaries (inside a cut token loop: its first `trips` trips).

    strict: compile both under `execution.STRICT`. tolerance: dtype -> share of scale, in place of TOLERANCE.
    Raises EquivalenceError, with the verdict, where they differ by more than the bound; ExecutionError where they cannot run.
    """
    program = stages.program
    runner = runner or prepare(stages, strict=strict)
    loaded = _bind(program, args)
    result, record = runner.run(loaded, keep=trips)
    reference = uncut(program, strict=strict)(*args)
    references = _References(stages, loaded, strict, trips)
    paths = [jax.tree_util.keystr(path) or "result" for path, _ in jax.tree_util.tree_flatten_with_path(reference)[0]]
    pairs = zip(paths, jax.tree_util.tree_leaves(reference), jax.tree_util.tree_leaves(result), strict=True)
    outputs = tuple(compare(name, a, b, tolerance) for name, a, b in pairs)
    boundaries, culprit = _boundaries(stages, record, references, tolerance)
    equal = all(d.equal for d in outputs) and culprit is None
    longer = stages.problem.workload.trips if any(s.region == "body" for s in stages.all) else 0
    if not equal and culprit is None and trips < longer:  # it diverges later than was looked
        return check(stages, *args, strict=strict, tolerance=tolerance, trips=longer, runner=runner)
    verdict = Verdict(
        equal=equal, bitwise=equal and all(d.bitwise for d in outputs), outputs=outputs, boundaries=boundaries, culprit=culprit,
        not_shown=_not_shown(stages) + _unseen(trips, longer), stages=len(stages.all), moved_bytes=sum(m.nbytes for m in record.moved), planned_bytes=int(sum(t.nbytes * t.times for t in transfers(stages))),
        trips=record.trips, planned_trips=stages.problem.workload.trips, seconds=record.seconds,
        options=dict(strict_options()) if strict else {},
    )  # fmt: skip
    if not equal:
        error = EquivalenceError("cut and uncut program differ", where=culprit or "; ".join(str(d) for d in outputs if not d.equal),
                                 mend="look at the op named: its stage, its sharding, or the value that reached it")  # fmt: skip
        error.verdict = verdict
        raise error
    return verdict


def _not_shown(stages: Stages) -> tuple[str, ...]:
    cluster = stages.problem.cluster
    assert cluster is not None
    used = sorted({s.mesh for s in stages.all})
    return tuple(f"{m.name}: {m.stand_in} host devices stand for {m.count}; shardings {m.count} ways are not run"
                 for m in (cluster.meshes[i] for i in used) if m.stand_in != m.count)  # fmt: skip


def _unseen(trips: int, all_trips: int) -> tuple[str, ...]:
    return (f"inside the token loop, values at stage boundaries were compared for the first {trips} of {all_trips} trips",) if trips < all_trips else ()


class _References:
    """Values of the uncut program: of its top level, and of the first trips of its token loop, on one host device."""

    def __init__(self, stages: Stages, loaded: Mapping[int, Any], strict: bool, trips: int):
        self.program, self.stages, self.loaded = stages.program, stages, loaded
        self.lowered = self.program.entry.lowered
        self.options = dict(strict_options()) if strict else {}
        self.trips = trips
        self.given = {t: v if np.ndim(v) else np.asarray(v, self.lowered.avals[t].dtype) for t, v in self.lowered.values.items()}
        self.top: dict[int, Any] = {}
        self.inner: list[dict[int, Any]] = []
        self._compute()

    def get(self, value: Value, trip: int) -> np.ndarray | None:
        """The reference of a value, None where the uncut program has no such value (a carry between ranges of a scan)."""
        t, span = value
        if span is not None and span[0] == span[1]:
            return None
        table = self.inner[trip] if 0 <= trip < len(self.inner) and t in self.inner[trip] else self.top
        if t not in table:
            return None
        array = _jax.to_numpy(table[t])
        return array if span is None else array[span[0] : span[1]]

    def compiled(self, items: list[Item], wanted: list[int]) -> Callable[[Mapping[int, Any]], dict[int, Any]]:
        """Ops as a function from known tensors to wanted ones, compiled once."""
        made = {v[0] for op, _ in items for v in writes(op, None)}
        tensors = self.program.graph.tensors
        inputs = sorted({t for op, _ in items for t in op.inputs if t not in made and tensors[t].role is not Role.LITERAL})
        wanted = [t for t in wanted if t in made]
        jaxpr = _jax.write(items, [(t, None) for t in inputs], [(t, None) for t in wanted], self.lowered, name="reference")
        fn = jax.jit(_jax.as_function(jaxpr), compiler_options=self.options)
        return lambda known: dict(zip(wanted, fn(*[known[t] for t in inputs]), strict=True))

    def _compute(self) -> None:
        graph = self.program.graph
        values = {v[0] for s in self.stages.all for v in (*s.inputs, *s.outputs)}
        loop_op = self.stages.problem.phases.token_loop if self.stages.problem.phases else None
        known = {**self.given, **self.loaded}
        entering = set(loop_op.inputs) if loop_op is not None else set()
        top = [t for op in graph.ops for t in op.outputs if t in values | entering | set(graph.outputs)]
        self.top = self.compiled([(op, None) for op in graph.ops], top)(known)
        known.update(self.top)
        cut_loop = any(s.region != "top" for s in self.stages.all)
        if loop_op is None or loop_op.loop is None or not cut_loop:
            return
        loop, own = loop_op.loop, loop_op.inputs[loop_op.loop.cond_consts :]
        inside = dict(zip(loop.body.inputs, own, strict=True))
        state = {t: known[outer] for t, outer in inside.items()}
        after = loop.consts + loop.carry
        stacked = {t: state.pop(t) for t in loop.body.inputs[after:]}
        wanted = [t for op in loop.body.ops for t in op.outputs if t in values or t in loop.body.outputs]
        body = self.compiled([(op, None) for op in loop.body.ops], wanted)
        for trip in range(min(self.trips, self.stages.problem.workload.trips)):
            rows = {t: a[trip if not loop.reverse else len(a) - 1 - trip] for t, a in stacked.items()}
            made = body({**known, **state, **rows})
            self.inner.append({**state, **made})
            new = {t: made.get(o, {**known, **state, **rows}.get(o)) for t, o in zip(loop.body.inputs[loop.consts : after], loop.body.outputs, strict=False)}
            state = {**state, **new}


def _boundaries(stages: Stages, record: Record, refs: _References, tolerance: Mapping[str, float] | None) -> tuple[tuple[Difference, ...], str | None]:
    """Every kept value against its reference, in the order of the run, and the first culprit."""
    found: list[Difference] = []
    culprit: str | None = None
    by_id = {s.id: s for s in stages.all}
    for source, table in (("read by", record.read), ("made by", record.kept)):
        for (stage_id, trip, value), array in table.items():
            reference = refs.get(value, trip)
            if reference is None or by_id[stage_id].region == "cond":
                continue
            where = f"value {value[0]}{'' if value[1] is None else list(value[1])} {source} stage {stage_id}" + (f", trip {trip}" if trip >= 0 else "")
            found.append(compare(where, reference, array, tolerance))
    bad = [d for d in found if not d.equal]
    if bad:
        culprit = divergence.culprit(stages, record, refs, lambda a, b: "" if (d := compare("it", a, b, tolerance)).equal else str(d))
    return tuple(found), culprit
