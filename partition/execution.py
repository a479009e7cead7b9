"""Compiles stages ahead of time for the CPU host devices that stand for their meshes, and runs them.

Each mesh is given `stand_in` host devices of its own. Inside it ops run tensor-parallel under the named shardings that `sharding.py`
chose for the mesh, narrowed to their number. Values cross by explicit transfers, whose bytes are counted from the arrays that were moved. Nothing waits
between stages: JAX dispatches ahead, and only a loop's condition is read on the host.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from partition import _jax
from partition._jax.lifting import floats
from partition._jax.likeness import identity
from partition._jax.rewriting import own_indices, unconstrained, whole_where_needed, wide_sums
from partition.arguments import checked
from partition.dispatch import Arrays, Machine, Walk
from partition.errors import ExecutionError, told
from partition.graph import OPAQUE, Value, bodies
from partition.hardware import Precision
from partition.precision import scaled, targeted, wire_bytes
from partition.program import Program
from partition.sharding import Layout, Split, layout, narrowed
from partition.stages import Stage, Stages

STRICT = {"xla_allow_excess_precision": False, "xla_cpu_use_fusion_emitters": False}
"""Compiler options under which a cut changes no bit: values are rounded where the program says, and no multiply-add is contracted
across what a cut would part. Those that this jaxlib knows are used."""


@functools.cache
def strict_options() -> Mapping[str, Any]:
    """The options of STRICT that the installed jaxlib accepts, tried one by one."""
    known = {}
    for name, value in STRICT.items():
        lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), jnp.float32))
        with contextlib.suppress(Exception):
            lowered.compile({name: value})
            known[name] = value
    return known


T = TypeVar("T")

Placed = dict[tuple[Value, int], tuple[Any, Any]]
"""(value, mesh) -> (the array that was given, the array as it lies on the mesh)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    """One transfer that really took place."""

    value: Value
    src: int
    dst: int
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a run did: transfers in order, and seconds until all was done.

    trips: how often the body of a cut token loop ran, None where no loop is cut. kept and read: outputs and inputs of stages on the host, where asked for, by (stage id, trip, value).
    """

    moved: tuple[Moved, ...]
    kept: Mapping[tuple[int, int, Value], np.ndarray]
    read: Mapping[tuple[int, int, Value], np.ndarray]
    seconds: float
    trips: int | None = None

    def bytes_between(self, src: int, dst: int) -> int:
        """Bytes that went from one mesh to another."""
        return sum(m.nbytes for m in self.moved if (m.src, m.dst) == (src, dst))


def _host_mesh(devices: Sequence[Any]) -> Mesh:
    """Host devices as a mesh with one axis for each prime factor of their number, so that any divisor can split a dimension."""
    n, factors, p = len(devices), [], 2
    while n > 1:
        while n % p == 0:
            factors.append(p)
            n //= p
        p += 1
    names = tuple(f"t{i}" for i in range(len(factors))) or ("t0",)
    return Mesh(np.array(devices).reshape(tuple(factors) or (1,)), names, axis_types=(AxisType.Auto,) * len(names))


def _spec(mesh: Mesh, split: Split | None, shape: Sequence[int]) -> PartitionSpec:
    """The partition spec of a tensor: axes of the mesh for each dimension that is split, as many as divide it, until all pieces are dealt out."""
    spec: list[tuple[str, ...] | None] = [None] * len(shape)
    free, left = list(mesh.shape.items()), split[1] if split else 1
    for d in split[0] if split else ():
        here, size = list[str](), shape[d]
        for name, n in list(free):
            if n > 1 and left % n == 0 and size % n == 0:
                here.append(name)
                free.remove((name, n))
                left, size = left // n, size // n
        spec[d] = tuple(here) or None
    return PartitionSpec(*spec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """In which arithmetic stages are to compute: the precision of stages by number, and the format in which floats cross (None: their own)."""

    stages: Mapping[int, Precision]
    wire: str | None = None


class Runner:
    """Compiled stages of a cut program. `load(*args)` places weights and inputs; `run(loaded)` computes; calling does both."""

    def __init__(self, stages: Stages, *, strict: bool = True, alone: bool = False, target: Target | None = None, progress: Callable[[str], None] | None = None):
        self.target = target
        self.stages, self.program = stages, stages.program
        self.lowered = self.program.entry.lowered
        self.tensors = self.program.graph.tensors
        self.strict, self.options = strict, dict(strict_options()) if strict else {}
        cluster = stages.problem.cluster
        assert cluster is not None
        sizes = [1 if alone else m.stand_in for m in cluster.meshes]
        used = sorted({s.mesh for s in stages.all}) or [0]  # a program without ops hands on its arguments
        devices = jax.devices("cpu")
        needed = sum(sizes[m] for m in used)
        if len(devices) < needed:
            raise ExecutionError(
                f"the stages need {needed} CPU host devices, JAX shows {len(devices)}",
                where=f"meshes {', '.join(cluster.meshes[m].name for m in used)} of cluster {cluster.name}",
                mend=f"call partition.host_devices({needed}) before JAX is first used, or set JAX_NUM_CPU_DEVICES={needed}",
            )  # fmt: skip
        self.meshes: dict[int, Mesh] = {}
        self.single: dict[int, Any] = {}  # mesh -> its device, where it is only one: the quicker way to bring an array there
        self.layouts: dict[int, Layout] = {}
        first = 0
        for m in used:
            self.meshes[m] = _host_mesh(devices[first : first + sizes[m]])
            first += sizes[m]
            wide = stages.problem.layouts[m] if stages.problem.layouts else layout(self.program.graph, cluster.meshes[m].ways)
            if sizes[m] == 1:
                self.single[m] = self.meshes[m].devices.item()
            self.layouts[m] = narrowed(wide, self.program.graph, sizes[m])
        self.compiled: dict[int, Callable[..., Any]] = {}
        self._shardings: dict[tuple[Value, int], NamedSharding] = {}
        self._beside: dict[Any, Any] = {}
        self.unique = 0
        self._compile(progress)

    def sharding(self, value: Value, mesh: int) -> NamedSharding:
        """How a value lies on a mesh."""
        if (value, mesh) not in self._shardings:
            self._shardings[value, mesh] = self._sharding(value, mesh)
        return self._shardings[value, mesh]

    def _sharding(self, value: Value, mesh: int) -> NamedSharding:
        split = self.layouts[mesh].tensors.get(value[0])
        return NamedSharding(self.meshes[mesh], _spec(self.meshes[mesh], split, _jax.slice_aval(self.lowered.avals[value[0]], value[1]).shape))

    def _compile(self, progress: Callable[[str], None] | None) -> None:
        seen: dict[Any, Callable[..., Any]] = {}
        for n, stage in enumerate(self.stages.all):
            if progress:
                progress(f"compile stage {n + 1} of {len(self.stages.all)}")
            inner = _jax.body_of(stage.jaxpr)
            ins = tuple(self.sharding(v, stage.mesh) for v in stage.inputs)
            outs = tuple(self.sharding(v, stage.mesh) for v in stage.outputs)
            key = (identity(stage.jaxpr), stage.mesh, stage.donated, ins, outs, self.target.stages.get(stage.id) if self.target is not None else None)
            if key not in seen:
                seen[key] = self._build(stage, inner, ins, outs)
            self.compiled[stage.id] = seen[key]
        self.unique = len(seen)

    def _build(self, stage: Stage, inner: Any, ins: Sequence[NamedSharding], outs: Sequence[NamedSharding]) -> Callable[..., Any]:
        fn = self.form(stage.jaxpr, stage.mesh)
        if self.target is not None and (precision := self.target.stages.get(stage.id)) is not None:
            fn = targeted(unconstrained(stage.jaxpr), precision)
        jitted = jax.jit(fn, in_shardings=tuple(ins), out_shardings=list(outs), donate_argnums=stage.donated, compiler_options=self.options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
            try:
                return jitted.lower(*[v.aval for v in inner.invars]).compile()
            except Exception as error:
                inside = [o for op, _ in stage.items for o in (op, *(i for body in bodies(op) for i in body.walk()))]
                ops = sorted({o.primitive for o in inside if o.primitive in OPAQUE})
                if not ops:
                    raise
                raise ExecutionError(f"stage {stage.id} cannot be compiled for CPU: {told(error)}", where=f"its opaque ops: {', '.join(ops)}",
                                     mend="use a form that runs on CPU (interpret=True for Pallas; no shard_map over devices of its own)") from error  # fmt: skip

    def form(self, jaxpr: Any, mesh: int) -> Callable[..., list[Any]]:
        """A jaxpr as a function in the form in which a mesh computes it."""
        own = unconstrained(jaxpr)
        return _jax.as_function(own if self.meshes[mesh].size < 2 else whole_where_needed(own_indices(wide_sums(own)), NamedSharding(self.meshes[mesh], PartitionSpec())))

    def load(self, *args: Any) -> dict[int, Any]:
        """Check the arguments against the trace and hand out their leaves by tensor id; they are placed when first read.

        Raises ExecutionError that names the leaf which differs.
        """
        return bound_inputs(self.program, args)

    def run(self, loaded: Mapping[int, Any], *, placed: Placed | None = None, keep: int = -1, last: int | None = None, beside: Callable[[Machine], Machine] = lambda machine: machine) -> tuple[Any, Record]:
        """Run a loaded request: (result, record).

        placed: where arrays of weights and inputs that lie on meshes are kept, to reuse in a run that is given the same ones. keep: keep the outputs of
        every stage on the host, those inside the token loop for its first `keep` trips and the last (-1: keep nothing); last: its number, that of the plan unless told.
        beside: a machine that is walked with in place of the one that computes, around it.
        """
        machine = _Computer(self, loaded, {} if placed is None else placed, keep, self.stages.problem.workload.trips - 1 if last is None else last)
        walk = Walk(self.stages, beside(machine))
        start = time.perf_counter()
        walk.run()
        results = []
        for t in self.program.graph.outputs:
            home = min(walk.env.get((t, None)) or {min(self.meshes): None})
            results.append(walk.fetch((t, None), home))
        jax.block_until_ready(results)
        record = Record(moved=tuple(machine.moved), kept=machine.kept, read=machine.read, seconds=time.perf_counter() - start, trips=walk.trips)
        return jax.tree_util.tree_unflatten(self.program.entry.out_tree, results), record

    def stream(self, requests: Sequence[tuple[Any, ...]], *, under_way: int | None = None) -> list[Any]:
        """Run requests (the arguments of each) as a pipeline, and give what each gives, in order: the schedule that a plan's throughput stands for.

        under_way: how many are at once; as many as there are meshes, so that each can work on another request, unless told.
        """
        if under_way is not None and under_way < 1:
            raise ExecutionError(f"{under_way} requests at once run nothing", where="stream(under_way=...)", mend="give 1 or more")
        placed: Placed = {}
        with concurrent.futures.ThreadPoolExecutor(under_way or len(self.meshes)) as pool:
            return list(pool.map(lambda args: self.run(self.load(*args), placed=placed)[0], requests))

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What a check of these stages compiles beside them, such as the uncut program: made by the first that asks, kept for the next."""
        if key not in self._beside:
            self._beside[key] = make()
        made: T = self._beside[key]
        return made

    def __call__(self, *args: Any) -> Any:
        return self.run(self.load(*args))[0]


class HostArrays:
    """What a walk does with JAX's arrays."""

    def rows(self, array: Any, start: int, stop: int) -> Any:
        return array[start:stop]

    def row(self, array: Any, index: int) -> Any:
        return array[index]

    def join(self, arrays: Sequence[Any]) -> Any:
        return jnp.concatenate(arrays)

    def copy(self, array: Any) -> Any:
        return jnp.copy(array)

    def truth(self, array: Any, mesh: int) -> bool:
        return bool(array)


class _Computer:
    """The machine that computes: compiled stages on host devices, `device_put` between them."""

    def __init__(self, runner: Runner, loaded: Mapping[int, Any], placed: Placed, keep: int, last: int):
        self.runner, self.loaded, self.placed, self.keep, self.last = runner, loaded, placed, keep, last
        self.arrays: Arrays = HostArrays()
        self.moved: list[Moved] = []
        self.fits: dict[tuple[int, Value, int], tuple[Any, bool]] = {}  # the shardings are held, so that their ids stay theirs
        self.kept: dict[tuple[int, int, Value], np.ndarray] = {}
        self.read: dict[tuple[int, int, Value], np.ndarray] = {}

    def given(self, value: Value, mesh: int) -> Any:
        t, span = value
        array = source = self.loaded[t] if t in self.loaded else self.runner.lowered.values[t]
        held = self.placed.get((value, mesh))
        if held is None or held[0] is not source:
            array = array if span is None else array[span[0] : span[1]]
            aval = self.runner.lowered.avals[t]
            if not _jax.is_key(aval):
                array = jnp.asarray(array, aval.dtype) if np.ndim(array) == 0 else array
            held = self.placed[value, mesh] = source, jax.device_put(array, self.runner.sharding(value, mesh))
        return held[1]

    def compute(self, stage: Stage, arrays: Sequence[Any], trip: int) -> Sequence[Any]:
        keeps = self.keep >= 0 and (trip < self.keep or trip == self.last)
        if keeps:
            pairs = zip(stage.inputs, arrays, strict=True)
            self.read.update(((stage.id, trip, v), _jax.to_numpy(a).copy()) for v, a in pairs if v[0] not in self.loaded)
        out: Sequence[Any] = self.runner.compiled[stage.id](*arrays)
        if keeps:
            self.kept.update(((stage.id, trip, v), _jax.to_numpy(a).copy()) for v, a in zip(stage.outputs, out, strict=True))
        return out

    def move(self, array: Any, value: Value, src: int, dst: int) -> Any:
        nbytes = array.nbytes
        if self.runner.target is not None and (form := self.runner.target.wire) is not None and floats(array):
            nbytes, array = min(nbytes, wire_bytes(array, form)), scaled(array, form).astype(array.dtype)
        self.moved.append(Moved(value=value, src=src, dst=dst, nbytes=nbytes))
        return jax.device_put(array, self.runner.single.get(dst) or self.runner.sharding(value, dst))

    def stack(self, arrays: Sequence[Any], value: Value) -> Any:
        aval = self.runner.lowered.avals[value[0]]
        return jnp.stack(arrays) if arrays else jnp.zeros(aval.shape, aval.dtype)

    def settle(self, array: Any, value: Value, mesh: int) -> Any:
        key = id(array.sharding), value, mesh
        if key not in self.fits:
            self.fits[key] = array.sharding, array.sharding.is_equivalent_to(self.runner.sharding(value, mesh), array.ndim)
        return array if self.fits[key][1] else jax.device_put(array, self.runner.sharding(value, mesh))


def bound_inputs(program: Program, args: tuple[Any, ...]) -> dict[int, Any]:
    """The leaves of arguments by tensor, on one host device, wherever they lay. Raises ExecutionError for those that were not traced so."""
    entry = program.entry
    leaves, tree = jax.tree_util.tree_flatten(args)
    if tree != entry.in_tree:
        raise ExecutionError("the arguments have another structure than those that were traced", where=f"{entry.name}: got {str(tree)[:120]}",
                             mend="pass the arguments that trace() was given, with arrays in place of shapes")  # fmt: skip
    tensors = program.graph.tensors
    for t, aval, leaf in zip(program.graph.inputs, entry.in_avals, leaves, strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ExecutionError(f"argument {tensors[t].name} is a shape without numbers", where=entry.name,
                                 mend="running needs arrays: make the model with weights (a seed or a checkpoint)")  # fmt: skip
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ExecutionError(f"argument {tensors[t].name} was donated to another call, its memory is gone", where=entry.name, mend="give a copy to that call, or to this one")
        if np.shape(leaf) != aval.shape or jnp.result_type(leaf) != aval.dtype:
            raise ExecutionError(f"argument {tensors[t].name} is {jnp.result_type(leaf)}{list(np.shape(leaf))}, the trace has {aval.dtype}{list(aval.shape)}",
                                 where=entry.name, mend="pass arguments of the traced shapes, or trace again")  # fmt: skip
    return dict(zip(program.graph.inputs, map(_jax.on_host, leaves), strict=True))


@checked
def prepare(stages: Stages, *, strict: bool = True, alone: bool = False, target: Target | None = None, progress: Callable[[str], None] | None = None) -> Runner:
    """Compile every stage ahead of time. strict: under the options that keep a cut bit-exact. alone: on one host device for each mesh, so that nothing is
    sharded. target: in the arithmetic of devices (see `precision`). Raises ExecutionError."""
    return Runner(stages, strict=strict, alone=alone, target=target, progress=progress)


@checked
def run(stages: Stages, *args: Any) -> Any:
    """Compile and run the stages on CPU host devices; gives what the uncut function gives. Raises ExecutionError."""
    return prepare(stages)(*args)


@checked
def uncut(program: Program, *, strict: bool = True) -> Callable[..., Any]:
    """The uncut program, compiled for one host device under the same options as the stages: the reference."""
    options = dict(strict_options()) if strict else {}
    fn = jax.jit(_jax.as_function(program.entry.jaxpr), compiler_options=options)

    def call(*args: Any) -> Any:
        bound = bound_inputs(program, args)
        return jax.tree_util.tree_unflatten(program.entry.out_tree, fn(*[bound[t] for t in program.graph.inputs]))

    return call

