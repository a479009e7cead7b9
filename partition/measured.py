"""A user's own times: what was measured of a node on a machine takes the place of what the model says, and is marked as measured.

A table says for the name of a node (or a pattern such as "decode/layers.*") and for a mesh or a device how long one run takes.
"""

from __future__ import annotations

import csv
import fnmatch
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from partition import units
from partition.costs import Cost
from partition.errors import NameUnknownError, ProfileError
from partition.hardware import Cluster

Times = Mapping[str, Mapping[str, float | str]]
"""Node or pattern -> mesh or device -> seconds of one run, or a time with its unit."""


def read(path: str | Path) -> Times:
    """Read times from a CSV file with the columns node, machine, time ("1.2 ms", or seconds). Raises ProfileError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            table = csv.reader(file, skipinitialspace=True)
            heads = [h.strip().lower() for h in next(table, [])]
            rows = [dict(zip(heads, (c.strip() for c in row), strict=False)) for row in table if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ProfileError(f"the times cannot be read: {error}", where=str(path), mend="name a CSV file with the columns node, machine, time") from None
    found: dict[str, dict[str, float | str]] = {}
    for n, row in enumerate(rows, 2):
        node, machine, said = (row.get(c, "") for c in ("node", "machine", "time"))
        if not (node and machine and said):
            raise ProfileError("a line lacks a node, a machine or a time", where=f"{path}:{n}", mend="write the columns node, machine, time")
        if machine in found.get(node, {}):
            raise ProfileError(f"{node!r} on {machine!r} has two times", where=f"{path}:{n}", mend="keep one of them")
        of = found.setdefault(node, {})
        try:
            of[machine] = float(said)
        except ValueError:
            of[machine] = said  # a time with its unit
    if not found:
        raise ProfileError("there are no times", where=str(path), mend="write a header node,machine,time and a line for each time")
    return found


def put(found: Sequence[Sequence[Cost]], names: Sequence[str], cluster: Cluster, times: Times) -> tuple[tuple[tuple[Cost, ...], ...], frozenset[tuple[int, int]]]:
    """Costs [n][m] with the measured ones in their places, and which these are. Of several patterns the last counts.

    Raises NameUnknownError for a node or a machine that is not there, ProfileError for a time that is none.
    """
    rows, marked = [list(row) for row in found], set()
    machines = {m.name for m in cluster.meshes} | {m.device.name for m in cluster.meshes}
    if not isinstance(times, Mapping) or not all(isinstance(k, str) and isinstance(v, Mapping) for k, v in times.items()):
        raise ProfileError("the times are no table", where="costs", mend='give {"decode/head": {"cs3": "3 ms"}}, or read a file with partition.measured.read')
    for pattern, by_machine in times.items():
        nodes = [n for n, name in enumerate(names) if name == pattern] or [n for n, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)]
        if not nodes:
            raise NameUnknownError.among("node", pattern, names, where="costs")
        for machine, said in by_machine.items():
            if machine not in machines:
                raise NameUnknownError.among("mesh or device", machine, sorted(machines), where=f"costs of {pattern!r}")
            time = _seconds(said, f"costs of {pattern!r} on {machine!r}")
            for m, mesh in enumerate(cluster.meshes):
                if machine in (mesh.name, mesh.device.name):
                    for n in nodes:
                        rows[n][m] = Cost(measured=time)
                        marked.add((n, m))
    return tuple(map(tuple, rows)), frozenset(marked)


def _seconds(said: float | str, where: str) -> float:
    try:
        if isinstance(said, bool):
            raise ValueError("it is no number")
        time = units.parse(said, "time") if isinstance(said, str) else float(said)
    except (TypeError, ValueError) as error:
        raise ProfileError(f"the time is none: {error}", where=where, mend='write seconds, or a time with its unit, as "1.2 ms"') from None
    if not math.isfinite(time) or time < 0:
        raise ProfileError(f"{said!r} is no time that a machine can take", where=where, mend="give a finite time from 0")
    return time
