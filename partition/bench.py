"""compare(): policies on problems, side by side: time to place, score, gap, or why not; and how often each comes near the best."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from partition import outputs
from partition.arguments import checked
from partition.bounds import lower_bound
from partition.errors import PartitionError
from partition.evaluation import Estimate, evaluate
from partition.parallel import each
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
    where: str = ""
    mend: str = ""


Tried = tuple[float, Placement | PartitionError]
"""Seconds that a policy took, and what it placed or why it did not."""


@checked
def compare(
    problems: Mapping[str, Problem] | Problem, policies: Iterable[str | Policy] | str | Policy, *, seconds: float | None = None, jobs: int = 1, progress: Callable[[str], None] | None = None,
) -> list[Result]:  # fmt: skip
    """Run every policy on every problem; what fails or does not fit is a result with its reason. Best score first, by problem.

    seconds: how long a policy may take; then counts the best that it has evaluated. jobs: processes that run at once (-1: one for each core), through
    joblib, so also on what `joblib.parallel_config` names; results are the same, but for the seconds. progress is told what runs.
    """
    named = {"problem": problems} if isinstance(problems, Problem) else problems
    policies = [policies] if isinstance(policies, str) or callable(policies) else policies
    chosen = [(p if isinstance(p, str) else getattr(p, "__name__", "policy"), policy(p)) for p in policies]
    pairs = [(title, problem, name, how) for title, problem in named.items() for name, how in chosen]
    ahead: Iterator[Tried] = each(_tried, [(problem if jobs == 1 else _bare(problem), how, seconds) for _, problem, _, how in pairs], jobs)
    by_problem: dict[str, list[tuple[str, Tried]]] = {title: [] for title in named}
    for title, _, name, _ in pairs:
        if progress is not None:
            progress(f"{title}: {name}")
        by_problem[title].append((name, next(ahead)))
    results = []
    for title, problem in named.items():
        bound, mine = lower_bound(problem), list[Result]()
        for name, (took, found) in by_problem[title]:
            if isinstance(found, PartitionError):
                mine.append(Result(problem=title, policy=name, seconds=took, estimate=None, why_not=found.what, where=found.where, mend=found.mend))
                continue
            placement = dataclasses.replace(found, problem=problem)
            estimate, bound = evaluate(problem, placement), bound.stronger(placement)
            mine.append(Result(problem=title, policy=name, seconds=took, estimate=estimate, placement=placement, score=estimate.score(problem.objective)))
        mine = [r if r.estimate is None else dataclasses.replace(r, gap=bound.gap(r.score), proof=bound.proof) for r in mine]
        results += sorted(mine, key=lambda r: (r.estimate is None, r.score, r.policy))
    return results


def _bare(problem: Problem) -> Problem:
    """The problem without the program that it came from, which no policy needs and no process should be sent."""
    return dataclasses.replace(problem, phases=None, op_works={}, layouts=())


def _tried(problem: Problem, how: Policy, seconds: float | None) -> Tried:
    start = time.perf_counter()
    try:
        placement = place(problem, how, seconds=seconds)
    except PartitionError as error:
        return time.perf_counter() - start, error
    return time.perf_counter() - start, dataclasses.replace(placement, problem=None)


def drawn(results: Sequence[Result], path: str | Path) -> Path:
    """Draw for each policy on which share of the problems it comes within a factor of the best. Raises OutputError."""
    import matplotlib.pyplot as plt

    factors = np.geomspace(1.0, 4.0, 400)
    figure, axes = plt.subplots(figsize=(6.5, 4.0), layout="constrained")
    for i, (name, shares) in enumerate(sorted(profile(results, tuple(factors)).items(), key=lambda item: -sum(item[1]))):
        axes.step(factors, shares, where="post", label=name, color=plt.get_cmap("tab20")(i % 20), linestyle=("-", "--", ":")[i % 3])
    axes.set(xscale="log", xlim=(1.0, 4.0), ylim=(0.0, 1.02), xlabel="score / the best score of all", ylabel="share of the problems")
    axes.set_xticks([1, 1.2, 1.5, 2, 3, 4], ["1", "1.2", "1.5", "2", "3", "4"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return outputs.drawn(figure, path)


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
