"""heft: Heterogeneous Earliest Finish Time (Topcuoglu, Hariri, Wu, 2002), with memory as a hard limit."""

from __future__ import annotations

import numpy as np

from partition.errors import InfeasibleError
from partition.policies._room import Room, arrivals
from partition.problem import Placement, Problem


def heft(problem: Problem) -> Placement:
    """Place nodes by upward rank, each where it finishes first.

    O(n m + edges) time. A node of the token loop counts all its trips. Raises InfeasibleError where a node finds no mesh with room.
    """
    n = len(problem)
    weight = problem.seconds * problem.times[:, None]
    able = np.isfinite(weight)
    off = ~np.eye(len(problem.meshes), dtype=bool) & (problem.beta > 0)
    alpha, rate = (float(problem.alpha[off].mean()), float((1 / problem.beta[off]).mean())) if off.any() else (0.0, 0.0)
    rate = 2 * float(problem.ports.mean()) if problem.ports is not None else rate
    rank = np.where(able, weight, 0.0).sum(axis=1) / np.maximum(able.sum(axis=1), 1)
    leaving: list[list[int]] = [[] for _ in range(n)]
    for i, f in enumerate(problem.flows):
        if f.kind != "carry":
            leaving[f.src].append(i)
    for v in reversed(range(n)):
        after = [alpha + problem.flows[i].nbytes * rate + max(rank[d] for d in problem.flows[i].dst) for i in leaving[v]]
        rank[v] += max(after, default=0.0)
    free, end, mesh, room = np.zeros(len(problem.meshes)), np.zeros(n), np.zeros(n, np.int64), Room(problem)
    for v in sorted(range(n), key=lambda v: (-rank[v], v)):
        best: tuple[float, int] | None = None
        ready = arrivals(problem, v, mesh, end)
        for m in room.meshes(v):
            if not room.fits(v, m):
                continue
            finish = max(float(ready[m]), free[m]) + float(weight[v, m])
            if np.isfinite(finish) and (best is None or finish < best[0]):
                best = (finish, m)
        if best is None:
            raise InfeasibleError(f"node {v} finds no mesh with room", where=problem.names[v], mend="use a larger cluster")
        end[v], mesh[v] = best
        free[best[1]] = best[0]
        room.take(v, best[1])
    return problem.placement(mesh)
