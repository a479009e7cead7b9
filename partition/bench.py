"""compare(): policies on problems, side by side: time to place, score, gap, or why not."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping

from partition.bounds import lower_bound
from partition.errors import PartitionError
from partition.evaluation import Estimate, evaluate
from partition.pipeline import place, policy
from partition.policies import Policy
from partition.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One policy on one problem. seconds: time to place; gap: share of the score that the bound leaves open."""

    problem: str
    policy: str
    seconds: float
    estimate: Estimate | None
    gap: float | None
    why_not: str = ""


def compare(problems: Mapping[str, Problem] | Problem, policies: Iterable[str | Policy]) -> list[Result]:
    """Run every policy on every problem; what fails or does not fit is a result with its reason. Best score first, by problem."""
    named = {"problem": problems} if isinstance(problems, Problem) else problems
    chosen = [(p if isinstance(p, str) else getattr(p, "__name__", "policy"), policy(p)) for p in policies]
    results = []
    for title, problem in named.items():
        bound = lower_bound(problem)
        mine = []
        for name, how in chosen:
            start = time.perf_counter()
            try:
                placement = place(problem, how)
            except PartitionError as error:
                mine.append(Result(problem=title, policy=name, seconds=time.perf_counter() - start, estimate=None, gap=None, why_not=error.what))
                continue
            took, estimate = time.perf_counter() - start, evaluate(problem, placement)
            mine.append(Result(problem=title, policy=name, seconds=took, estimate=estimate, gap=bound.gap(estimate.score(problem.objective))))
        results += sorted(mine, key=lambda r: (r.estimate is None, r.estimate.score(problem.objective) if r.estimate else 0.0, r.policy))
    return results
