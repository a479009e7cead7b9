"""m_topo: meshes filled one after the other, in the program's order, each to its share of the bytes (Baechi: Jeon et al., SoCC 2020)."""

from __future__ import annotations

import numpy as np

from partition.errors import InfeasibleError
from partition.policies._room import Room
from partition.problem import Placement, Problem


def m_topo(problem: Problem) -> Placement:
    """Fill each mesh up to the mean of all bytes and the largest node, then go on with the next; the last takes what is left.

    O(n m) time. Raises InfeasibleError where a node finds no mesh with room.
    """
    alone = np.array([problem.resident[list(need)].min(axis=1, initial=np.inf).sum() if need else 0.0 for need in problem.needs])
    share = problem.resident.min(axis=1, initial=np.inf).sum() / len(problem.meshes) + alone.max(initial=0.0)
    room, mesh, at = Room(problem), np.zeros(len(problem), np.int64), 0
    for n in range(len(problem)):
        while n not in room.fixed and at < len(problem.meshes) - 1 and (room.held[at] + room.added(n, at) > share or not room.fits(n, at)):
            at += 1
        mesh[n] = room.fixed.get(n, at)
        if not room.fits(n, int(mesh[n])):
            raise InfeasibleError(f"node {n} finds no mesh with room", where=problem.names[n], mend="use a larger cluster")
        room.take(n, int(mesh[n]))
    return problem.placement(mesh)
