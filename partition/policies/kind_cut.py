"""kind_cut: machines of two kinds; which nodes each kind takes is a minimum cut, and each kind's nodes lie in order over its meshes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from partition.chain import Chain, reduced
from partition.cuts import weighed
from partition.errors import InfeasibleError, PlacementError
from partition.policies._best import best_of_all
from partition.problem import Placement, Problem

_BLENDS = 9
"""Places up to which one of two cuts is followed, and then the other."""


def kind_cut(problem: Problem) -> Placement:
    """Place a problem whose values pass through a host on machines of two kinds, so that the longest load is short, in no order of stages.

    The two cuts beside the best weights load one kind or the other more; so the first is followed up to some node and then the second, which balances
    them. About 20 maximum flows. Source: Lagrange relaxation of the longest load; task assignment as a minimum cut (Stone, 1977). Raises
    PlacementError for other problems, InfeasibleError where nothing fits.
    """
    if problem.ports is None or problem.objective != "throughput":
        raise PlacementError("kind_cut is for the longest load of problems whose values pass through a host", where="policy kind_cut", mend="use the policy 'order_dp'")
    chain = reduced(problem, ordered=False)
    if len(chain.kinds) != 2:
        raise PlacementError(f"kind_cut is for two kinds of mesh, these are {len(chain.kinds)}", where="policy kind_cut", mend="use the policy 'order_dp'")
    none = InfeasibleError("no blend of the cuts fits", where="policy kind_cut", mend="use the policy 'portfolio'")
    return best_of_all(problem, (functools.partial(_laid, chain, second) for second in _blends(chain)), none)


def _blends(chain: Chain) -> Iterator[np.ndarray]:
    """Who lies with the second kind [g], nearer and nearer to equal loads of both kinds."""
    _, less, more = weighed(chain)
    counts, n = np.array(chain.counts), len(chain)
    low, high = 0, n
    yield less
    yield more

    def ahead(second: np.ndarray) -> float:
        loads = np.array([chain.work[~second, 0].sum(), chain.work[second, 1].sum()]) / counts
        return float(loads[1] - loads[0])

    sign = np.sign(ahead(less)) or 1.0
    for _ in range(min(_BLENDS, max(1, n.bit_length()))):
        middle = (low + high) // 2
        second = np.where(np.arange(n) < middle, more, less)
        yield second
        low, high = (middle, high) if ahead(second) * sign > 0 else (low, middle)


def _laid(chain: Chain, second: np.ndarray) -> np.ndarray:
    """Mesh of each node: the groups of each kind in order, in as many runs of equal work as it has meshes."""
    mesh = np.zeros(len(chain.problem), np.int64)
    for kind, meshes in enumerate(chain.kinds):
        own = np.nonzero(second == bool(kind))[0]
        work = np.cumsum(chain.work[own, kind])
        for g, done in zip(own, work, strict=True):
            run = min(len(meshes) - 1, int(len(meshes) * (done - chain.work[g, kind] / 2) / max(float(work[-1]), 1e-300))) if np.isfinite(done) else 0
            mesh[list(chain.groups[g])] = meshes[run]
    return mesh
