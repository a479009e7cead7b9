"""exhaustive: the oracle for small problems. Every placement is evaluated; ties go to the first in lexicographic order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from partition.errors import InfeasibleError, PlacementError
from partition.phases import Phase
from partition.policies._best import best_of_all
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

    def choices() -> Iterator[Callable[[], Sequence[int]]]:
        for choice in itertools.product(range(len(problem.meshes)), repeat=len(free)):
            mesh = np.zeros(len(problem), np.int64)
            mesh[free] = choice
            yield mesh.tolist

    none = InfeasibleError("no placement fits", where=f"all {count:,} of them", mend="use a larger cluster or a smaller model")
    try:
        return best_of_all(problem, choices(), none)
    except InfeasibleError:
        raise none from None
