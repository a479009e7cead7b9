"""export(): stages as portable StableHLO artifacts in a folder, with a manifest; load(): the same in a process without the model's code.

The manifest says what each stage reads and makes, on which mesh it is to run and how that mesh splits it, what crosses, the weights by name, and a
checksum of every file. Artifacts are of one device each: they are what a mesh runs before its own compiler splits them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition import _jax
from partition._jax.likeness import identity
from partition.arguments import checked
from partition.dispatch import Arrays, Machine, Walk, transfers
from partition.errors import ExecutionError, OutputError, told
from partition.execution import HostArrays, bound_inputs, strict_options
from partition.graph import Role, Tensor, Value
from partition.origin import versions
from partition.stages import LoopPlan, Stage, Stages

FORMAT = "partition export 2"


@checked
def export(stages: Stages, folder: str | Path, *args: Any) -> Path:
    """Write stages into a new folder, whole or not at all: manifest.json, one artifact for each distinct stage, the program's constants; with `args`, these too.

    Raises OutputError where the folder exists or cannot be written, ExecutionError where flatbuffers is not installed or a stage cannot be exported.
    """
    target = Path(folder)
    if target.exists():
        raise OutputError("the folder exists already", where=str(target), mend="name a new one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise OutputError(f"cannot write there: {error.strerror}", where=str(target), mend="name a folder that you may write to") from None
    try:
        manifest = _manifest(stages, made, args)
        (made / "manifest.json").write_text(json.dumps(manifest | {"digest": _digest(json.loads(json.dumps(manifest)))}, indent=1))
        made.chmod(0o755)
        made.rename(target)
    except OSError as error:
        raise OutputError(f"cannot write the export: {error.strerror}", where=str(target), mend="name a folder with enough room") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def _manifest(stages: Stages, folder: Path, args: tuple[Any, ...]) -> dict[str, Any]:
    program, problem = stages.program, stages.problem
    lowered, graph = program.entry.lowered, program.graph
    files: dict[str, str] = {}
    rows = [_stage(stages, s, folder, files) for s in stages.all]
    used = sorted({v[0] for s in stages.all for v in (*s.inputs, *s.outputs)} | set(graph.inputs) | set(graph.outputs) | {t for s in stages.steps if isinstance(s, LoopPlan) for t in _touched(s)})
    held = {f"const {t}": _jax.to_numpy(v) if _jax.is_key(lowered.avals[t]) else np.asarray(v, lowered.avals[t].dtype) for t, v in lowered.values.items() if t in used}
    if args:
        held |= {f"input {t}": _jax.to_numpy(leaf) if _jax.is_key(lowered.avals[t]) else np.asarray(leaf, lowered.avals[t].dtype) for t, leaf in bound_inputs(program, args).items()}
    arrays = _save(held, folder, files)
    cluster = problem.cluster
    return {
        "format": FORMAT, "title": program.entry.name, "versions": dict(versions()), "options": dict(strict_options()),
        "meshes": [{"name": name, "device": problem.kinds[m], "devices": cluster.meshes[m].count if cluster is not None else 1, "splits": {str(t): list(map(str, split)) for t, split in problem.layouts[m].tensors.items() if t in used} if problem.layouts else {}}
                   for m, name in enumerate(problem.meshes)],
        "tensors": {t: {"shape": list(lowered.avals[t].shape), "dtype": str(lowered.avals[t].dtype), "role": str(graph.tensors[t].role.value), "name": graph.tensors[t].name} for t in used},
        "inputs": list(graph.inputs), "outputs": list(graph.outputs), "weights": {graph.tensors[t].name: t for t in graph.inputs if graph.tensors[t].role is Role.PARAM},
        "trips": problem.workload.trips, "steps": [s.id if isinstance(s, Stage) else _loop(s) for s in stages.steps], "stages": rows, "arrays": arrays,
        "crosses": [{"value": t.value, "from": problem.meshes[t.src], "to": problem.meshes[t.dst], "bytes": t.nbytes, "times": t.times} for t in transfers(stages)], "sha256": files,
    }  # fmt: skip


def _digest(manifest: Mapping[str, Any]) -> str:
    """A checksum of all that a manifest says, but for the checksum."""
    return hashlib.sha256(json.dumps({k: v for k, v in manifest.items() if k != "digest"}, sort_keys=True).encode()).hexdigest()


def _touched(plan: LoopPlan) -> set[int]:
    return {t for row in (*plan.carry, *plan.xs, *((a, b) for a, b, _ in plan.results)) for t in row}


def _stage(stages: Stages, stage: Stage, folder: Path, files: dict[str, str]) -> dict[str, Any]:
    from jax import export as jax_export

    name = f"stage-{identity(stage.jaxpr)[:16]}.bin"
    if name not in files:
        avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in _jax.body_of(stage.jaxpr).invars]
        try:
            blob = bytes(jax_export.export(jax.jit(_jax.as_function(stage.jaxpr)))(*avals).serialize())
        except ImportError:
            raise ExecutionError("exporting needs flatbuffers, which is not installed", where="export", mend="pip install 'partition-planner[export]'") from None
        except Exception as error:
            raise ExecutionError(f"stage {stage.id} cannot be exported: {told(error)}", where=f"stage {stage.id} on {stages.problem.meshes[stage.mesh]}", mend="take out what only this process can run, such as callbacks") from None
        (folder / name).write_bytes(blob)
        files[name] = hashlib.sha256(blob).hexdigest()
    return {"id": stage.id, "mesh": stage.mesh, "region": stage.region, "artifact": name, "inputs": stage.inputs, "outputs": stage.outputs}


def _loop(plan: LoopPlan) -> dict[str, Any]:
    assert plan.op.loop is not None
    return {"trips": plan.trips, "cond": plan.cond.id if plan.cond is not None else None, "body": [s.id for s in plan.body], "carry": plan.carry, "xs": plan.xs, "results": plan.results,
            "kind": plan.op.loop.kind, "reverse": plan.op.loop.reverse, "answer": plan.answer}  # fmt: skip


def _save(held: Mapping[str, np.ndarray], folder: Path, files: dict[str, str]) -> dict[str, Any]:
    """Arrays as one safetensors file of bytes; name -> shape and type."""
    from safetensors.numpy import save

    blob = save({name: np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8) for name, a in held.items()})
    (folder / "arrays.safetensors").write_bytes(blob)
    files["arrays.safetensors"] = hashlib.sha256(blob).hexdigest()
    return {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in held.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """Loaded stages. `run()` computes with the arguments that were exported, or with `inputs` by name in their place; gives the outputs in order."""

    manifest: Mapping[str, Any] = dataclasses.field(repr=False)
    calls: Mapping[str, Any] = dataclasses.field(repr=False)
    arrays: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

    @property
    def names(self) -> dict[str, int]:
        """What the program takes: name -> tensor."""
        return {self.manifest["tensors"][str(t)]["name"]: t for t in self.manifest["inputs"]}

    def run(self, inputs: Mapping[str, Any] | None = None) -> list[Any]:
        """Run every stage on this host. Raises ExecutionError for an input that is unknown, missing, or of another shape or type."""
        return [array for array, _ in self.walked(self.machine(inputs, {}))]

    def bound(self, inputs: Mapping[str, Any] | None) -> dict[int, Any]:
        """The inputs by tensor that take the place of what was exported. Raises ExecutionError as `run` does."""
        tensors, given = self.manifest["tensors"], dict[int, Any]()
        for name, array in (inputs or {}).items():
            if name not in self.names:
                raise ExecutionError(f"the program takes no {name!r}", where="run(inputs)", mend=f"known: {', '.join(sorted(self.names)[:8])}")
            t = tensors[str(self.names[name])]
            key = hasattr(array, "dtype") and _jax.is_key(array)
            dtype = str(array.dtype if key else jnp.result_type(array))
            if list(np.shape(array)) != t["shape"] or dtype != t["dtype"]:
                raise ExecutionError(f"{name} is {dtype}{list(np.shape(array))}, the program takes {t['dtype']}{t['shape']}", where="run(inputs)", mend="give what was traced")
            given[self.names[name]] = _jax.to_numpy(array) if key else _jax.on_host(array)
        if lacking := [name for name, t in self.names.items() if t not in given and f"input {t}" not in self.arrays]:
            raise ExecutionError(f"{len(lacking)} inputs are missing, such as {lacking[0]!r}", where="run(inputs)", mend="give them by name, or export with the arguments: export(stages, folder, *args), partition export PLAN --seed 0")
        return given

    def walked(self, machine: Machine) -> list[tuple[Any, int]]:
        """The outputs of a walk by a machine, each with the mesh that it lies on."""
        walk = Walk(_stages(self.manifest), machine)
        walk.run()
        homes = [min(walk.env.get((t, None)) or {0: None}) for t in self.manifest["outputs"]]
        return [(walk.fetch((t, None), m), m) for t, m in zip(self.manifest["outputs"], homes, strict=True)]

    def typed(self, t: int, array: Any) -> Any:
        """An array on the host as a value of a tensor's type."""
        dtype = self.manifest["tensors"][str(t)]["dtype"]
        return _jax.from_words(array, dtype) if dtype.startswith("key<") else jnp.asarray(array, dtype)

    def machine(self, inputs: Mapping[str, Any] | None, placed: dict[tuple[Value, int], Any]) -> Machine:
        """A machine that computes every stage on this host. placed: where weights and constants that were read are kept, to reuse in the next run."""
        return _Machine(self, self.bound(inputs), placed)


def as_value(raw: Sequence[Any]) -> Value:
    """A value as JSON has it."""
    return (raw[0], None if raw[1] is None else (raw[1][0], raw[1][1]))


def _stages(manifest: Mapping[str, Any]) -> Any:
    """What a walk asks of stages, from a manifest."""
    rows = {
        s["id"]: Stage(id=s["id"], mesh=s["mesh"], region=s["region"], items=(), jaxpr=s["artifact"], inputs=tuple(map(as_value, s["inputs"])), outputs=tuple(map(as_value, s["outputs"])))
        for s in manifest["stages"]
    }  # fmt: skip
    count = max(map(int, manifest["tensors"]), default=-1) + 1
    tensors = [Tensor(id=t, shape=(), dtype="", role=Role.LITERAL, name="", nbytes=0) for t in range(count)]
    for t, row in manifest["tensors"].items():
        tensors[int(t)] = Tensor(id=int(t), shape=tuple(row["shape"]), dtype=row["dtype"], role=Role(row["role"]), name=row["name"], nbytes=0)

    def step(raw: Any) -> Stage | LoopPlan:
        if isinstance(raw, int):
            return rows[raw]
        op: Any = SimpleNamespace(loop=SimpleNamespace(kind=raw["kind"], reverse=raw["reverse"]))
        return LoopPlan(op=op, trips=raw["trips"], cond=None if raw["cond"] is None else rows[raw["cond"]], body=tuple(rows[i] for i in raw["body"]), carry=tuple(map(tuple, raw["carry"])),
                        xs=tuple(map(tuple, raw["xs"])), results=tuple((a, b, every) for a, b, every in raw["results"]), answer=raw["answer"])  # fmt: skip

    graph = SimpleNamespace(tensors=tensors, outputs=tuple(manifest["outputs"]))
    return SimpleNamespace(program=SimpleNamespace(graph=graph), steps=tuple(map(step, manifest["steps"])))


class _Machine:
    """Computes with loaded artifacts; every mesh is this host."""

    def __init__(self, exported: Exported, given: Mapping[int, Any], placed: dict[tuple[Value, int], Any]):
        self.of, self.loaded, self.placed = exported, given, placed
        self.arrays: Arrays = HostArrays()

    def given(self, value: Value, mesh: int) -> Any:
        t, span = value
        if t not in self.loaded and (value, mesh) in self.placed:
            return self.placed[value, mesh]
        name = f"input {t}" if t in self.of.manifest["inputs"] else f"const {t}"
        whole = self.of.typed(t, self.loaded[t] if t in self.loaded else self.of.arrays[name])
        part = whole if span is None else whole[span[0] : span[1]]
        if t not in self.loaded:
            self.placed[value, mesh] = part
        return part

    def compute(self, stage: Stage, arrays: Sequence[Any], trip: int) -> Sequence[Any]:
        made: Sequence[Any] = self.of.calls[stage.jaxpr](*arrays)
        return made

    def move(self, array: Any, value: Value, src: int, dst: int) -> Any:
        return array

    def stack(self, arrays: Sequence[Any], value: Value) -> Any:
        row = self.of.manifest["tensors"][str(value[0])]
        return jnp.stack(arrays) if arrays else jnp.zeros(row["shape"], row["dtype"])

    def settle(self, array: Any, value: Value, mesh: int) -> Any:
        return array


class _Held(Mapping[str, np.ndarray]):
    """The arrays of an export, read when they are asked for."""

    def __init__(self, file: Path, rows: Mapping[str, Any]):
        from safetensors import safe_open

        self.file, self.rows = safe_open(file, framework="numpy"), rows

    def __getitem__(self, name: str) -> np.ndarray:
        row = self.rows[name]
        raw: np.ndarray = self.file.get_tensor(name)  # type: ignore[no-untyped-call]
        typed: np.ndarray = raw.view(jnp.dtype(row["dtype"]))
        return typed.reshape(row["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def load(folder: str | Path, meshes: Collection[int] | None = None) -> Exported:
    """Read an export, hold every file to its checksum, and compile what runs on the meshes (numbers; None: on all).

    Raises OutputError for a changed or missing byte, another format, or a JAX that cannot read it.
    """
    from jax import export as jax_export

    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, not {FORMAT!r}")
        if manifest.get("digest") != _digest(manifest):
            raise OutputError("manifest.json is not what was exported: its checksum differs", where=str(folder / "manifest.json"), mend="export again, or copy the folder again")
        for name, told_sum in manifest["sha256"].items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != told_sum:
                    raise OutputError(f"{name} is not what was exported: its checksum differs", where=str(folder / name), mend="export again, or copy the folder again")
        arrays = _Held(folder / "arrays.safetensors", manifest["arrays"])
        wanted = sorted({s["artifact"] for s in manifest["stages"] if meshes is None or s["mesh"] in meshes})
        blobs = {name: (folder / name).read_bytes() for name in wanted}
    except OutputError:
        raise
    except Exception as error:  # whatever a folder of something else leads to
        raise OutputError(f"the export cannot be read: {told(error)}", where=str(folder), mend="name a folder that `partition export` wrote; if it is one, export again or copy it again") from None
    known = {k: v for k, v in manifest["options"].items() if k in strict_options()}
    calls = {}
    for name, blob in blobs.items():
        try:
            artifact = jax_export.deserialize(bytearray(blob))
            avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in artifact.in_avals]
            calls[name] = jax.jit(artifact.call, compiler_options=known).lower(*avals).compile()
        except Exception as error:
            raise OutputError(f"this JAX cannot read the artifacts: {told(error)}", where=f"{name}, written by jax {manifest['versions'].get('jax')}, this is {jax.__version__}", mend="use a JAX that is not much older or newer") from None
    return Exported(manifest=manifest, calls=calls, arrays=arrays)
