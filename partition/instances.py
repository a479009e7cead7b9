"""Problems from files: published instances of other planners, in the formats that their authors gave them.

`read(path)` knows a file by what is in it. Nothing is guessed: what a format does not have (phases, token loops) the problem does not have.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from partition import records
from partition.arguments import checked
from partition.errors import InstanceError
from partition.plain import plain
from partition.problem import Problem


@checked
def read(path: str | Path) -> Problem:
    """A problem from a file of our own (or a plan.json, or its folder), a JSON file of the msr-fiddle/dnn-partitioning repository, or a .lp model of Helix. Raises InstanceError with file and entry."""
    path = Path(path)
    path = path / "plan.json" if path.is_dir() else path
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InstanceError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path), mend="name a file that exists") from None
    if path.suffix == ".lp":
        return _helix(text, str(path))
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InstanceError(f"is no JSON: {error}", where=str(path), mend="name an instance file") from None
    if isinstance(raw, dict) and "format" in raw:
        return records.read(raw, str(path))
    if not isinstance(raw, dict) or not {"nodes", "edges", "maxFPGAs"} <= raw.keys():
        raise InstanceError("is no instance of a format that is known", where=str(path), mend="it is a problem or plan of this package, or holds nodes, edges, maxFPGAs, maxCPUs and maxSizePerFPGA")
    return _dnn(raw, str(path))


def _number(row: Mapping[str, Any], key: str, where: str, *, least: float = 0.0) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not math.isfinite(value) or value < least:
        raise InstanceError(f"{key} is {value!r}", where=where, mend=f"give a number from {least:g}")
    return float(value)


def _dnn(raw: Mapping[str, Any], path: str) -> Problem:
    """Nodes with a time on an accelerator and on a host's processor, values with a time to move them: Tarnawski et al., NeurIPS 2020.

    Values move through the host: a byte of the problem is a second of the file, and only accelerators wait for it. An accelerator that does not
    support a node takes infinitely long. Nodes of a colour stay together.
    """
    nodes, edges = raw["nodes"], raw["edges"]
    many = {key: int(_number(raw, key, path)) for key in ("maxFPGAs", "maxCPUs")}
    if wrong := [key for key in many if many[key] != raw[key]]:
        raise InstanceError(f"{wrong[0]} is {raw[wrong[0]]!r}", where=path, mend="give a whole number")
    room, place = _number(raw, "maxSizePerFPGA", path), dict[Any, int]()
    if not isinstance(nodes, list) or not isinstance(edges, list) or not all(isinstance(x, dict) for x in (*nodes, *edges)):
        raise InstanceError("nodes and edges are lists of objects", where=path, mend="see the format")
    if not sum(many.values()) or not nodes:
        raise InstanceError("there is nothing to place, or nothing to place it on", where=path, mend="give nodes, and a device at least")
    for i, node in enumerate(nodes):
        if not isinstance(node.get("id"), str | int) or not isinstance(node.get("colorClass", 0), str | int | None):
            raise InstanceError("an id or a colorClass is neither a number nor a word", where=f"{path}: nodes[{i}]", mend="give each node an id of its own")
        if node["id"] in place:
            raise InstanceError(f"id {node.get('id')!r} is given twice", where=f"{path}: nodes[{i}]", mend="give each node an id of its own")
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
            if not isinstance(edge.get(key), str | int) or edge[key] not in place:
                raise InstanceError(f"{key} {edge.get(key)!r} is no node", where=where, mend="name the id of a node")
        readers.setdefault((place[edge["sourceId"]], _number(edge, "cost", where)), []).append(place[edge["destId"]])
    order = _topological(len(nodes), readers, [str(n["id"]) for n in nodes], path)
    new = {old: i for i, old in enumerate(order)}
    columns = np.array([0] * many["maxFPGAs"] + [1] * many["maxCPUs"])
    return plain(
        [str(nodes[old].get("name") or nodes[old]["id"]) for old in order], [("accelerator", "host")[k] for k in columns], seconds[order][:, columns],
        [(new[s], [new[d] for d in dst], cost) for (s, cost), dst in readers.items()], size[order], np.where(columns == 0, room, np.inf), ports=np.where(columns == 0, 1.0, 0.0),
        together=tuple(tuple(sorted(new[i] for i in group)) for group in colours.values() if len(group) > 1), backward=frozenset(new[i] for i in backward),
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


def _helix(text: str, path: str) -> Problem:
    """Machines that hold layers in a row, several each layer, and how many tokens pass: the MILP of Mei et al., Helix, ASPLOS 2025, as it was written out.

    A machine's rates stand in its node_throughput_constraint, a link's in its edge_flow_constr, the layers in the end_constraints.
    """
    flat = re.sub(r"\s+", " ", text)
    held: dict[tuple[int, int], float] = {}
    for machine, terms in re.findall(r"node_throughput_constraint_(\d+): (.*?) <= 0", flat):
        held |= {(int(machine), int(h)): float(rate) for rate, h in re.findall(rf"- ([\d.eE+-]+) hold_{machine}_(\d+)(?!\d)", terms)}
    ends = {int(x) for x in re.findall(r"end_constraint_\d+: .*? <= (\d+)", flat)}
    if not held or len(ends) != 1:
        raise InstanceError("is no model of Helix: it lacks node_throughput_constraint or end_constraint", where=path, mend="name an ilp_model.lp of its repository")
    machines, layers = sorted({i for i, _ in held}), ends.pop()
    place = {str(i): n for n, i in enumerate(machines)} | {"source": len(machines), "sink": len(machines) + 1}
    m, most = len(machines), max(h for _, h in held)
    rates, lanes = np.zeros((m, most + 1)), np.zeros((m + 2, m + 2))
    for (i, h), rate in held.items():
        rates[place[str(i)], h] = rate
    for a, b, rate in re.findall(r"edge_flow_constr_(\w+?)_(\w+?): flow_\w+ - ([\d.eE+-]+) switch_\w+ <= 0", flat):
        if a not in place or b not in place:
            raise InstanceError(f"a link joins {a} and {b}, one of which is no machine", where=f"{path}: edge_flow_constr_{a}_{b}", mend="give each machine its throughput")
        lanes[place[a], place[b]] = float(rate)
    with np.errstate(divide="ignore"):
        seconds = 1.0 / rates[:, 1]
    kinds = {row.tobytes(): f"kind{i}" for i, row in enumerate(np.unique(rates, axis=0))}
    return plain([f"layer {n}" for n in range(layers)], [kinds[row.tobytes()] for row in rates], np.repeat(seconds[None, :], layers, axis=0),
                 [(n, [n + 1], 1.0) for n in range(layers - 1)], np.zeros(layers), np.full(m, np.inf), meshes=tuple(f"machine {i}" for i in machines), layer=np.arange(layers),
                 rates=rates, lanes=lanes)  # fmt: skip
