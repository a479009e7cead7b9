"""random: every node on a mesh drawn by chance among those with room; what a policy must beat, and what a cut must survive."""

from __future__ import annotations

import numpy as np

from partition.errors import InfeasibleError
from partition.policies._room import Room
from partition.problem import Placement, Problem


def random(problem: Problem, *, seed: int = 0) -> Placement:
    """Draw a feasible placement by chance; the same seed gives the same one.

    O(n m) time. Raises InfeasibleError where a node finds no room."""
    rng = np.random.default_rng(seed)
    room, seen = Room(problem), []
    for n in range(len(problem)):
        allowed = room.meshes(n)
        order = [m for m in rng.permutation(len(problem.meshes)).tolist() if m in allowed] if n not in problem.pins else allowed
        seen.append(next((m for m in order if room.fits(n, m)), -1))
        if seen[-1] < 0:
            raise InfeasibleError(f"node {n} finds no mesh with room", where=problem.names[n], mend="use a larger cluster or another seed")
        room.take(n, seen[-1])
    return problem.placement(seen)
