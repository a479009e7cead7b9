"""A bound on the longest load of machines of two kinds from minimum cuts: work that suits one kind lies among work that suits the other, and to
follow it costs transfers.

The longest of all loads is no shorter than any weighted mean of them. With one weight for each kind, the placement of the least mean is a minimum
cut between the kinds, whatever the graph; the best weights give the bound (a Lagrange dual, concave in the weights).
"""

from __future__ import annotations

import numpy as np

from partition.chain import Chain, reduced
from partition.problem import Problem

_MOST = 2**31 - 2
"""Capacities are whole numbers up to this, rounded down, so that the bound holds."""

_TRIED = 18
"""Weights that are tried."""


def two_kinds(problem: Problem) -> float:
    """A lower bound on the longest load [s] where values pass through a host and machines are of two kinds; 0 for other problems.

    Memory is left out. 18 maximum flows. Source: task assignment as a minimum cut (Stone, 1977), with hyperedges for values of several readers.
    """
    if problem.ports is None or len((chain := reduced(problem, ordered=False)).kinds) != 2:
        return 0.0
    return weighed(chain)[0]


def weighed(chain: Chain) -> tuple[float, np.ndarray, np.ndarray]:
    """(the bound [s] of the best weights for a chain of two kinds; who lies with the second kind, bool [g], at weights just below and just above these)."""
    counts, golden = np.array(chain.counts, float), (5**0.5 - 1) / 2

    def at(share: float) -> tuple[float, np.ndarray]:
        return split(chain, np.array([share, 1 - share]) / counts)

    low, high = 0.0, 1.0
    a, b = high - golden, low + golden
    left, right = at(a), at(b)
    best = max(left[0], right[0])
    for _ in range(_TRIED - 2):
        if left[0] < right[0]:
            low, a, left = a, b, right
            b = low + golden * (high - low)
            right = at(b)
        else:
            high, b, right = b, a, left
            a = high - golden * (high - low)
            left = at(a)
        best = max(best, left[0], right[0])
    return best * (1 - 1e-9), at(low)[1], at(high)[1]


def split(chain: Chain, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The least sum over meshes of weight x load, of all placements of a chain of two kinds (weights [2]: of each mesh of a kind); and who lies with the second kind [g]."""
    import scipy.sparse
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    g = len(chain)
    cost = np.where(np.isfinite(chain.work), np.where(np.isfinite(chain.work), chain.work, 0.0) * weights[None, :], np.inf)
    arcs = [(g, v, cost[v, 1]) for v in range(g)] + [(v, g + 1, cost[v, 0]) for v in range(g)]  # whoever lies with kind 1 is cut from g, and pays for kind 1
    nodes = g + 2
    for c in chain.crossings:
        apart = c.cost * float(weights @ chain.port)  # one mesh gives it out, at least one takes it in
        if not apart > 0:
            continue
        if len(c.dst) == 1:
            arcs += [(c.src, c.dst[0], apart), (c.dst[0], c.src, apart)]
            continue
        arcs += [(c.src, nodes, apart), (nodes + 1, c.src, apart)]
        for d in c.dst:
            arcs += [(nodes, d, np.inf), (d, nodes + 1, np.inf)]
        nodes += 2
    rows, columns, capacity = (np.array(column) for column in zip(*arcs, strict=True))
    total = float(np.where(np.isfinite(cost), cost, 0.0).max(axis=1).sum() + sum(c.cost for c in chain.crossings) * float(weights @ chain.port))  # some cut is no more
    network = scipy.sparse.csr_matrix((np.minimum(capacity, total), (rows, columns)), shape=(nodes, nodes))
    scale = _MOST / max(total, 1e-300)
    network.data = np.floor(np.minimum(network.data, total) * scale * (1 - 1e-12)).astype(np.int32)
    found = maximum_flow(network, g, g + 1)
    rest = network - found.flow
    rest.data = (rest.data > 0).astype(np.int8)
    rest.eliminate_zeros()
    second = np.ones(nodes, bool)
    second[breadth_first_order(rest, g, return_predecessors=False)] = False
    return float(found.flow_value) / scale, second[:g]
