"""What no policy could place: a problem whose numbers, order, pins or sizes contradict themselves, said before any policy runs."""

from __future__ import annotations

import numpy as np

from partition.chain import reduced
from partition.errors import InfeasibleError, NameUnknownError, PlacementError
from partition.problem import OBJECTIVES, Problem
from partition.units import size


def hold_sound(problem: Problem) -> None:
    """Raises PlacementError for numbers below 0 or NaN, for nodes that wait for each other and for pins that contradict each other, InfeasibleError
    for nodes that fit on no mesh. O(n m + edges)."""
    _numbers(problem)
    _order(problem)
    _pins(problem)
    _rooms(problem)


def _numbers(problem: Problem) -> None:
    n, m = len(problem), len(problem.meshes)
    for name in (problem.objective, *problem.limits):
        if name not in OBJECTIVES:
            raise NameUnknownError.among("objective", name, OBJECTIVES, where="problem")
    for name, limit in problem.limits.items():
        if not isinstance(limit, int | float) or not limit > 0:
            raise PlacementError(f"{name} cannot be held to {limit!r}", where="problem.limits", mend="give a number above 0")
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
    for group in problem.together:
        pinned: dict[int, int] = {}
        for n in group:
            if n in problem.pins:
                pinned.setdefault(problem.pins[n], n)
        if len(pinned) > 1:
            (one, a), (other, b) = list(pinned.items())[:2]
            raise PlacementError(f"{problem.names[a]} is pinned to {problem.meshes[one]} and {problem.names[b]} to {problem.meshes[other]}, and they must share a mesh",
                                 where="problem.pins, problem.together", mend="take one of the pins away")  # fmt: skip


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
                                  mend="use larger meshes, a smaller batch or a shorter context, or cut the program finer")  # fmt: skip
