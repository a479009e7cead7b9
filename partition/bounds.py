"""Lower bounds: what no placement can beat, each with the name of its proof.

All rest on two facts: a node takes at least its fastest mesh's seconds, and transfers, memory and contention only add.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from partition.evaluation import groups
from partition.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """No feasible placement scores below `score` (as `Estimate.score`: throughput is negated); `proof` names why."""

    score: float
    proof: str

    def gap(self, reached: float) -> float:
        """(reached - bound) / |reached|, 0 where the bound is met."""
        return 0.0 if reached == self.score else max(0.0, (reached - self.score) / abs(reached)) if reached else float("inf")


def critical_path(problem: Problem, nodes: list[int]) -> float:
    """Longest path through nodes, each as fast as its fastest mesh, transfers free [s]."""
    fastest, chosen = problem.seconds.min(axis=1), set(nodes)
    end: dict[int, float] = {}
    for n in nodes:
        ready = [end[problem.flows[i].src] for i in problem.incoming[n]
                 if problem.flows[i].kind != "carry" and problem.flows[i].src in chosen]  # fmt: skip
        end[n] = max(ready, default=0.0) + float(fastest[n])
    return max(end.values(), default=0.0)


def lower_bound(problem: Problem) -> Bound:
    """The best bound known for the problem's objective. Source: critical path and area bounds of list scheduling (Graham, 1969)."""
    before, inside, after = groups(problem)
    trips = problem.workload.trips if inside else 0
    if problem.objective == "ttft":
        return Bound(score=critical_path(problem, before), proof="critical path of prefill on the fastest mesh of each node")
    fastest = problem.seconds.min(axis=1)
    cycle = _cycle(problem, inside, fastest) if trips > 1 else 0.0
    if problem.objective == "tpot":
        return Bound(score=cycle if trips > 1 else 0.0, proof="longest carry cycle of one trip on the fastest mesh of each node")
    if problem.objective == "e2e":
        first = critical_path(problem, before)
        return Bound(score=max(first + cycle * max(0, trips - 1), critical_path(problem, before + inside + after)),
                     proof="critical path of prefill, then trips of the longest carry cycle")  # fmt: skip
    times = problem.times.astype(float)
    kept = problem.seconds / problem.depth[None, :]  # a batch keeps a mesh from others for no less than this of what it does there
    if problem.objective == "throughput":
        area = float((kept.min(axis=1) * times).sum()) / len(problem.meshes)
        biggest = float((fastest * times).max(initial=0.0))
        proof = "area: all work shared evenly by the fastest meshes" if area >= biggest else "biggest node on its fastest mesh"
        return Bound(score=-problem.workload.tokens / max(area, biggest, 1e-30), proof=proof)
    if problem.objective == "joules_per_token":
        least = float((kept * problem.power[None, :]).min(axis=1) @ times)
        return Bound(score=least / problem.workload.tokens, proof="every node on the mesh where it takes least energy, transfers free")
    cheapest = float((kept * problem.price[None, :]).min(axis=1) @ times)
    return Bound(score=cheapest / problem.workload.tokens * 1e6, proof="every node on the mesh where it costs least, transfers free")


def _cycle(problem: Problem, inside: list[int], fastest: np.ndarray) -> float:
    """The longest path that closes through one carry: two trips in a row cannot start it closer together."""
    best, members = 0.0, set(inside)
    carries = [f for f in problem.flows if f.kind == "carry"]
    starts = {d for f in carries for d in f.dst}
    if len(inside) == 1:
        return float(fastest[inside[0]])
    for start in sorted(starts)[:8]:
        end: dict[int, float] = {start: float(fastest[start])}
        for n in inside:
            ready = [end[problem.flows[i].src] for i in problem.incoming[n]
                     if problem.flows[i].kind != "carry" and problem.flows[i].src in end and problem.flows[i].src in members]  # fmt: skip
            if ready and n != start:
                end[n] = max(ready) + float(fastest[n])
        best = max([best, *(end[f.src] for f in carries if start in f.dst and f.src in end)])
    return max(best, max((float(fastest[n]) for n in inside), default=0.0) if starts else 0.0)
