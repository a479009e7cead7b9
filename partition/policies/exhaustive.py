"""exhaustive: the oracle for small problems. Every placement is evaluated; ties go to the first in lexicographic order."""

from __future__ import annotations

import itertools

from partition.errors import InfeasibleError, PlacementError
from partition.evaluation import evaluate, scored, verify
from partition.phases import Phase
from partition.problem import Placement, Problem

LIMIT = 100_000


def exhaustive(problem: Problem) -> Placement:
    """The best of all placements for the problem's objective.

    O(m^n): raises PlacementError above 100,000 placements. Nodes that both phases need follow their readers. Raises InfeasibleError where nothing fits.
    """
    free = [n for n in range(len(problem)) if problem.phase[n] is not Phase.BOTH and n not in problem.pins]
    count = len(problem.meshes) ** len(free)
    if count > LIMIT:
        raise PlacementError(f"{len(problem.meshes)}^{len(free)} placements are too many to try", where="policy exhaustive",
                             mend=f"it is for small problems (at most {LIMIT:,} placements): pin nodes, or use another policy")  # fmt: skip
    best: tuple[float, Placement] | None = None
    for choice in itertools.product(range(len(problem.meshes)), repeat=len(free)):
        mesh = [0] * len(problem)
        for n, m in zip(free, choice, strict=True):
            mesh[n] = m
        try:
            placement = verify(problem, problem.placement(mesh))
        except InfeasibleError:
            continue
        score = scored(problem, evaluate(problem, placement))
        if best is None or score < best[0]:
            best = (score, placement)
    if best is None:
        raise InfeasibleError("no placement fits", where=f"all {count:,} of them", mend="use a larger cluster or a smaller model")
    return best[1]
