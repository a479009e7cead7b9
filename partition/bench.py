"""compare(): policies on problems, side by side: time to place, score, gap, or why not; and how often each comes near the best."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from partition.bounds import lower_bound
from partition.errors import PartitionError
from partition.evaluation import Estimate, evaluate
from partition.pipeline import place, policy
from partition.policies import Policy
from partition.problem import Placement, Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One policy on one problem. seconds: time to place; score: what was minimised; gap: share of it that the best bound of all policies leaves open."""

    problem: str
    policy: str
    seconds: float
    estimate: Estimate | None
    placement: Placement | None = None
    score: float = float("inf")
    gap: float | None = None
    proof: str = ""
    why_not: str = ""


def compare(
    problems: Mapping[str, Problem] | Problem, policies: Iterable[str | Policy], *, seconds: float | None = None, progress: Callable[[str], None] | None = None,
) -> list[Result]:  # fmt: skip
    """Run every policy on every problem; what fails or does not fit is a result with its reason. Best score first, by problem.

    seconds: how long a policy may take; then counts the best that it has evaluated. progress is told what runs.
    """
    named = {"problem": problems} if isinstance(problems, Problem) else problems
    chosen = [(p if isinstance(p, str) else getattr(p, "__name__", "policy"), policy(p)) for p in policies]
    results = []
    for title, problem in named.items():
        bound, mine = lower_bound(problem), list[Result]()
        for name, how in chosen:
            if progress is not None:
                progress(f"{title}: {name}")
            start = time.perf_counter()
            try:
                placement = place(problem, how, seconds=seconds)
            except PartitionError as error:
                mine.append(Result(problem=title, policy=name, seconds=time.perf_counter() - start, estimate=None, why_not=error.what))
                continue
            took, estimate = time.perf_counter() - start, evaluate(problem, placement)
            bound = bound.stronger(placement)
            mine.append(Result(problem=title, policy=name, seconds=took, estimate=estimate, placement=placement, score=estimate.score(problem.objective)))
        mine = [r if r.estimate is None else dataclasses.replace(r, gap=bound.gap(r.score), proof=bound.proof) for r in mine]
        results += sorted(mine, key=lambda r: (r.estimate is None, r.score, r.policy))
    return results


def profile(results: Sequence[Result], within: Sequence[float] = (1.0, 1.01, 1.05, 1.2, 2.0)) -> dict[str, tuple[float, ...]]:
    """Policy -> on which share of the problems it comes within each factor of the best score of all. Source: performance profiles (Dolan, Moré, 2002)."""
    best: dict[str, float] = {}
    for r in results:
        best[r.problem] = min(best.get(r.problem, np.inf), r.score)
    found: dict[str, tuple[float, ...]] = {}
    for name in sorted({r.policy for r in results}):
        ratios = [1.0 if r.score == best[r.problem] else (best[r.problem] / r.score if r.score < 0 else r.score / best[r.problem] if best[r.problem] > 0 else np.inf)
                  for r in results if r.policy == name]  # fmt: skip
        found[name] = tuple(sum(x <= factor * (1 + 1e-9) for x in ratios) / len(best) for factor in within)
    return found
