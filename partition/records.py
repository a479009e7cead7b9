"""A problem as plain values and back: what a plan.json holds of it, and what a file of its own does, for anybody's policy in any language.

`write(problem, path)` makes such a file, `instances.read(path)` reads it. null stands for infinity. What a program adds (blocks, works, costs) is not in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from partition.errors import InstanceError, OutputError, told
from partition.flow import Flow, Resident
from partition.graph import Value
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


def _array(raw: Any, name: str) -> np.ndarray:
    if name in ("times", "layer"):
        return np.array(raw, np.int64)
    array = np.array(raw, np.float64)  # null becomes NaN
    return np.where(np.isnan(array), np.inf, array)


def from_values(raw: Mapping[str, Any]) -> Problem:
    """A problem from plain values. Raises KeyError, TypeError or ValueError for what is none."""
    arrays: dict[str, Any] = {name: _array(raw[name], name) for name in _ARRAYS} | {name: _array(raw[name], name) for name in _MAYBE if raw.get(name) is not None}
    n, m = len(raw["names"]), len(raw["meshes"])
    arrays["resident"] = arrays["resident"].reshape(len(raw["residents"]), m)
    if len(set(raw["names"])) < n:
        raise ValueError(f"two nodes are called {next(x for i, x in enumerate(raw['names']) if x in raw['names'][:i])!r}")
    if wrong := [name for name, a in arrays.items() if (a < 0).any() and name != "layer"]:
        raise ValueError(f"{wrong[0]} holds a number below 0")
    for name in ("flows", "residents"):
        for i, row in enumerate(raw[name]):
            nodes = (row["src"], *row["dst"]) if name == "flows" else row["blocks"]
            if any(not 0 <= x < n for x in nodes):
                raise ValueError(f"{name}[{i}] names a node that does not exist")
    return Problem(
        names=tuple(raw["names"]), phase=tuple(Phase(x) for x in raw["phase"]), region=tuple(raw["region"]), meshes=tuple(raw["meshes"]), kinds=tuple(raw["kinds"]),
        workload=Workload(**raw["workload"]), objective=raw["objective"], limits=dict(raw["limits"]), pins={int(k): int(v) for k, v in raw["pins"].items()},
        together=tuple(map(tuple, raw["together"])), backward=frozenset(raw["backward"]), contiguous=bool(raw["contiguous"]),
        flows=tuple(Flow(**f | {"value": _value(f["value"]), "dst": tuple(f["dst"])}) for f in raw["flows"]),
        residents=tuple(Resident(**r | {"value": _value(r["value"]), "blocks": tuple(r["blocks"])}) for r in raw["residents"]), **arrays,
    )  # fmt: skip


def _value(raw: list[Any]) -> Value:
    return (raw[0], None if raw[1] is None else tuple(raw[1]))


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


def write(problem: Problem, path: str | Path) -> Path:
    """Write a problem to a file, whole or not at all. Raises OutputError."""
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(to_values(problem), file)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write the problem: {error.strerror}", where=str(path), mend="name a file in a folder that you may write to") from None
    return path
