"""Problems from files: published instances of other planners, in the formats that their authors gave them.

`read(path)` knows a file by what is in it. Nothing is guessed: what a format does not have (phases, token loops) the problem does not have.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from partition.errors import InstanceError
from partition.flow import Flow, Resident
from partition.phases import Phase
from partition.problem import Problem
from partition.workload import Workload


def read(path: str | Path) -> Problem:
    """A problem from a JSON file of the msr-fiddle/dnn-partitioning repository. Raises InstanceError with the file and the entry."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InstanceError(f"cannot be read: {error.strerror}", where=str(path), mend="name a file that exists") from None
    except ValueError as error:
        raise InstanceError(f"is no JSON: {error}", where=str(path), mend="name an instance file") from None
    if not isinstance(raw, dict) or not {"nodes", "edges", "maxFPGAs"} <= raw.keys():
        raise InstanceError("is no instance of a format that is known", where=str(path), mend="it holds nodes, edges, maxFPGAs, maxCPUs and maxSizePerFPGA")
    return _dnn(raw, str(path))


def _number(row: Mapping[str, Any], key: str, where: str, *, least: float = 0.0) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise InstanceError(f"{key} is {value!r}", where=where, mend=f"give a number from {least:g}")
    return float(value)


def _dnn(raw: Mapping[str, Any], path: str) -> Problem:
    """Nodes with a time on an accelerator and on a host's processor, values with a time to move them: Tarnawski et al., NeurIPS 2020.

    Values move through the host: a byte of the problem is a second of the file, and only accelerators wait for it. An accelerator that does not
    support a node takes infinitely long. Nodes of a colour stay together.
    """
    nodes, edges = raw["nodes"], raw["edges"]
    many = {key: int(_number(raw, key, path)) for key in ("maxFPGAs", "maxCPUs")}
    room, place = _number(raw, "maxSizePerFPGA", path), dict[Any, int]()
    if not isinstance(nodes, list) or not isinstance(edges, list) or not all(isinstance(x, dict) for x in (*nodes, *edges)):
        raise InstanceError("nodes and edges are lists of objects", where=path, mend="see the format")
    if not sum(many.values()) or not nodes:
        raise InstanceError("there is nothing to place, or nothing to place it on", where=path, mend="give nodes, and a device at least")
    for i, node in enumerate(nodes):
        if node.get("id") in place or "id" not in node:
            raise InstanceError(f"id {node.get('id')!r} is given twice or missing", where=f"{path}: nodes[{i}]", mend="give each node an id of its own")
        place[node["id"]] = i
    seconds, size, colours, backward = np.zeros((len(nodes), 2)), np.zeros(len(nodes)), dict[Any, list[int]](), set[int]()
    for i, node in enumerate(nodes):
        where = f"{path}: nodes[{i}] (id {node['id']!r})"
        able = bool(node.get("supportedOnFpga", True))
        seconds[i] = (_number(node, "fpgaLatency", where) if able else np.inf), _number(node, "cpuLatency", where)
        size[i] = _number(node, "size", where)
        if node.get("colorClass") is not None:
            colours.setdefault(node["colorClass"], []).append(i)
        if node.get("isBackwardNode"):
            backward.add(i)
    readers: dict[tuple[int, float], list[int]] = {}
    for i, edge in enumerate(edges):
        where = f"{path}: edges[{i}]"
        for key in ("sourceId", "destId"):
            if edge.get(key) not in place:
                raise InstanceError(f"{key} {edge.get(key)!r} is no node", where=where, mend="name the id of a node")
        readers.setdefault((place[edge["sourceId"]], _number(edge, "cost", where)), []).append(place[edge["destId"]])
    order = _topological(len(nodes), readers, [str(n["id"]) for n in nodes], path)
    new = {old: i for i, old in enumerate(order)}
    flows = [Flow(value=(i, None), src=new[s], dst=tuple(sorted({new[d] for d in dst} - {new[s]})), nbytes=cost, times=1, kind="forward") for i, ((s, cost), dst) in enumerate(readers.items())]
    names = [str(nodes[old].get("name") or nodes[old]["id"]) for old in order]
    residents = [Resident(name=names[i], kind="weights", value=(len(nodes) + i, None), blocks=(i,), nbytes=float(size[old])) for i, old in enumerate(order) if size[old] > 0]
    meshes = ["accelerator"] * many["maxFPGAs"] + ["host"] * many["maxCPUs"]
    m, columns = len(meshes), [0] * many["maxFPGAs"] + [1] * many["maxCPUs"]
    return Problem(
        names=_unique(names), phase=(Phase.NONE,) * len(nodes), region=("top",) * len(nodes), meshes=tuple(f"{kind}.{i}" for i, kind in enumerate(meshes)), kinds=tuple(meshes),
        seconds=seconds[order][:, columns], times=np.ones(len(nodes), np.int64), flows=tuple(sorted((f for f in flows if f.dst), key=lambda f: (f.src, f.value))), residents=tuple(residents),
        resident=np.array([[r.nbytes] * m for r in residents]).reshape(len(residents), m), activation=np.zeros((len(nodes), m)),
        capacity=np.where(np.array(columns) == 0, room, np.inf), alpha=np.zeros((m, m)), beta=np.full((m, m), np.inf), wire=np.full((m, m), np.inf),
        price=np.zeros(m), power=np.zeros(m), link_price=np.zeros((m, m)), depth=np.ones(m), layer=np.full(len(nodes), -1), workload=Workload(batch=1, trips=0),
        objective="throughput", ports=np.where(np.array(columns) == 0, 1.0, 0.0), together=tuple(tuple(sorted(new[i] for i in group)) for group in colours.values() if len(group) > 1),
        backward=frozenset(new[i] for i in backward),
    )  # fmt: skip


def _topological(n: int, readers: Mapping[tuple[int, float], Sequence[int]], ids: Sequence[str], path: str) -> list[int]:
    import networkx as nx

    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from((s, d) for (s, _), dst in readers.items() for d in dst if s != d)
    try:
        return list(nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible:
        cycle = [ids[a] for a, _ in nx.find_cycle(graph)]
        raise InstanceError(f"the nodes {' -> '.join([*cycle, cycle[0]])} wait for each other", where=path, mend="a graph of ops has no cycle") from None


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return tuple(out)
