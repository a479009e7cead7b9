"""single: everything on one kind of machine, on as many of its meshes as the memory asks for; the kind that serves the objective best."""

from __future__ import annotations

import functools

from partition.errors import InfeasibleError
from partition.policies._best import best_of_all
from partition.policies._layers import of_kind, together
from partition.problem import Placement, Problem


def single(problem: Problem, *, kind: str | None = None) -> Placement:
    """Place both phases on one kind of device (`kind`, or the best of those that hold the model).

    O(n m log) time.
    Raises InfeasibleError when no kind holds the model, with what the last one lacks.
    """
    kinds = [meshes for name, meshes in sorted(of_kind(problem).items()) if kind is None or name == kind]
    lacking = InfeasibleError(f"the cluster has no {kind}", where="policy single", mend=f"kinds: {', '.join(sorted(of_kind(problem)))}")
    return best_of_all(problem, (functools.partial(together, problem, meshes) for meshes in kinds), lacking)
