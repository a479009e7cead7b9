"""Layers in a row that several machines hold: how many tokens flow through them, as a maximum flow.

A machine takes in tokens that have come to any of its layers, and passes them on after its last. So tokens go from i to j where j holds the layer
that follows i's last, and ends later. Source: Mei et al., Helix, ASPLOS 2025.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partition.errors import InfeasibleError
from partition.problem import Placement, Problem


def spans(problem: Problem, placement: Placement) -> list[tuple[int, int]]:
    """The layers [start, end) of each mesh, (0, 0) of an idle one. Raises InfeasibleError for a mesh whose layers are no row, or too many."""
    assert problem.rates is not None
    held: list[list[int]] = [[] for _ in problem.meshes]
    for n in range(len(problem)):
        for m in placement.of(n):
            held[m].append(n)
    for m, layers in enumerate(held):
        if layers and layers[-1] - layers[0] != len(layers) - 1:
            raise InfeasibleError(f"{problem.meshes[m]} holds layers that are no row", where=", ".join(map(str, layers[:8])), mend="give each machine layers in a row")
        if len(layers) >= problem.rates.shape[1] or (layers and problem.rates[m, len(layers)] <= 0):
            raise InfeasibleError(f"{problem.meshes[m]} cannot hold {len(layers)} layers", where=f"layers {layers[0]} to {layers[-1]}", mend="give it fewer")
    return [(layers[0], layers[-1] + 1) if layers else (0, 0) for layers in held]


def flow(problem: Problem, held: Sequence[tuple[int, int]]) -> float:
    """Tokens/s from source to sink, to a part in a billion of what all machines pass."""
    import scipy.sparse
    import scipy.sparse.csgraph

    assert problem.rates is not None and problem.lanes is not None
    m = len(problem.meshes)
    start, end = (np.array([span[i] for span in held]) for i in (0, 1))
    used, layers = end > start, len(problem)
    network = np.zeros((2 * m + 2, 2 * m + 2))  # a machine is two places, joined by its rate
    network[np.arange(m), m + np.arange(m)] = problem.rates[np.arange(m), end - start]
    follows = used[:, None] & used[None, :] & (start[None, :] <= end[:, None]) & (end[:, None] < end[None, :])
    network[m : 2 * m, :m] = np.where(follows, problem.lanes[:m, :m], 0.0)
    network[2 * m, :m] = np.where(used & (start == 0), problem.lanes[m, :m], 0.0)
    network[m : 2 * m, 2 * m + 1] = np.where(used & (end == layers), problem.lanes[:m, m + 1], 0.0)
    total = float(problem.rates.max(axis=1).sum()) or 1.0  # more than this flows nowhere
    fine = 2**30 / total  # flows are found in whole numbers
    whole = scipy.sparse.csr_matrix(np.floor(np.minimum(network, total) * fine).astype(np.int32))
    return float(scipy.sparse.csgraph.maximum_flow(whole, 2 * m, 2 * m + 1).flow_value) / fine


def capped(problem: Problem) -> float:
    """The most tokens/s that layers times flow leave room for: no machine gives a layer more than the flow itself."""
    assert problem.rates is not None
    h = np.arange(problem.rates.shape[1])
    low, high = 0.0, float(problem.rates.sum())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (h * np.minimum(problem.rates, middle)).max(axis=1).sum() >= middle * len(problem) else (low, middle)
    return high


def placed(problem: Problem, held: Sequence[tuple[int, int]]) -> Placement:
    """The placement in which each mesh holds the layers [start, end). Raises InfeasibleError for a layer that nobody holds."""
    of = [[m for m, (start, end) in enumerate(held) if start <= n < end] for n in range(len(problem))]
    if lacking := [n for n, ms in enumerate(of) if not ms]:
        raise InfeasibleError(f"nobody holds layer {lacking[0]}", where=f"{len(lacking)} layers", mend="use more machines")
    return Placement(mesh=np.array([ms[0] for ms in of]), also={n: tuple(ms[1:]) for n, ms in enumerate(of) if len(ms) > 1}, problem=problem)
