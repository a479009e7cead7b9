"""What `single` and `phase_split` share: a run of nodes laid over meshes in order, as few meshes as hold it, evenly loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from partition.errors import InfeasibleError
from partition.phases import Phase
from partition.problem import Problem
from partition.units import size


def fill(problem: Problem, nodes: Sequence[int], meshes: Sequence[int], most: float) -> list[int] | None:
    """Mesh of each node, filling the meshes in order up to their capacity and up to `most` seconds each; None if they do not hold."""
    out, which = [], 0
    held, seconds, activation, seen = 0.0, 0.0, 0.0, set[int]()
    needs = problem.needs
    for n in nodes:
        while which < len(meshes):
            m = meshes[which]
            fresh = [r for r in needs[n] if r not in seen]
            more = held + float(sum(problem.resident[r, m] for r in fresh))
            peak = max(activation, float(problem.activation[n, m]))
            time = seconds + float(problem.seconds[n, m] * problem.times[n])
            if more + peak <= problem.capacity[m] and (time <= most or seconds == 0.0):
                held, activation, seconds = more, peak, time
                seen.update(fresh)
                out.append(m)
                break
            which, held, seconds, activation, seen = which + 1, 0.0, 0.0, 0.0, set()
        else:
            return None
    return out


def lay(problem: Problem, nodes: Sequence[int], meshes: Sequence[int]) -> dict[int, int]:
    """Lay nodes over the fewest leading meshes that hold them, the busiest as little busy as possible.

    Raises InfeasibleError.
    """
    if not nodes:
        return {}
    for used in range(1, len(meshes) + 1):
        if (best := fill(problem, nodes, meshes[:used], float("inf"))) is not None:
            low, high = 0.0, float(sum(problem.seconds[n, meshes[0]] * problem.times[n] for n in nodes))
            for _ in range(30 if used > 1 else 0):
                middle = (low + high) / 2
                tried = fill(problem, nodes, meshes[:used], middle)
                low, high, best = (low, middle, tried) if tried is not None else (middle, high, best)
            return dict(zip(nodes, best, strict=True))
    m = list(meshes)
    needed = float(sum(problem.resident[r, m[0]] for r in {r for n in nodes for r in problem.needs[n]}))
    room = float(problem.capacity[m].sum())
    alone = {n: sum(float(problem.resident[r, m[0]]) for r in problem.needs[n]) + float(problem.activation[n, m[0]]) for n in nodes}
    worst = max(nodes, key=lambda n: alone[n])
    over = alone[worst] - float(problem.capacity[m].max())
    why = f": {size(needed - room)} too much" if needed > room else " but not in whole nodes with their activations"
    if over > 0:
        why = f"; {problem.names[worst]} alone needs {size(alone[worst])} with its activations, {size(over)} more than one mesh holds"
    raise InfeasibleError(
        f"{len(nodes)} nodes need {size(needed)}, {len(m)} {problem.kinds[m[0]]} mesh{'es' * (len(m) > 1)} hold {size(room)}" + why,
        where=f"meshes {', '.join(problem.meshes[i] for i in m[:4])}{' ...' * (len(m) > 4)}",
        mend="use a larger cluster, a smaller batch or a shorter context",
    )  # fmt: skip


def finish(problem: Problem, placed: dict[int, int], fallback: int) -> list[int]:
    """Place what is left: work that precedes a placed reader goes to the reader, what follows a placed maker to the maker."""
    for n in reversed(range(len(problem))):
        if n not in placed:
            readers = [d for f in problem.flows if f.src == n and f.kind != "carry" for d in f.dst if d in placed]
            if readers:
                placed[n] = placed[readers[0]]
    for n in range(len(problem)):
        if n not in placed:
            makers = [problem.flows[i].src for i in problem.incoming[n] if problem.flows[i].src in placed]
            placed[n] = placed[makers[-1]] if makers else fallback
    return [placed[n] for n in range(len(problem))]


def together(problem: Problem, meshes: Sequence[int]) -> list[int]:
    """Both phases on the same meshes, as few as hold them: decode is laid out by layers, prefill joins the decode node whose weights it shares."""
    body = [n for n in problem.nodes(Phase.DECODE) if problem.region[n] == "body"]
    nodes = body or list(range(len(problem)))
    busiest = problem.activation[problem.nodes(Phase.PREFILL)].max(axis=0, initial=0.0)  # prefill will run beside decode
    roomy = dataclasses.replace(problem, activation=np.maximum(problem.activation, busiest[None, :]))
    return _joined(problem, lay(roomy, nodes, meshes), nodes, meshes[0])


def _joined(problem: Problem, placed: dict[int, int], nodes: Sequence[int], mesh: int) -> list[int]:
    if not nodes:
        return []
    last = placed[nodes[0]]
    shared = problem.incidence.astype(np.float64) * problem.resident[:, mesh][:, None]
    common = shared.T @ problem.incidence[:, list(nodes)].astype(np.float64)
    for n in problem.nodes(Phase.PREFILL):
        if common[n].max(initial=0.0) > 0:
            last = placed[nodes[int(common[n].argmax())]]
        placed[n] = last
    return finish(problem, placed, placed[nodes[-1]])


def of_kind(problem: Problem) -> dict[str, list[int]]:
    """Device kind -> its mesh numbers, in the problem's order."""
    kinds: dict[str, list[int]] = {}
    for m, kind in enumerate(problem.kinds):
        kinds.setdefault(kind, []).append(m)
    return kinds
