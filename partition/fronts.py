"""What can be had together: placements of one problem of which none is better than another in all of two or three objectives."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from partition.arguments import checked
from partition.errors import InfeasibleError, NameUnknownError, PlacementError
from partition.evaluation import Estimate, broken, evaluate, verify
from partition.pipeline import place
from partition.policies import Policy
from partition.policies.order_dp import compromised
from partition.problem import OBJECTIVES, Placement, Problem


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A placement on the front and what it gives."""

    placement: Placement
    estimate: Estimate


@checked
def front(
    problem: Problem, objectives: Sequence[str], *, policy: str | Policy = "portfolio", points: int = 6, progress: Callable[[str], None] | None = None,
) -> tuple[Point, ...]:  # fmt: skip
    """The Pareto front of two or three objectives, by the first: each alone, then the first under `points` limits on each of the others between their
    best and what the first's best has. A policy finds the placements, so the front is as good as it; through a host, `order_dp`'s stages between
    the shortest longest and the least sum are added. Raises PlacementError, NameUnknownError."""
    if not 2 <= len(set(objectives)) == len(objectives) <= 3:
        raise PlacementError(f"a front is of two or three objectives, not of {', '.join(map(str, objectives))}", where="front", mend=f"name two of {', '.join(OBJECTIVES)}")
    if wrong := [o for o in objectives if o not in OBJECTIVES]:
        raise NameUnknownError.among("objective", str(wrong[0]), OBJECTIVES)
    found: list[Point] = []

    def run(of: Problem, what: str) -> Point | None:
        if progress is not None:
            progress(what)
        try:
            placement = place(of, policy)
        except InfeasibleError:
            return None
        found.append(Point(placement=dataclasses.replace(placement, problem=problem), estimate=evaluate(problem, placement)))
        return found[-1]

    alone = [run(dataclasses.replace(problem, objective=o), f"best {o}") for o in objectives]
    first = alone[0]
    if first is None:
        raise InfeasibleError("no placement keeps the problem's limits", where=f"limits on {', '.join(problem.limits) or 'nothing'}", mend="relax them")
    for o, best in zip(objectives[1:], alone[1:], strict=True):
        if best is None:
            continue
        low, high = getattr(best.estimate, o), getattr(first.estimate, o)
        for limit in np.geomspace(low, high, points + 2)[1:-1] if low > 0 and high > 0 and low != high else ():
            run(dataclasses.replace(problem, objective=objectives[0], limits={**problem.limits, o: float(limit)}), f"best {objectives[0]} with {o} held to {limit:.4g}")
    if problem.ports is not None:  # stages of which none is better in the longest and in the sum
        for placement in compromised(problem):
            with contextlib.suppress(InfeasibleError):
                found.append(Point(placement=verify(problem, placement), estimate=evaluate(problem, placement)))
    kept = [p for p in found if not broken(problem, p.estimate) and not any(_beats(q.estimate, p.estimate, objectives) for q in found)]
    unique = {tuple(p.estimate.score(o) for o in objectives): p for p in reversed(kept)}
    return tuple(unique[key] for key in sorted(unique))


def _beats(a: Estimate, b: Estimate, objectives: Sequence[str]) -> bool:
    ours, theirs = [a.score(o) for o in objectives], [b.score(o) for o in objectives]
    return all(x <= y for x, y in zip(ours, theirs, strict=True)) and ours != theirs
