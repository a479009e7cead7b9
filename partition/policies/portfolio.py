"""portfolio: the quick policies, what a search makes of the best of them, and the proof where one is in reach."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from partition.batch import Batch
from partition.errors import PartitionError
from partition.evaluation import evaluate, scored
from partition.phases import Phase
from partition.policies.cover import cover
from partition.policies.ideal_dp import ideal_dp
from partition.policies.local_search import local_search, seeded
from partition.problem import Placement, Problem

_MOST = 3_000_000
"""Placements times nodes up to which all are evaluated."""


def every(problem: Problem) -> Placement | None:
    """The best of all placements, with the proof that it is; None where they are too many, where many at once are not what one by one is, or where none fits."""
    joined = {n for group in problem.together for n in group}
    alone = [(n,) for n in range(len(problem)) if n not in joined]
    units = [u for u in (*problem.together, *alone) if not any(n in problem.pins for n in u) and any(problem.phase[n] is not Phase.BOTH for n in u)]
    many = len(problem.meshes)
    if len(units) * math.log(many) > math.log(_MOST / len(problem)) or (problem.ports is not None and problem.objective in ("ttft", "tpot", "e2e")) or problem.contiguous:
        return None
    mesh = np.zeros((many ** len(units), len(problem)), np.int64)
    for i, unit in enumerate(units):
        mesh[:, list(unit)] = (np.arange(len(mesh)) // many ** (len(units) - 1 - i) % many)[:, None]
    for group in problem.together:
        pinned = [problem.pins[n] for n in group if n in problem.pins]
        mesh[:, list(group)] = pinned[0] if pinned else mesh[:, list(group)]
    scores = Batch(problem).scores(mesh)
    if not scores.min() < 1e14:
        return None
    placement, bound = problem.placement(mesh[int(scores.argmin())]), float(scores.min())
    return dataclasses.replace(placement, bound=(bound - 1e-12 * abs(bound), f"all {len(mesh):,} placements"))


def portfolio(problem: Problem, *, seed: int = 0) -> Placement:
    """The best of all where these are few; else the best of `order_dp`, `heft`, `phase_split` and `single`, improved by `local_search`; and of `ideal_dp` where stages must be in an order. `cover` where
    machines have rates.

    Time and errors are those of its members. The same seed gives the same placement.
    """
    if problem.rates is not None:
        return cover(problem, seed=seed)
    if (proved := every(problem)) is not None:
        return proved
    try:
        best = local_search(problem, start=seeded(problem), seed=seed)
    except PartitionError:
        if problem.ports is None or not problem.contiguous:
            raise
        return ideal_dp(problem)
    if problem.ports is not None and problem.contiguous:
        try:
            exact = ideal_dp(problem)
        except PartitionError:
            return best
        better = scored(problem, evaluate(problem, exact)) <= scored(problem, evaluate(problem, best))
        best = exact if better else dataclasses.replace(best, bound=exact.bound)
    return best
