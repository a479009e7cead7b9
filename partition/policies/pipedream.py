"""pipedream: stages that end only where one node alone passes on all that follows needs (Harlap et al., PipeDream, SOSP 2019)."""

from __future__ import annotations

import numpy as np

from partition.chain import Chain, reduced
from partition.errors import InfeasibleError
from partition.ideals import best_stages, prefixes
from partition.policies._phased import best_of
from partition.policies.order_dp import goal
from partition.problem import Placement, Problem


def single_ends(chain: Chain) -> np.ndarray:
    """The ideals of the chain's order, bool [i, g], after which nothing that costs goes on but from the last group in them."""
    n, over = len(chain), np.zeros(len(chain) + 2, int)
    for c in chain.crossings:
        if c.cost > 0 and max(c.dst) > c.src:
            over[c.src + 2] += 1
            over[max(max(c.dst) + 1, c.src + 2)] -= 1
    passing = np.cumsum(over)
    return prefixes(chain, ends=[i for i in range(n + 1) if i in (0, n) or passing[i] == 0])


def pipedream(problem: Problem) -> Placement:
    """Place the best ordered stages that end at single nodes through which every path goes. O(n^2) time. Raises InfeasibleError where none fit."""
    if problem.ports is None:
        placement = best_of(problem, single_ends)
    else:
        chain = reduced(problem)
        found = best_stages(chain, single_ends(chain), goal=goal(problem))
        placement = None if found is None else chain.placed(found.stages)
    if placement is None:
        raise InfeasibleError("no stages between single nodes fit", where=f"{len(problem)} nodes on {len(problem.meshes)} meshes", mend="use the policy 'order_dp'")
    return placement
