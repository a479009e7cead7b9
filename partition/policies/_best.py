"""What `single`, `min_cut` and `exhaustive` share: the best of some placements that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from partition.errors import InfeasibleError
from partition.evaluation import evaluate, scored, verify
from partition.problem import Placement, Problem


def best_of_all(problem: Problem, made: Iterable[Callable[[], Sequence[int] | np.ndarray]], none: InfeasibleError) -> Placement:
    """The best by the problem's objective, the first of several. made: give meshes of all nodes, or raise InfeasibleError; of those the last is raised
    where nothing fits, `none` where nothing was made."""
    best: tuple[float, Placement] | None = None
    for make in made:
        try:
            placement = verify(problem, problem.placement(make()))
        except InfeasibleError as error:
            none = error
            continue
        score = scored(problem, evaluate(problem, placement))
        if best is None or score < best[0]:
            best = (score, placement)
    if best is None:
        raise none
    return best[1]
