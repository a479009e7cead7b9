"""m_sct: earliest starts, with each node's favourite child kept close: which that is, a linear program says (Baechi: Jeon et al., SoCC 2020)."""

from __future__ import annotations

import numpy as np

from partition.policies.m_etf import earliest
from partition.problem import Placement, Problem

_CLOSE = 0.1
"""A pair is taken to share a mesh where the relaxed program says less than this of their being apart."""


def m_sct(problem: Problem) -> Placement:
    """Find favourite children by the relaxation of the schedule on as many meshes as are wanted, then schedule as `m_etf` does.

    One linear program of n + edges numbers. Raises InfeasibleError where a node finds no mesh with room. Source: Hanen and Munier, 1995.
    """
    return earliest(problem, favourites(problem))


def favourites(problem: Problem) -> dict[int, int]:
    """Node -> the child that best runs where it runs."""
    import scipy.optimize
    import scipy.sparse

    n, edges = len(problem), dict[tuple[int, int], float]()
    off = ~np.eye(len(problem.meshes), dtype=bool) & (problem.beta > 0)
    alpha, rate = (float(problem.alpha[off].mean()), float((1 / problem.beta[off]).mean())) if off.any() else (0.0, 0.0)
    rate = float(2 * problem.ports.max()) if problem.ports is not None else rate
    for f in problem.flows:
        if f.kind != "carry":
            for d in f.dst:
                edges[f.src, d] = edges.get((f.src, d), 0.0) + (alpha + f.nbytes * rate) * f.times
    if not edges:
        return {}
    pairs, weight = sorted(edges), np.where(np.isfinite(problem.seconds), problem.seconds, np.nan)
    runs = np.nan_to_num(np.nanmean(weight, axis=1)) * problem.times
    width, rows, columns, values, limits = n + len(pairs) + 1, list[int](), list[int](), list[float](), list[float]()

    def add(entries: list[tuple[int, float]], limit: float) -> None:
        for column, value in entries:
            rows.append(len(limits))
            columns.append(column)
            values.append(value)
        limits.append(limit)

    children, parents = dict[int, list[int]](), dict[int, list[int]]()
    for e, (i, j) in enumerate(pairs):
        add([(i, 1.0), (j, -1.0), (n + e, edges[i, j])], -float(runs[i]))
        children.setdefault(i, []).append(n + e)
        parents.setdefault(j, []).append(n + e)
    for group in (*children.values(), *parents.values()):  # at most one child, and one parent, is close
        add([(e, -1.0) for e in group], 1.0 - len(group))
    for i in range(n):
        add([(i, 1.0), (width - 1, -1.0)], -float(runs[i]))
    cost = np.zeros(width)
    cost[-1] = 1.0
    matrix = scipy.sparse.csr_matrix((values, (rows, columns)), shape=(len(limits), width))
    bounds = [(0, None)] * n + [(0, 1)] * len(pairs) + [(0, None)]
    found = scipy.optimize.linprog(cost, A_ub=matrix, b_ub=limits, bounds=bounds, method="highs")
    return {i: j for e, (i, j) in enumerate(pairs) if found.success and found.x[n + e] < _CLOSE}
