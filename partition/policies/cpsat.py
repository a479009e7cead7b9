"""cpsat: the program of `milp` for CP-SAT (ortools, an extra), which proves ordered stages of thousands of nodes that HiGHS does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from partition.chain import Chain, reduced
from partition.errors import InfeasibleError, PlacementError
from partition.evaluation import evaluate, scored, verify
from partition.policies.order_dp import Staged, staged
from partition.problem import Placement, Problem

_SCALE = 10**7
"""Parts that the longest load of the start is counted in."""

_LARGEST = 200_000
"""Groups times stages that are still tried."""


def cpsat(problem: Problem, *, limit: float = 120.0, seed: int = 0) -> Placement:
    """Place a problem whose values pass through a host in ordered stages with the shortest longest load; `limit` in seconds.

    The model is that of `milp`, in whole numbers: times and sizes are rounded down, so that what CP-SAT proves holds; its placement is evaluated anew,
    and starts from that of `order_dp`, which stays where none better is found. Groups x stages booleans. Source: prefix model of
    precedence-constrained assignment; CP-SAT (Perron, Didier and Gay, CP 2023). Raises PlacementError without ortools, where the booleans are too
    many or values cross links, InfeasibleError where nothing fits.
    """
    if problem.ports is None or problem.objective != "throughput":
        raise PlacementError("cpsat is for the longest load of problems whose values pass through a host", where="policy cpsat", mend="use the policy 'order_dp'")
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        raise PlacementError("cpsat needs ortools, which is not installed", where="policy cpsat", mend="pip install 'partition-planner[cpsat]'") from None
    first = staged(problem)
    chain = reduced(problem, best=first.value if first is not None else float("inf"))
    if len(chain) * sum(chain.counts) > _LARGEST:
        raise PlacementError(f"{len(chain)} groups in {sum(chain.counts)} stages are too many", where="policy cpsat", mend="use the policy 'order_dp'")
    upper = first.value if first is not None else max(chain.most, 1e-30)
    best, bound = None if first is None else first.chain.placed(first.stages), 0.0
    for rounding in (np.floor, np.ceil):  # rounded down, what is proved holds; rounded up, what is found fits
        made = _Model(cp_model, chain, upper, rounding)
        if first is not None and best is not None:
            made.hint(first, best)
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds, solver.parameters.random_seed = limit, seed
        status = solver.solve(made.model)
        if rounding is np.floor:
            bound = upper * min(1.0, max(0.0, solver.best_objective_bound) / _SCALE) * (1 - 1e-9)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            break
        found = chain.placed(made.stages(solver))
        try:  # residents that several groups share are not in the model: its bound stays one
            verify(problem, found)
        except InfeasibleError:
            continue
        best = found if best is None else min((best, found), key=lambda p: scored(problem, evaluate(problem, p)))
        break
    if best is None:
        raise InfeasibleError("no ordered stages fit", where=f"{len(problem)} nodes on {len(problem.meshes)} meshes", mend="use more meshes or larger ones")
    return best if not problem.contiguous else dataclasses.replace(best, bound=(-problem.workload.tokens / max(bound, 1e-30), "ordered stages (CP-SAT)"))


class _Model:
    """y[v][b]: "v stands in stage b or before"; z[b][k]: "stage b is of kind k"; what passes is given out and taken in."""

    def __init__(self, cp: Any, chain: Chain, upper: float, rounding: Callable[[np.ndarray], np.ndarray]):
        self.model, self.chain, self.count = cp.CpModel(), chain, sum(chain.counts)
        model, stages, kinds = self.model, range(self.count), range(len(chain.kinds))
        per = _SCALE / max(upper, 1e-300)
        self.y = [[model.new_bool_var("") for _ in stages[:-1]] + [1] for _ in range(len(chain))]
        self.z = [[model.new_bool_var("") for _ in kinds] for _ in stages]
        for v, before in enumerate(chain.before):
            for b in stages[:-2]:
                model.add_implication(self.y[v][b], self.y[v][b + 1])
            for u in before:
                for b in stages[:-1]:
                    model.add_implication(self.y[v][b], self.y[u][b])
        for b in stages:
            model.add_exactly_one(self.z[b])
        for k, count in enumerate(chain.counts):
            model.add(sum(self.z[b][k] for b in stages) <= count)
        longest = model.new_int_var(0, _SCALE, "")
        passing = self._passing() if chain.port.any() else {}
        for b in stages:
            inside = [self.inside(v, b) for v in range(len(chain))]
            for k in kinds:
                work = [int(np.floor(min(chain.work[v, k], 2 * upper) * per)) for v in range(len(chain))]
                waits = [(var, int(np.floor(chain.crossings[i].cost * chain.port[k] * per))) for (i, at), pair in passing.items() if at == b for var in pair]
                load = sum(w * x for w, x in zip(work, inside, strict=True) if w) + sum(c * var for var, c in waits if c)
                model.add(load <= longest).only_enforce_if(self.z[b][k])
                if np.isfinite(room := float(chain.capacity[k])) and chain.size[:, k].sum() > room:
                    held = [int(s) for s in rounding(chain.size[:, k] / room * _SCALE)]
                    model.add(sum(s * x for s, x in zip(held, inside, strict=True) if s) <= _SCALE).only_enforce_if(self.z[b][k])
        model.minimize(longest)

    def inside(self, v: int, b: int) -> Any:
        """Whether v stands in stage b."""
        return self.y[v][b] - (self.y[v][b - 1] if b else 0)

    def _passing(self) -> dict[tuple[int, int], tuple[Any, Any]]:
        """(crossing, stage) -> whether the stage gives it out, and takes it in."""
        model, found = self.model, dict[tuple[int, int], tuple[Any, Any]]()
        for i, c in enumerate(self.chain.crossings):
            if not c.cost > 0:
                continue
            for b in range(self.count):
                gives, takes = model.new_bool_var(""), model.new_bool_var("")
                for w in c.dst:  # given out where a reader is not inside, taken in where a reader is and the source is not
                    model.add(gives >= self.inside(c.src, b) - self.inside(w, b))
                    model.add(takes >= self.inside(w, b) - self.inside(c.src, b))
                found[i, b] = gives, takes
        return found

    def hint(self, first: Staged, start: Placement) -> None:
        """Start from stages that are known."""
        order = {int(start.mesh[first.chain.groups[groups[0]][0]]): b for b, (_, groups) in enumerate(s for s in first.stages if s[1])}
        for v, nodes in enumerate(self.chain.groups):
            for b in range(self.count - 1):
                self.model.add_hint(self.y[v][b], order[int(start.mesh[nodes[0]])] <= b)

    def stages(self, solver: Any) -> list[tuple[int, tuple[int, ...]]]:
        """The stages found that have groups, each a kind and its groups."""
        kind = [next(k for k, z in enumerate(row) if solver.value(z)) for row in self.z]
        held: list[list[int]] = [[] for _ in kind]
        for v, row in enumerate(self.y):
            held[next(b for b, y in enumerate(row) if solver.value(y))].append(v)
        return [(kind[b], tuple(groups)) for b, groups in enumerate(held) if groups]
