"""single: everything on one kind of machine, on as many of its meshes as the memory asks for; the kind that serves the objective best."""

from __future__ import annotations

from partition.errors import InfeasibleError
from partition.evaluation import evaluate, scored, verify
from partition.policies._layers import of_kind, together
from partition.problem import Placement, Problem


def single(problem: Problem, *, kind: str | None = None) -> Placement:
    """Place both phases on one kind of device (`kind`, or the best of those that hold the model).

    O(n m log) time.
    Raises InfeasibleError when no kind holds the model, with what the last one lacks.
    """
    best: tuple[float, Placement] | None = None
    lacking: InfeasibleError | None = None
    for name, meshes in sorted(of_kind(problem).items()):
        if kind is not None and name != kind:
            continue
        try:
            placement = verify(problem, problem.placement(together(problem, meshes)))
        except InfeasibleError as error:
            lacking = error
            continue
        score = scored(problem, evaluate(problem, placement))
        if best is None or score < best[0]:
            best = (score, placement)
    if best is None:
        raise lacking or InfeasibleError(f"the cluster has no {kind}", where="policy single", mend=f"kinds: {', '.join(sorted(of_kind(problem)))}")
    return best[1]
