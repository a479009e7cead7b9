"""Lower bounds: what no placement can beat, each with the name of its proof.

All rest on two facts: a node takes at least its fastest mesh's seconds, and transfers, memory and contention only add.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from partition.arguments import checked
from partition.chain import reduced
from partition.cuts import two_kinds
from partition.evaluation import groups
from partition.paths import cycle_bound, longest, path_bound
from partition.problem import Placement, Problem


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """No feasible placement scores below `score` (as `Estimate.score`: throughput is negated); `proof` names why."""

    score: float
    proof: str

    def gap(self, reached: float) -> float:
        """How far the score may be from the best: the share of a time or of money that is too much, or of a rate that is missing; 0 where the bound is met."""
        whole = max(abs(reached), abs(self.score))
        return 0.0 if reached == self.score or whole == 0 else max(0.0, (reached - self.score) / whole) if math.isfinite(whole) else float("inf")

    def stronger(self, placement: Placement) -> Bound:
        """This bound, or what the policy of a placement proved, whichever leaves less open."""
        return self if placement.bound is None or placement.bound[0] <= self.score else Bound(score=placement.bound[0], proof=placement.bound[1])


def critical_path(problem: Problem, nodes: list[int]) -> float:
    """Longest path through nodes, each once and as fast as its fastest mesh, transfers free [s]; a node that never runs takes nothing."""
    fastest, chosen = np.where(problem.times > 0, problem.seconds.min(axis=1), 0.0), set(nodes)
    end: dict[int, float] = {}
    for n in nodes:
        ready = [end[problem.flows[i].src] for i in problem.incoming[n]
                 if problem.flows[i].kind != "carry" and problem.flows[i].src in chosen]  # fmt: skip
        end[n] = max(ready, default=0.0) + float(fastest[n])
    return max(end.values(), default=0.0)


@checked
def lower_bound(problem: Problem) -> Bound:
    """The best bound known for the problem's objective. Source: critical path and area bounds of list scheduling (Graham, 1969); `paths`."""
    before, inside, after = groups(problem)
    trips = problem.workload.trips if inside else 0
    if problem.ports is None and problem.objective in ("ttft", "tpot", "e2e"):
        first = path_bound(problem, longest(problem, before))
        cycle, body = _cycle(problem, inside) if trips > 1 else (0.0, ())
        if problem.objective == "ttft":
            return Bound(score=first, proof="longest path of prefill, with the crossings that memory forces")
        if problem.objective == "tpot":
            return Bound(score=cycle, proof="longest carry cycle of one trip, with the crossings that memory forces")
        head = longest(problem, before)[-1:]
        entered = bool(body) and any(f.src in head and f.kind == "handoff" and body[0] in f.dst for f in problem.flows)
        turns = cycle * max(0, trips - 1)
        whole = first + path_bound(problem, body) + turns if entered else max(first, turns)  # else the loop does not wait for that path
        return Bound(score=max(whole, critical_path(problem, before + inside + after)),
                     proof="longest path of prefill, then trips of the longest carry cycle, with the crossings that memory forces")  # fmt: skip
    if problem.objective in ("ttft", "tpot", "e2e"):
        return Bound(score=0.0 if problem.objective == "tpot" else critical_path(problem, list(range(len(problem)))), proof="critical path, each node on its fastest mesh")
    if problem.rates is not None:
        from partition.flood import capped

        return Bound(score=-capped(problem), proof="capped capacity of the machines")
    times = problem.times.astype(float)
    kept = problem.seconds / problem.depth[None, :]  # a batch keeps a mesh from others for no less than this of what it does there
    if problem.objective == "throughput":
        area, biggest = _area(dataclasses.replace(problem, seconds=kept))
        ways = {"area (linear program)": area, "biggest group on its fastest mesh": biggest, "minimum cuts between two kinds": two_kinds(problem)}
        proof = max(ways, key=lambda way: ways[way])
        return Bound(score=-problem.workload.tokens / max(ways[proof], 1e-30), proof=proof)
    if problem.objective == "joules_per_token":
        least = float(np.where(np.isfinite(kept), kept * problem.power[None, :], np.inf).min(axis=1) @ times)
        return Bound(score=least / problem.workload.tokens, proof="every node on the mesh where it takes least energy, transfers free")
    cheapest = float(np.where(np.isfinite(kept), kept * problem.price[None, :], np.inf).min(axis=1) @ times)
    return Bound(score=cheapest / problem.workload.tokens * 1e6, proof="every node on the mesh where it costs least, transfers free")


def _cycle(problem: Problem, inside: list[int]) -> tuple[float, tuple[int, ...]]:
    """(seconds, nodes) of the longest path that closes through one carry: two trips in a row cannot start it closer together."""
    carries = [f for f in problem.flows if f.kind == "carry"]
    best: tuple[float, tuple[int, ...]] = (0.0, ())
    for start in sorted({d for f in carries for d in f.dst})[:8]:
        ends = {f.src for f in carries if start in f.dst}
        last = [n for n in inside if n in ends]
        for end in last[-1:]:
            path = longest(problem, [n for n in inside if start <= n <= end], start)
            if path and path[-1] == end and path[0] == start:
                best = max(best, (cycle_bound(problem, path), path))
    alone = max(((float(problem.seconds[n].min()), (n,)) for n in inside), default=(0.0, ())) if carries else (0.0, ())
    return max(best, alone)


def _area(problem: Problem) -> tuple[float, float]:
    """(the least time in which meshes can do all work between them, parts of groups and memory allowed; the biggest group on its fastest mesh) [s].

    Source: the assignment relaxation of scheduling on unrelated machines (Lenstra, Shmoys and Tardos, 1990).
    """
    import scipy.optimize
    import scipy.sparse

    chain = reduced(problem, ordered=False)
    loads, counts = chain.work, np.array(chain.counts, float)
    biggest = max((float(row[np.isfinite(row)].min(initial=np.inf)) for row in loads), default=0.0)
    groups, width = loads.shape
    if not np.isfinite(biggest):  # no mesh can run some group
        return biggest, biggest
    able, scale = np.isfinite(loads), float(loads[np.isfinite(loads)].max(initial=0.0)) or 1.0
    index = np.arange(groups * width).reshape(groups, width)
    once = scipy.sparse.csr_matrix((np.ones(groups * width), (np.repeat(np.arange(groups), width), index.ravel())), shape=(groups, groups * width + 1))
    rows, limits = [], []
    for k in range(width):
        line = np.zeros(groups * width + 1)
        line[index[:, k]], line[-1] = np.where(able[:, k], loads[:, k], 0.0) / scale, -counts[k]
        rows.append(line)
        limits.append(0.0)
        if np.isfinite(room := chain.capacity[k] * counts[k]) and room > 0:
            line = np.zeros(groups * width + 1)
            line[index[:, k]] = chain.size[:, k] / room
            rows.append(line)
            limits.append(1.0)
    bounds = [(0.0, 1.0 if ok else 0.0) for ok in able.ravel()] + [(0.0, None)]
    found = scipy.optimize.linprog(np.eye(1, groups * width + 1, groups * width)[0], A_ub=np.array(rows), b_ub=limits, A_eq=once, b_eq=np.ones(groups), bounds=bounds, method="highs")
    least = np.where(able, loads, np.inf).min(axis=1).sum() / counts.sum()
    return max(float(least), float(found.fun) * scale * (1 - 1e-9)) if found.success else float(least), biggest
