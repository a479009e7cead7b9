"""order_dp: the best stages along an order of the nodes, for meshes of several kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from partition.chain import Chain, reduced
from partition.errors import InfeasibleError
from partition.ideals import Stage, best_stages, calm, compromises, ideals, prefixes, thinned
from partition.policies._phased import best_of
from partition.problem import Placement, Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged:
    """Stages of a chain, and their value."""

    chain: Chain
    value: float
    stages: tuple[Stage, ...]


def goal(problem: Problem) -> Literal["longest", "sum"]:
    """What of stages the problem's objective asks for: that the longest is short, or that all together are."""
    return "longest" if problem.objective == "throughput" else "sum"


def orders(chain: Chain) -> Iterator[list[int]]:
    """Orders of the groups worth trying: as the program has them; depth first from the last groups; breadth first."""
    yield list(range(len(chain)))
    seen, order = set[int](), list[int]()
    for end in range(len(chain)):
        stack = [end]
        while stack:
            g = stack[-1]
            waiting = [b for b in sorted(chain.before[g], reverse=True) if b not in seen]
            if waiting:
                stack.append(waiting[0])
            else:
                stack.pop()
                if g not in seen:
                    seen.add(g)
                    order.append(g)
    yield order
    depth = [0] * len(chain)
    for g in range(len(chain)):
        depth[g] = 1 + max((depth[b] for b in chain.before[g]), default=0)
    yield sorted(range(len(chain)), key=lambda g: (depth[g], g))


_MANY = 1_200
"""Groups above which only some of an order's ideals are tried: first all over, then where the best found leaves room."""

_ANY = 1e300
"""Seconds that any stage may take where it is their sum that counts."""

_FEW = 4_000
"""Ideals of the merged groups that are still tried all."""


def staged(problem: Problem) -> Staged | None:
    """The best stages along some orders, and among all ideals of merged groups where these are few; None where none fits."""
    chain, best, by = reduced(problem), None, goal(problem)
    for order in orders(chain):
        if len(chain) <= _MANY:
            best = _better(best, chain, prefixes(chain, order), by)
            continue
        for most in (_MANY // 2, _MANY):
            few = thinned(chain, order, calm(chain, order, most, best.value if best is not None and by == "longest" else float("inf")))
            best = _better(best, few, prefixes(few), by)
    upto = best.value if best is not None and by == "longest" else _ANY
    if best is not None and len(chain) <= _MANY and len(merged := reduced(problem, best=upto, roomy=True)) < len(chain):
        members = ideals(merged, _FEW)
        best = best if members is None else _better(best, merged, members, by)
    return best


def _better(best: Staged | None, chain: Chain, members: np.ndarray, by: Literal["longest", "sum"]) -> Staged | None:
    found = best_stages(chain, members, goal=by, best=best.value if best is not None else float("inf"))
    return best if found is None or (best is not None and found.value >= best.value) else Staged(value=found.value, stages=found.stages, chain=chain)


def compromised(problem: Problem) -> Iterator[Placement]:
    """Placements in stages along the program's order through a host, of which none has both a shorter longest load and a smaller sum of loads."""
    chain = reduced(problem)
    if len(chain) > _MANY:
        chain = thinned(chain, range(len(chain)), calm(chain, range(len(chain)), _MANY))
    for stages in compromises(chain, prefixes(chain)):
        yield chain.placed(stages)


def along(chain: Chain) -> np.ndarray:
    """The ideals of the program's order, bool [i, g]; of a long one, those where little passes."""
    order = range(len(chain))
    return prefixes(chain) if len(chain) <= _MANY else prefixes(chain, ends=calm(chain, order, _MANY))


def order_dp(problem: Problem) -> Placement:
    """Place nodes in the best ordered stages along a few orders.

    O(n^2 x counts of meshes used) at most; above 1,200 groups, some of the places to cut are tried, where little passes. Stages longer than the best
    found are left out. Raises InfeasibleError where nothing fits.
    """
    if problem.ports is None:
        placement = best_of(problem, along)
    else:
        placement = None if (found := staged(problem)) is None else found.chain.placed(found.stages)
    if placement is None:
        raise InfeasibleError("no ordered stages fit along the orders that were tried", where=f"{len(problem)} nodes on {len(problem.meshes)} meshes", mend="use more meshes or larger ones")
    return placement
