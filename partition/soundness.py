"""What no policy could place: a problem whose numbers, order, pins or sizes contradict themselves, said before any policy runs."""

from __future__ import annotations

import dataclasses

import numpy as np

from partition.chain import reduced
from partition.errors import InfeasibleError, NameUnknownError, PlacementError
from partition.problem import OBJECTIVES, Problem, hold_limits
from partition.units import size

_MANY = 200
"""Pins of a set that are tried to be left out."""


def hold_sound(problem: Problem) -> None:
    """Raises PlacementError for numbers below 0 or NaN, for nodes that wait for each other and for pins that contradict each other, InfeasibleError
    for nodes that fit on no mesh. O(n m + edges)."""
    _numbers(problem)
    _order(problem)
    _pins(problem)
    _rooms(problem)


def _numbers(problem: Problem) -> None:
    n, m = len(problem), len(problem.meshes)
    if problem.objective not in OBJECTIVES:
        raise NameUnknownError.among("objective", problem.objective, OBJECTIVES, where="problem")
    hold_limits(problem.limits, where="problem.limits")
    shapes = {"seconds": (n, m), "times": (n,), "activation": (n, m), "resident": (len(problem.residents), m), "capacity": (m,), "alpha": (m, m), "beta": (m, m),
              "wire": (m, m), "price": (m,), "power": (m,), "link_price": (m, m), "depth": (m,), "layer": (n,)}  # fmt: skip
    for name, shape in shapes.items():
        array = getattr(problem, name)
        if array.shape != shape:
            raise PlacementError(f"{name} has the shape {array.shape}, {n} nodes on {m} meshes ask for {shape}", where="problem", mend="give a number for each")
        if name == "layer":
            continue
        numbers = array.astype(float)
        wrong = np.argwhere(np.isnan(numbers) | (numbers < (1 if name == "depth" else 0)))
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            node = f", node {problem.names[at[0]]!r}" if name in ("seconds", "times", "activation") else ""
            raise PlacementError(f"{name}{list(at)} is {numbers[at]}", where=f"problem{node}", mend="times, sizes and prices are numbers from 0 (depth from 1)")
    for i, f in enumerate(problem.flows):
        if not f.nbytes >= 0 or f.times < 0 or not 0 <= f.src < n or any(not 0 <= d < n for d in f.dst):
            raise PlacementError(f"flow {i} moves {f.nbytes} B {f.times} times, from node {f.src} to {f.dst}", where="problem.flows", mend=f"sizes are from 0, nodes from 0 to {n - 1}")


def _order(problem: Problem) -> None:
    import networkx as nx

    ahead = [(f.src, d) for f in problem.flows if f.kind != "carry" for d in f.dst if d <= f.src]
    if not ahead:  # in the order of their numbers, none waits for a later one
        return
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_edges_from((f.src, d) for f in problem.flows if f.kind != "carry" for d in f.dst)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [problem.names[a] for a, _ in nx.find_cycle(graph)]
        raise PlacementError(f"nodes wait for each other: {' -> '.join([*cycle, cycle[0]])}", where="problem.flows", mend="what goes back to an earlier node is a carry")
    src, dst = ahead[0]
    raise PlacementError(f"{problem.names[dst]} stands before {problem.names[src]}, which it reads", where="problem.flows", mend="number the nodes in a topological order")


def _pins(problem: Problem) -> None:
    for n, m in problem.pins.items():
        if not 0 <= n < len(problem) or not 0 <= m < len(problem.meshes):
            raise PlacementError(f"node {n} is pinned to mesh {m}", where="problem.pins", mend=f"nodes run from 0 to {len(problem) - 1}, meshes to {len(problem.meshes) - 1}")
        if not np.isfinite(problem.seconds[n, m]):
            raise PlacementError(f"{problem.names[n]} is pinned to {problem.meshes[m]}, which cannot run it", where="problem.pins", mend="pin it elsewhere")
    if found := conflict(problem):
        pins, why = _fewest(problem, *found)
        told = [f"{problem.names[n]} to {problem.meshes[problem.pins[n]]}" for n in pins[:6]]
        raise PlacementError(f"pins contradict each other: {', '.join(told)}{f' and {len(pins) - 6} more' if len(pins) > 6 else ''}; {why}", where="problem.pins", mend="take one of them away")


def conflict(problem: Problem) -> tuple[tuple[int, ...], str] | None:
    """Pins that contradict each other, as few as show it, and why: nodes that must share a mesh, no link for what passes, memory, the order of stages."""
    pins = problem.pins
    for group in problem.together:
        held = [n for n in group if n in pins]
        if other := [n for n in held if pins[n] != pins[held[0]]]:
            return (held[0], other[0]), "they must share a mesh"
    for f in problem.flows:
        for d in f.dst:
            if f.src in pins and d in pins and not problem.beta[pins[f.src], pins[d]] > 0:
                return (f.src, d), "no link joins the two"
    return _crowded(problem) or (_circle(problem) if problem.contiguous else None)


def _fewest(problem: Problem, pins: tuple[int, ...], why: str) -> tuple[tuple[int, ...], str]:
    """Of pins that contradict each other, those without any one of which they would not."""
    for n in pins[: _MANY if len(pins) > 2 else 0]:
        fewer = dataclasses.replace(problem, pins={k: problem.pins[k] for k in pins if k != n})
        if (found := conflict(fewer)) is not None:
            return _fewest(problem, *found)
    return pins, why


def _crowded(problem: Problem) -> tuple[tuple[int, ...], str] | None:
    """Pins that ask more of a mesh than it holds: the largest nodes first, as many as it takes."""
    for m in sorted(set(problem.pins.values())):
        alone = {n: float(problem.resident[list(problem.needs[n]), m].sum() + problem.activation[n, m]) for n, at in problem.pins.items() if at == m}
        taken: list[int] = []
        for n in sorted(alone, key=lambda n: (-alone[n], n)):
            taken.append(n)
            rows = sorted({r for n in taken for r in problem.needs[n]})
            if (needed := float(problem.resident[rows, m].sum() + problem.activation[taken, m].max())) > problem.capacity[m]:
                return tuple(sorted(taken)), f"they need {size(needed)}, {size(needed - float(problem.capacity[m]))} more than {problem.meshes[m]} holds"
    return None


def _circle(problem: Problem) -> tuple[tuple[int, ...], str] | None:
    """Pins by which meshes would stand before each other."""
    import networkx as nx

    order: nx.DiGraph[int] = nx.DiGraph(problem.precedes)
    edges: dict[tuple[int, int], tuple[int, int]] = {}
    for a in sorted(n for n in problem.pins if n in order):
        for b in sorted(nx.descendants(order, a) & problem.pins.keys()):
            if problem.pins[a] != problem.pins[b]:
                edges.setdefault((problem.pins[a], problem.pins[b]), (a, b))
    stages: nx.DiGraph[int] = nx.DiGraph(list(edges))
    ways = [nx.shortest_path(stages, b, a) for a, b in edges if nx.has_path(stages, b, a)]
    if not ways:
        return None
    cycle = min(ways, key=len)  # from b back to a, which stands before b
    pins = {n for pair in zip(cycle, [*cycle[1:], cycle[0]], strict=True) for n in edges[pair]}
    return tuple(sorted(pins)), "meshes would stand before each other in the order"


def _rooms(problem: Problem) -> None:
    if problem.rates is not None:
        return
    for group in reduced(problem, ordered=False).groups:
        rows = sorted({r for n in group for r in problem.needs[n]})
        needed = problem.resident[rows].sum(axis=0) + problem.activation[list(group)].max(axis=0)
        allowed = [problem.pins[n] for n in group if n in problem.pins] or range(len(problem.meshes))
        able = [m for m in allowed if np.isfinite(problem.seconds[list(group), m]).all()]
        name = problem.names[group[0]] + (f" and {len(group) - 1} more that must share its mesh" if len(group) > 1 else "")
        if not able:
            raise InfeasibleError(f"no mesh can run {name}", where=f"node {group[0]}", mend="add a mesh that supports it")
        over = {m: float(needed[m] - problem.capacity[m]) for m in able}
        if all(x > 0 for x in over.values()):
            m = min(over, key=lambda m: over[m])
            raise InfeasibleError(f"{name} needs {size(float(needed[m]))}, {size(over[m])} more than {problem.meshes[m]} holds, and no mesh lacks less", where=f"node {group[0]}",
                                  mend="use larger meshes, a smaller batch or a shorter context, or cut the program finer" + (", or keep less whole" if len(group) > 1 else ""))  # fmt: skip
