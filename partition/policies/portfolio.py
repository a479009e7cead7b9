"""portfolio: the quick policies, what a search makes of the best of them, and the proof where one is in reach."""

from __future__ import annotations

import dataclasses

from partition.errors import PartitionError
from partition.evaluation import evaluate, scored
from partition.policies.cover import cover
from partition.policies.ideal_dp import ideal_dp
from partition.policies.local_search import local_search, seeded
from partition.problem import Placement, Problem


def portfolio(problem: Problem, *, seed: int = 0) -> Placement:
    """The best of `order_dp`, `heft`, `phase_split` and `single`, improved by `local_search`; and of `ideal_dp` where stages must be in an order. `cover` where
    machines have rates.

    Time and errors are those of its members. The same seed gives the same placement.
    """
    if problem.rates is not None:
        return cover(problem, seed=seed)
    best = local_search(problem, start=seeded(problem), seed=seed)
    if problem.ports is not None and problem.contiguous:
        try:
            exact = ideal_dp(problem)
        except PartitionError:
            return best
        better = scored(problem, evaluate(problem, exact)) <= scored(problem, evaluate(problem, best))
        best = exact if better else dataclasses.replace(best, bound=exact.bound)
    return best
