"""milp: ordered stages as an integer program, in which a node says which stages stand before it; solved by HiGHS, with a bound."""

from __future__ import annotations

import dataclasses

import numpy as np

from partition.chain import Chain, reduced
from partition.errors import InfeasibleError, PlacementError
from partition.evaluation import verify
from partition.policies.order_dp import staged
from partition.problem import Placement, Problem

_LARGEST = 2_000
"""Groups times stages that are still tried."""


def milp(problem: Problem, *, limit: float = 60.0) -> Placement:
    """Place a problem whose values pass through a host in ordered stages with the shortest longest load; `limit` in seconds.

    Y[v, b] says that v stands in stage b or before; then Y[v, b] <= Y[u, b] for what must stand before v is all that order needs. It starts from the
    value of `order_dp`, which it keeps where it finds no better one, and carries the bound that HiGHS proved where stages must be in an order.
    Groups x stages binaries. Raises PlacementError where these are too many or values cross links, InfeasibleError where nothing fits.
    """
    if problem.ports is None or problem.objective != "throughput":
        raise PlacementError("milp is for the longest load of problems whose values pass through a host", where="policy milp", mend="use the policy 'order_dp'")
    first = staged(problem)
    chain = reduced(problem, best=first.value if first is not None else float("inf"))
    stages = sum(chain.counts)
    if len(chain) * stages > _LARGEST:
        raise PlacementError(f"{len(chain)} groups in {stages} stages are too many", where="policy milp", mend=f"it is for {_LARGEST:,} at most: use 'ideal_dp' or 'order_dp'")
    longest = float(np.where(np.isfinite(chain.work), chain.work, 0.0).max(axis=1).sum()) + 2 * sum(c.cost for c in chain.crossings) * float(chain.port.max())
    best, found = _solved(chain, stages, first.value if first is not None else max(longest, 1e-30), limit)
    if found is None and first is None:
        raise InfeasibleError("no ordered stages fit", where=f"{len(problem)} nodes on {len(problem.meshes)} meshes", mend="use more meshes or larger ones")
    placement = chain.placed(found) if found is not None else first.chain.placed(first.stages)  # type: ignore[union-attr]
    try:
        verify(problem, placement)
    except InfeasibleError:  # residents that several groups share are not in the program: its bound stays one
        if first is None:
            raise PlacementError("the integer program leaves out residents that several nodes share", where="policy milp", mend="use the policy 'ideal_dp'") from None
        placement = first.chain.placed(first.stages)
    if not problem.contiguous:
        return placement
    return dataclasses.replace(placement, bound=(-problem.workload.tokens / max(best, 1e-30), "integer program of ordered stages (HiGHS)"))


def _solved(chain: Chain, stages: int, upper: float, limit: float) -> tuple[float, list[tuple[int, tuple[int, ...]]] | None]:
    """(a proved bound on the longest load, the stages found that are shorter than `upper`)."""
    import scipy.optimize
    import scipy.sparse

    g, kinds, values = len(chain), len(chain.kinds), len(chain.crossings)
    y, z = np.arange(g * stages).reshape(g, stages), g * stages + np.arange(stages * kinds).reshape(stages, kinds)
    begin = z.max() + 1
    gives, takes = (begin + which * values * stages + np.arange(values * stages).reshape(values, stages) for which in (0, 1))
    width = begin + 2 * values * stages + 1
    rows, columns, numbers, limits = list[int](), list[int](), list[float](), list[float]()

    def add(entries: list[tuple[int, float]], most: float) -> None:
        for column, number in entries:
            rows.append(len(limits))
            columns.append(int(column))
            numbers.append(number)
        limits.append(most)

    def inside(v: int, b: int, sign: float) -> list[tuple[int, float]]:
        """Whether v stands in stage b."""
        return [(y[v, b], sign)] + ([(y[v, b - 1], -sign)] if b else [])

    for v in range(g):
        for b in range(stages - 1):
            add([(y[v, b], 1.0), (y[v, b + 1], -1.0)], 0.0)
        for u in chain.before[v]:
            for b in range(stages):
                add([(y[v, b], 1.0), (y[u, b], -1.0)], 0.0)
    for i, c in enumerate(chain.crossings):
        for b in range(stages):
            for w in c.dst:  # given out where a reader is not inside, taken in where a reader is and the source is not
                add([*inside(c.src, b, 1.0), *inside(w, b, -1.0), (gives[i, b], -1.0)], 0.0)
                add([*inside(w, b, 1.0), *inside(c.src, b, -1.0), (takes[i, b], -1.0)], 0.0)
    finite = np.where(np.isfinite(chain.work), chain.work, 2 * upper)
    for b in range(stages):
        for k in range(kinds):
            entries: dict[int, float] = {}
            for v in range(g):
                for column, sign in inside(v, b, 1.0):
                    entries[column] = entries.get(column, 0.0) + sign * finite[v, k] / upper
            for i, c in enumerate(chain.crossings):
                for column in (gives[i, b], takes[i, b]):
                    entries[column] = c.cost * chain.port[k] / upper
            most = float(finite[:, k].sum() + 2 * sum(c.cost for c in chain.crossings) * chain.port[k]) / upper
            add([*entries.items(), (width - 1, -1.0), (z[b, k], most)], most)  # binds where the stage is of this kind
            if np.isfinite(room := float(chain.capacity[k])):
                held: dict[int, float] = {}
                for v in range(g):
                    for column, sign in inside(v, b, 1.0):
                        held[column] = held.get(column, 0.0) + sign * chain.size[v, k] / room
                total = float(chain.size[:, k].sum()) / room
                if total > 1:
                    add([*held.items(), (z[b, k], total)], 1.0 + total)
        for sign in (1.0, -1.0):
            add([(z[b, k], sign) for k in range(kinds)], sign)
    for k, count in enumerate(chain.counts):
        add([(z[b, k], 1.0) for b in range(stages)], float(count))
    matrix = scipy.sparse.csr_matrix((numbers, (rows, columns)), shape=(len(limits), width))
    low, high = np.zeros(width), np.ones(width)
    low[y[:, -1]] = 1.0
    integral = np.zeros(width)
    integral[: begin] = 1.0
    goal = np.zeros(width)
    goal[-1] = 1.0
    result = scipy.optimize.milp(goal, constraints=scipy.optimize.LinearConstraint(matrix, -np.inf, np.array(limits)), integrality=integral,
                                 bounds=scipy.optimize.Bounds(low, high), options={"time_limit": limit, "mip_rel_gap": 1e-7})  # fmt: skip
    if result.status == 2:  # nothing is shorter than what is known
        return upper, None
    bound = upper * min(1.0, float(result.mip_dual_bound or 0.0)) * (1 - 1e-6)
    if result.x is None or result.x[-1] >= 1 - 1e-9:
        return bound, None
    stage = (result.x[y] > 0.5).argmax(axis=1)
    return bound, [(int(result.x[z[b]].argmax()), tuple(np.nonzero(stage == b)[0].tolist())) for b in range(stages) if (stage == b).any()]
