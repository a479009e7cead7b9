"""ideal_dp: the best placement in ordered stages, proved: a shortest path over all sets of nodes at which a stage may end."""

from __future__ import annotations

import dataclasses

import numpy as np

from partition.chain import Chain, reduced
from partition.errors import InfeasibleError, PlacementError
from partition.ideals import best_stages, ideals
from partition.policies._phased import best_of
from partition.policies.order_dp import goal, staged
from partition.problem import Placement, Problem

MOST = 300_000
"""Ideals that are tried at most."""


def every(chain: Chain) -> np.ndarray:
    """All ideals of a chain, bool [i, g]. Raises PlacementError where they are too many."""
    if (members := ideals(chain, MOST)) is None:
        raise PlacementError(f"more than {MOST:,} sets of nodes may end a stage", where=f"policy ideal_dp, {len(chain)} groups", mend="use the policy 'order_dp'")
    return members


def ideal_dp(problem: Problem) -> Placement:
    """Place a problem in the best of all ordered stages.

    Exact for the longest load where values pass through a host; for a sum, of the stages one after the other; where values cross
    links, as good as what `order_dp` holds stages to cost. O(ideals^2 x counts of meshes used), the ideals being those that the value of `order_dp`
    leaves. Raises PlacementError where they are too many, InfeasibleError where nothing fits. Source: Tarnawski et al., NeurIPS 2020; the reductions
    are those of `chain`.
    """
    if problem.ports is None:
        if (placement := best_of(problem, every)) is None:
            raise InfeasibleError("no ordered stages fit", where=f"{len(problem)} nodes on {len(problem.meshes)} meshes", mend="use more meshes or larger ones")
        return placement
    first = staged(problem)
    best, by = (first.value, goal(problem)) if first is not None else (float("inf"), goal(problem))
    chain = reduced(problem, best=best if by == "longest" else float("inf"))
    members = every(chain)
    found = best_stages(chain, members, goal=by, best=best * (1 + 1e-9))
    if found is None:
        raise InfeasibleError("no ordered stages fit", where=f"{len(chain)} groups on {', '.join(map(str, chain.counts))} meshes", mend="use more meshes or larger ones")
    placement = chain.placed(found.stages)
    if by == "longest" and problem.contiguous:
        return dataclasses.replace(placement, bound=(-problem.workload.tokens / found.value, f"all ordered stages, {len(members):,} ideals"))
    return placement
