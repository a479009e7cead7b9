"""cover: layers that several unequal machines hold, as rows of layers that cover each layer often enough.

Where links do not bind, tokens flow as fast as the least covered layer: when one machine's row ends, those that hold the next layer have spare
exactly what it passes on. So the best rows solve a covering program, in which machines of a kind are one number. Where links bind, rows are moved.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from partition.errors import InfeasibleError, PlacementError
from partition.flood import capped, flow, placed
from partition.problem import Placement, Problem

_SECONDS = 60.0
"""What the covering program may take; then its best and its bound count."""


def cover(problem: Problem, *, seed: int = 0, moves: int = 4000) -> Placement:
    """Place rows of layers on machines. Carries the covering program's bound, which no placement beats, whatever links do.

    A program of kinds x layers x lengths whole numbers, in a minute at most; `moves` are tried where links bind. Raises PlacementError for problems
    without rates, InfeasibleError where the machines do not hold all layers. Source: the problem is that of Helix (ASPLOS 2025).
    """
    if problem.rates is None:
        raise PlacementError("cover is for layers with rates, that several machines may hold", where="policy cover", mend="use the policy 'portfolio'")
    held, bound = covered(problem)
    best = flow(problem, held)
    if best < bound * (1 - 1e-3):
        held = _moved(problem, held, best, seed, moves)
    return dataclasses.replace(placed(problem, held), bound=(-problem.workload.tokens * bound, "covering of the layers, without links"))


def covered(problem: Problem) -> tuple[list[tuple[int, int]], float]:
    """(the layers [start, end) of each machine, the most tokens/s that any rows can pass)."""
    import scipy.optimize
    import scipy.sparse

    assert problem.rates is not None
    layers, kinds = len(problem), dict[bytes, list[int]]()
    for m, row in enumerate(problem.rates):
        kinds.setdefault(row.tobytes(), []).append(m)
    rows = [(k, s, h) for k, ms in enumerate(kinds.values()) for h in range(1, problem.rates.shape[1]) if problem.rates[ms[0], h] > 0 for s in range(layers - h + 1)]
    machines = list(kinds.values())
    count, scale = len(rows), float(problem.rates.max())
    cover_, column, value = list[int](), list[int](), list[float]()
    for i, (k, s, h) in enumerate(rows):
        cover_ += range(s, s + h)
        column += [i] * h
        value += [-float(problem.rates[machines[k][0], h]) / scale] * h
    cover_ += range(layers)
    column += [count] * layers
    value += [1.0] * layers
    many = scipy.sparse.csr_matrix((np.ones(count), ([k for k, _, _ in rows], range(count))), shape=(len(machines), count + 1))
    limits = [scipy.optimize.LinearConstraint(scipy.sparse.csr_matrix((value, (cover_, column)), shape=(layers, count + 1)), -np.inf, 0.0),
              scipy.optimize.LinearConstraint(many, -np.inf, np.array(list(map(len, machines))))]  # fmt: skip
    top = capped(problem) / scale
    found = scipy.optimize.milp(np.append(np.zeros(count), -1.0), constraints=limits, integrality=np.append(np.ones(count), 0),
                                bounds=scipy.optimize.Bounds(0, np.append(np.full(count, np.inf), top)), options={"time_limit": _SECONDS, "mip_rel_gap": 1e-6})  # fmt: skip
    if found.x is None or found.x[-1] <= 0:
        raise InfeasibleError("the machines do not hold all layers together", where=f"{layers} layers on {len(problem.meshes)} machines", mend="use more machines")
    left, held = [list(ms) for ms in machines], [(0, 0)] * len(problem.meshes)
    for (k, s, h), n in zip(rows, np.round(found.x[:count]).astype(int), strict=True):
        for _ in range(n):
            held[left[k].pop(0)] = (s, s + h)
    bound = min(top, -float(found.mip_dual_bound)) * scale
    return held, bound * (1 + 1e-9)


def _moved(problem: Problem, held: list[tuple[int, int]], best: float, seed: int, moves: int) -> list[tuple[int, int]]:
    """Rows moved, made longer or shorter, and exchanged by chance, while more tokens flow or nearly as many."""
    assert problem.rates is not None
    rng, layers, most = np.random.default_rng(seed), len(problem), problem.rates.shape[1] - 1
    at, now, found = list(held), best, list(held)
    for i in range(moves):
        new, m = list(at), int(rng.integers(len(at)))
        start, end = new[m]
        choice = rng.random()
        if choice < 0.35 and len(at) > 1:
            other = int(rng.integers(len(at)))
            new[m], new[other] = new[other], new[m]
        elif choice < 0.7:
            shift = int(rng.integers(-3, 4))
            new[m] = (start + shift, end + shift)
        elif choice < 0.9:
            new[m] = (start, end + int(rng.integers(-2, 3))) if rng.random() < 0.5 else (start + int(rng.integers(-2, 3)), end)
        else:
            h = int(rng.integers(1, most + 1))
            s = int(rng.integers(0, max(1, layers - h + 1)))
            new[m] = (s, s + h)
        if any(not (0 <= s <= e <= layers and e - s <= most and (e == s or problem.rates[j, e - s] > 0)) for j, (s, e) in enumerate(new)):
            continue
        value, heat = flow(problem, new), 0.02 * best * (1 - i / moves)
        if value >= now or rng.random() < np.exp((value - now) / max(heat, 1e-9)):
            at, now = new, value
            if value > best:
                best, found = value, list(new)
    return found
