"""portfolio: the quick policies, what a search makes of the best of them, and the proof where one is in reach."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from partition.batch import Batch
from partition.chain import reduced
from partition.errors import PartitionError
from partition.evaluation import FAR, evaluate, scored
from partition.phases import Phase
from partition.policies.cover import cover
from partition.policies.ideal_dp import ideal_dp
from partition.policies.local_search import local_search, seeded
from partition.problem import Placement, Problem

_MOST = 10_000_000
"""Placements times nodes up to which all are evaluated."""


def best_of_every(problem: Problem) -> Placement | None:
    """The best of all placements, with the proof that it is; None where they are too many, where many at once are not what one by one is, or where
    none fits."""
    groups = [(list(nodes), {problem.pins[n] for n in nodes if n in problem.pins}) for nodes in reduced(problem, ordered=False).groups]
    free = [nodes for nodes, pinned in groups if not pinned and any(problem.phase[n] is not Phase.BOTH for n in nodes)]
    many, apart = len(problem.meshes), problem.ports is not None and problem.objective in ("ttft", "tpot", "e2e")
    if apart or problem.contiguous or len(free) * math.log(many) > math.log(_MOST / len(problem)):
        return None
    mesh = np.zeros((many ** len(free), len(problem)), np.int64)
    for nodes, pinned in groups:
        mesh[:, nodes] = min(pinned, default=0)
    for i, nodes in enumerate(free):
        mesh[:, nodes] = (np.arange(len(mesh)) // many ** (len(free) - 1 - i) % many)[:, None]
    scores = Batch(problem).scores(mesh)
    best = float(scores.min())
    if not best < FAR:
        return None
    return dataclasses.replace(problem.placement(mesh[int(scores.argmin())]), bound=(best - 1e-12 * abs(best), f"all {len(mesh):,} placements"))


def portfolio(problem: Problem, *, seed: int = 0) -> Placement:
    """The best of all where these are few; else the best of `order_dp`, `heft`, `phase_split` and `single`, improved by `local_search`; and of `ideal_dp`
    where stages must be in an order. `cover` where machines have rates.

    Time and errors are those of its members. The same seed gives the same placement.
    """
    if problem.rates is not None:
        return cover(problem, seed=seed)
    if (proved := best_of_every(problem)) is not None:
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
