"""A problem as plain values and back: what a plan.json holds of it, and what a file of its own does, for anybody's policy in any language.

`write(problem, path)` makes such a file, `instances.read(path)` reads it. null stands for infinity. What a program adds (blocks, works, costs) is not in it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pydantic

from partition import outputs
from partition.arguments import checked
from partition.errors import InstanceError, OutputError, told
from partition.flow import Flow, Resident
from partition.phases import Phase
from partition.problem import Problem
from partition.workload import Workload

FORMAT = "partition problem 1"
_ARRAYS = ("seconds", "times", "resident", "activation", "capacity", "alpha", "beta", "wire", "price", "power", "link_price", "depth", "layer")
_MAYBE = ("ports", "rates", "lanes")


def to_values(problem: Problem) -> dict[str, Any]:
    """A problem as plain values."""
    arrays = {name: _plain(getattr(problem, name)) for name in _ARRAYS} | {name: _plain(array) for name in _MAYBE if (array := getattr(problem, name)) is not None}
    return {
        "format": FORMAT, "names": problem.names, "phase": [str(x) for x in problem.phase], "region": problem.region, "meshes": problem.meshes, "kinds": problem.kinds,
        "flows": [dataclasses.asdict(f) for f in problem.flows], "residents": [dataclasses.asdict(r) for r in problem.residents], "workload": dataclasses.asdict(problem.workload),
        "objective": problem.objective, "limits": dict(problem.limits), "pins": {str(k): v for k, v in problem.pins.items()}, "together": problem.together,
        "backward": sorted(problem.backward), "contiguous": problem.contiguous, **arrays,
    }  # fmt: skip


def _plain(array: np.ndarray) -> Any:
    if array.ndim > 1:
        return [_plain(row) for row in array]
    return [None if np.isinf(x) else x for x in array.tolist()]


_Row: TypeAlias = list[float | None]  # None: infinity
_Table: TypeAlias = list[list[float | None]]
_Value: TypeAlias = tuple[int, tuple[int, int] | None]


class _Flow(pydantic.BaseModel, strict=True, extra="forbid"):
    value: _Value
    src: int
    dst: tuple[int, ...]
    nbytes: pydantic.FiniteFloat
    times: int
    kind: str


class _Resident(pydantic.BaseModel, strict=True, extra="forbid"):
    name: str
    kind: str
    value: _Value
    blocks: tuple[int, ...]
    nbytes: pydantic.FiniteFloat


class _Workload(pydantic.BaseModel, strict=True, extra="forbid"):
    batch: pydantic.PositiveInt
    trips: pydantic.NonNegativeInt


class _File(pydantic.BaseModel, strict=True, extra="forbid"):
    """What stands in a file, and of which types."""

    format: str
    names: list[str]
    phase: list[str]
    region: list[str]
    meshes: list[str]
    kinds: list[str]
    flows: list[_Flow]
    residents: list[_Resident]
    workload: _Workload
    objective: str
    limits: dict[str, pydantic.FiniteFloat]
    pins: dict[str, int]
    together: list[tuple[int, ...]]
    backward: list[int]
    contiguous: bool
    seconds: _Table
    times: list[int]
    resident: list[list[pydantic.FiniteFloat]]
    activation: list[list[pydantic.FiniteFloat]]
    capacity: _Row
    alpha: list[list[pydantic.FiniteFloat]]
    beta: _Table
    wire: _Table
    price: list[pydantic.FiniteFloat]
    power: list[pydantic.FiniteFloat]
    link_price: list[list[pydantic.FiniteFloat]]
    depth: list[pydantic.FiniteFloat]
    layer: list[int]
    ports: list[pydantic.FiniteFloat] | None = None
    rates: _Table | None = None
    lanes: _Table | None = None


def _array(raw: Any, name: str) -> np.ndarray:
    if name in ("times", "layer"):
        return np.array(raw, np.int64)
    array = np.array(raw, np.float64)  # None becomes NaN
    return np.where(np.isnan(array), np.inf, array)


def from_values(raw: Mapping[str, Any]) -> Problem:
    """A problem from plain values. Raises ValueError (pydantic's is one) for what is none."""
    try:  # as text: in strict Python values, a list is no tuple
        file = _File.model_validate_json(json.dumps(raw, allow_nan=False))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    arrays: dict[str, Any] = {name: _array(array, name) for name in (*_ARRAYS, *_MAYBE) if (array := getattr(file, name)) is not None}
    n, m = len(file.names), len(file.meshes)
    arrays["resident"] = arrays["resident"].reshape(len(file.residents), m)
    if not n or not m or len(file.phase) != n or len(file.region) != n or len(file.kinds) != m:
        raise ValueError("names, phase and region are of the nodes, meshes and kinds of the meshes, and there is one of each at least")
    if len(set(file.names)) < n:
        raise ValueError(f"two nodes are called {next(x for i, x in enumerate(file.names) if x in file.names[:i])!r}")
    if wrong := [name for name, a in arrays.items() if (a < 0).any() and name != "layer"]:
        raise ValueError(f"{wrong[0]} holds a number below 0")
    if "ports" in arrays and len(arrays["ports"]) != m:
        raise ValueError(f"ports has {len(arrays['ports'])} numbers for {m} meshes")
    places = [(f"flows[{i}]", (f.src, *f.dst)) for i, f in enumerate(file.flows)] + [(f"residents[{i}]", r.blocks) for i, r in enumerate(file.residents)]
    for where, nodes in (*places, *((f"together[{i}]", group) for i, group in enumerate(file.together)), ("backward", tuple(file.backward))):
        if any(not 0 <= x < n for x in nodes):
            raise ValueError(f"{where} names a node that does not exist")
    return Problem(
        names=tuple(file.names), phase=tuple(Phase(x) for x in file.phase), region=tuple(file.region), meshes=tuple(file.meshes), kinds=tuple(file.kinds),
        workload=Workload(**file.workload.model_dump()), objective=file.objective, limits=file.limits, pins={int(k): v for k, v in file.pins.items()},
        together=tuple(file.together), backward=frozenset(file.backward), contiguous=file.contiguous,
        flows=tuple(Flow(**f.model_dump()) for f in file.flows), residents=tuple(Resident(**r.model_dump()) for r in file.residents), **arrays,
    )  # fmt: skip


def read(raw: Mapping[str, Any], where: str) -> Problem:
    """The problem of a file of its own, or of a plan.json. Raises InstanceError with file and entry."""
    from partition.soundness import hold_sound

    inner = raw.get("problem", raw)
    try:
        if not isinstance(inner, Mapping) or inner.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        problem = from_values(inner)
        hold_sound(problem)
    except Exception as error:  # whatever a file of another form leads to
        raise InstanceError(f"is no problem: {told(error)}", where=where, mend="write it with partition.write_problem, or plan again with this version") from None
    return problem


@checked
def write(problem: Problem, path: str | Path) -> Path:
    """Write a problem to a file, whole or not at all. Raises OutputError."""
    path = Path(path)
    if not path.parent.is_dir():
        raise OutputError("cannot write the problem: there is no such folder", where=str(path), mend="name a file in a folder that you may write to")
    return outputs.write(path.parent, {path.name: json.dumps(to_values(problem))}) / path.name
