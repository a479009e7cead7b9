"""m_etf: again and again the node that can start first, where it can, with memory as a hard limit (Baechi: Jeon et al., SoCC 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from partition.errors import InfeasibleError
from partition.policies._room import Room, arrivals
from partition.problem import Placement, Problem


def m_etf(problem: Problem) -> Placement:
    """Schedule the ready node and mesh of the earliest start until all are placed. O(n x ready x m) time.

    Raises InfeasibleError where a node finds no mesh with room.
    """
    return earliest(problem, {})


def earliest(problem: Problem, favourite: Mapping[int, int]) -> Placement:
    """The schedule of earliest starts; a node goes before others of its start where it is the favourite child of what its mesh ran last."""
    n, many = len(problem), len(problem.meshes)
    waiting, readers = np.zeros(n, np.int64), [set[int]() for _ in range(n)]
    for f in problem.flows:
        if f.kind != "carry":
            readers[f.src].update(f.dst)
    for v in range(n):
        for d in readers[v]:
            waiting[d] += 1
    weight = problem.seconds * problem.times[:, None]
    free, end, mesh, room = np.zeros(many), np.zeros(n), np.full(n, -1, np.int64), Room(problem)
    last, ready, starts = [-1] * many, {v for v in range(n) if not waiting[v]}, dict[int, np.ndarray]()
    while ready:
        best: tuple[float, bool, int, int] | None = None
        for v in sorted(ready):
            if v not in starts:
                starts[v] = arrivals(problem, v, mesh, end)
            for m in room.meshes(v):
                begin = max(float(starts[v][m]), float(free[m]))
                key = (begin, favourite.get(last[m]) != v, v, m)
                if np.isfinite(begin + weight[v, m]) and (best is None or key < best) and room.fits(v, m):
                    best = key
        if best is None:
            v = min(ready)
            raise InfeasibleError(f"node {v} finds no mesh with room", where=problem.names[v], mend="use a larger cluster")
        begin, _, v, m = best
        ready.discard(v)
        mesh[v], end[v], free[m], last[m] = m, begin + weight[v, m], begin + weight[v, m], v
        room.take(v, m)
        for d in readers[v]:
            waiting[d] -= 1
            if not waiting[d]:
                ready.add(d)
    return problem.placement(mesh)

