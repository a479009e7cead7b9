"""milp: ordered stages as an integer program, in which a node says which stages stand before it; solved by HiGHS, with a bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

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
    best, found = _solved(chain, stages, first.value if first is not None else max(chain.most, 1e-30), limit)
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


class _Program:
    """Rows of an integer program, `sum of number x column <= most`, as they are added. y [g, b]: the columns of "v stands in stage b or before", z [b, k]: of
    "stage b is of kind k", gives and takes [crossing, b]: of "stage b gives it out" and "takes it in"; the last column is the longest load, over `upper`."""

    def __init__(self, chain: Chain, stages: int, upper: float):
        g, k, values = len(chain), len(chain.kinds), len(chain.crossings)
        self.chain, self.stages, self.upper = chain, stages, upper
        columns = np.split(np.arange((g + k + 2 * values) * stages), np.cumsum([g * stages, stages * k, values * stages]))
        self.y, self.z, self.gives, self.takes = (part.reshape(shape) for part, shape in zip(columns, ((g, stages), (stages, k), (values, stages), (values, stages)), strict=True))
        self.width = (g + k + 2 * values) * stages + 1
        self.rows, self.columns, self.numbers, self.limits = list[int](), list[int](), list[float](), list[float]()

    def add(self, entries: Iterable[tuple[int, float]], most: float) -> None:
        for column, number in entries:
            self.rows.append(len(self.limits))
            self.columns.append(int(column))
            self.numbers.append(number)  # numbers of one column in one row add up
        self.limits.append(most)

    def inside(self, v: int, b: int, number: float) -> list[tuple[int, float]]:
        """Whether v stands in stage b."""
        return [(self.y[v, b], number)] + ([(self.y[v, b - 1], -number)] if b else [])

    def order(self) -> None:
        for v, before in enumerate(self.chain.before):
            for b in range(self.stages - 1):
                self.add([(self.y[v, b], 1.0), (self.y[v, b + 1], -1.0)], 0.0)
            for u in before:
                for b in range(self.stages):
                    self.add([(self.y[v, b], 1.0), (self.y[u, b], -1.0)], 0.0)

    def crossings(self) -> None:
        for i, c in enumerate(self.chain.crossings):
            for b in range(self.stages):
                for w in c.dst:  # given out where a reader is not inside, taken in where a reader is and the source is not
                    self.add([*self.inside(c.src, b, 1.0), *self.inside(w, b, -1.0), (self.gives[i, b], -1.0)], 0.0)
                    self.add([*self.inside(w, b, 1.0), *self.inside(c.src, b, -1.0), (self.takes[i, b], -1.0)], 0.0)

    def loads(self) -> None:
        """A stage that is of a kind has its load and its room; each stage is of one kind, each kind has so many."""
        chain, every = self.chain, range(len(self.chain.kinds))
        finite = np.where(np.isfinite(chain.work), chain.work, 2 * self.upper)
        moved = 2 * sum(c.cost for c in chain.crossings)
        for b in range(self.stages):
            for k in every:
                work = [entry for v in range(len(chain)) for entry in self.inside(v, b, finite[v, k] / self.upper)]
                waits = [(column, c.cost * chain.port[k] / self.upper) for i, c in enumerate(chain.crossings) for column in (self.gives[i, b], self.takes[i, b])]
                most = float(finite[:, k].sum() + moved * chain.port[k]) / self.upper
                self.add([*work, *waits, (self.width - 1, -1.0), (self.z[b, k], most)], most)
                total = float(chain.size[:, k].sum() / chain.capacity[k]) if np.isfinite(chain.capacity[k]) else 0.0
                if total > 1:
                    held = [entry for v in range(len(chain)) for entry in self.inside(v, b, chain.size[v, k] / chain.capacity[k])]
                    self.add([*held, (self.z[b, k], total)], 1.0 + total)
            for sign in (1.0, -1.0):
                self.add([(self.z[b, k], sign) for k in every], sign)
        for k, count in enumerate(chain.counts):
            self.add([(self.z[b, k], 1.0) for b in range(self.stages)], float(count))


def _solved(chain: Chain, stages: int, upper: float, limit: float) -> tuple[float, list[tuple[int, tuple[int, ...]]] | None]:
    """(a proved bound on the longest load, the stages found that are shorter than `upper`)."""
    import scipy.optimize
    import scipy.sparse

    p = _Program(chain, stages, upper)
    p.order()
    p.crossings()
    p.loads()
    matrix = scipy.sparse.csr_matrix((p.numbers, (p.rows, p.columns)), shape=(len(p.limits), p.width))
    low, last = np.zeros(p.width), np.arange(p.width) == p.width - 1
    low[p.y[:, -1]] = 1.0
    whole = np.zeros(p.width)
    whole[: p.z.max() + 1] = 1.0
    result = scipy.optimize.milp(last.astype(float), constraints=scipy.optimize.LinearConstraint(matrix, -np.inf, np.array(p.limits)), integrality=whole,
                                 bounds=scipy.optimize.Bounds(low, np.ones(p.width)), options={"time_limit": limit, "mip_rel_gap": 1e-7})  # fmt: skip
    if result.status == 2:  # nothing is shorter than what is known
        return upper, None
    bound = upper * min(1.0, float(result.mip_dual_bound or 0.0)) * (1 - 1e-6)
    if result.x is None or result.x[-1] >= 1 - 1e-9:
        return bound, None
    stage = (result.x[p.y] > 0.5).argmax(axis=1)
    return bound, [(int(result.x[p.z[b]].argmax()), tuple(np.nonzero(stage == b)[0].tolist())) for b in range(stages) if (stage == b).any()]
