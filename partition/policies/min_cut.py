"""min_cut: nodes shared out between two meshes so that work and transfers add up to the least: a cut of a network (Stone, 1977)."""

from __future__ import annotations

import functools
import itertools

import numpy as np

from partition.errors import InfeasibleError, PlacementError
from partition.policies._best import best_of_all
from partition.policies._layers import of_kind
from partition.problem import Placement, Problem


def min_cut(problem: Problem) -> Placement:
    """The least sum of work and transfers over each pair of meshes, one of each kind (or two of the only kind); the best feasible one by the objective.

    Exact for that sum, without memory. One minimum cut for each pair. Raises PlacementError for one mesh, InfeasibleError where no cut fits.
    """
    firsts = [ms[0] for ms in of_kind(problem).values()]
    pairs = list(itertools.combinations(firsts, 2)) or [(0, 1)]
    if len(problem.meshes) < 2:
        raise PlacementError("min_cut needs two meshes, the cluster has one", where="policy min_cut", mend="use the policy 'single'")
    none = InfeasibleError("no cut fits", where="policy min_cut", mend="use the policy 'order_dp'")
    return best_of_all(problem, (functools.partial(_cut, problem, a, b) for a, b in pairs), none)


def _cut(problem: Problem, a: int, b: int) -> list[int]:
    import networkx as nx

    network: nx.DiGraph[object] = nx.DiGraph()
    weight = problem.seconds * problem.times[:, None]
    of = {n: group[0] for group in problem.together for n in group}
    for n in range(len(problem)):
        for mesh, ends in ((b, ("a", of.get(n, n))), (a, (of.get(n, n), "b"))):  # a node on b's side is cut from a, and pays for b
            cost = np.inf if problem.pins.get(n, mesh) != mesh else float(weight[n, mesh])
            old = network.edges[ends]["capacity"] if network.has_edge(*ends) else 0.0
            network.add_edge(*ends, capacity=old + cost)
    joined = problem.beta[a, b] > 0
    for i, f in enumerate(problem.flows):
        moved = f.nbytes * f.times
        pay = moved * max(problem.ports[a], problem.ports[b]) if problem.ports is not None else (problem.alpha[a, b] * f.times + moved / problem.beta[a, b] if joined else np.inf)
        hub = ("value", i)
        for u, v in ((of.get(f.src, f.src), hub), (hub, of.get(f.src, f.src))):
            network.add_edge(u, v, capacity=float(pay))
        for d in f.dst:
            network.add_edge(hub, of.get(d, d), capacity=float("inf"))
            network.add_edge(of.get(d, d), hub, capacity=float("inf"))
    for _, _, held in list(network.edges(data=True)):
        if not np.isfinite(held["capacity"]):
            held.pop("capacity")
    try:
        _, (left, _) = nx.minimum_cut(network, "a", "b")
    except nx.NetworkXUnbounded:
        raise InfeasibleError("pins and links leave no cut", where=f"{problem.meshes[a]}, {problem.meshes[b]}", mend="join the two meshes") from None
    return [a if of.get(n, n) in left else b for n in range(len(problem))]
