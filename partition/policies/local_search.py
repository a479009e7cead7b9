"""local_search: what single moves, moves of runs and moves by chance make of the best placement that the quick policies find."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from partition.batch import Batch
from partition.chain import reduced
from partition.errors import PartitionError
from partition.evaluation import evaluate, scored, verify
from partition.policies._annealing import Walks
from partition.policies.cover import cover
from partition.policies.heft import heft
from partition.policies.kind_cut import kind_cut
from partition.policies.order_dp import order_dp
from partition.policies.phase_split import phase_split
from partition.policies.single import single
from partition.problem import Placement, Problem

_TRIED = 192
"""Moves that are evaluated at once."""


def local_search(problem: Problem, *, start: Placement | None = None, seed: int = 0, rounds: int = 60) -> Placement:
    """Improve the best of `order_dp`, `heft`, `kind_cut`, `phase_split` and `single` (or `start`).

    Where values pass through a host and the longest load counts, by annealing; else each round tries 192 moves of nodes, runs of nodes and layers and
    takes the best, while one of the last rounds found any. O(rounds x moves x n) time. Raises what the quick policies raise where none of them finds a placement.
    """
    if problem.rates is not None:
        return start if start is not None else cover(problem, seed=seed)
    best = start if start is not None else seeded(problem)
    if problem.contiguous:
        return best
    if problem.ports is not None and problem.objective == "throughput":
        return _annealed(problem, best, seed)
    return _climbed(problem, best, seed, rounds)


def seeded(problem: Problem) -> Placement:
    """The best placement of the quick policies, for the objective and for each that is limited; raises what the first of them raised where none has any."""
    found, why, free = list[tuple[float, int, Placement]](), None, dataclasses.replace(problem, limits={})
    for objective in dict.fromkeys((problem.objective, *problem.limits)):
        for policy in (order_dp, heft, kind_cut, phase_split, single):
            try:
                placement = verify(free, policy(dataclasses.replace(free, objective=objective)))
            except PartitionError as error:
                why = why or error
                continue
            placement = dataclasses.replace(placement, problem=problem, bound=None)
            found.append((scored(problem, evaluate(problem, placement)), len(found), placement))
    if not found:
        assert why is not None
        raise why
    return min(found, key=lambda f: f[:2])[2]


def _annealed(problem: Problem, start: Placement, seed: int) -> Placement:
    chain = reduced(problem, best=float(max(evaluate(problem, start).occupied)), ordered=False)
    at = np.array([start.mesh[nodes[0]] for nodes in chain.groups])
    steps = min(8000, 300 * len(chain))
    for turn, (warm, cold) in enumerate(((0.05, 2e-4), (4e-3, 2e-5))):
        at = Walks(chain, at, seed + turn).cool(steps, warm, cold)
    mesh = np.zeros(len(problem), np.int64)
    for g, nodes in enumerate(chain.groups):
        mesh[list(nodes)] = at[g]
    return _better(problem, start, problem.placement(mesh))


def _better(problem: Problem, one: Placement, other: Placement) -> Placement:
    """The second, where it is feasible and better."""
    try:
        verify(dataclasses.replace(problem, limits={}), other)
    except PartitionError:
        return one
    return min((one, other), key=lambda p: scored(problem, evaluate(problem, p)))


def _climbed(problem: Problem, start: Placement, seed: int, rounds: int) -> Placement:
    rng, batch = np.random.default_rng(seed), Batch(problem)
    units = [list(nodes) for nodes in reduced(problem, ordered=False).groups if not problem.pins.keys() & set(nodes)]
    at = start.mesh.copy()
    patience = 10 if len(problem) < 600 else 3
    score, idle = float(batch.scores(at[None, :])[0]), 0
    for _ in range(rounds):
        tried = np.stack([_moved(at, units, problem, rng) for _ in range(_TRIED)])
        scores = batch.scores(tried)
        i = int(scores.argmin())
        if scores[i] < score * (1 - 1e-9 * np.sign(score)):
            at, score, idle = tried[i], float(scores[i]), 0
        else:
            idle += 1
            if idle == patience:
                break
    return _better(problem, start, problem.placement(at))


def _moved(at: np.ndarray, units: Sequence[list[int]], problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """The placement with one unit, a run of units, or one layer on another mesh, mostly that of a neighbour."""
    new, i = at.copy(), int(rng.integers(len(units)))
    kind = rng.random()
    nodes = units[i]
    if kind < 0.4:
        end = min(len(units), i + 1 + int(rng.integers(1, max(2, len(units) // 8))))
        nodes = [n for unit in units[i:end] for n in unit]
    elif kind < 0.6 and problem.layer[nodes[0]] >= 0:
        nodes = np.nonzero(problem.layer == problem.layer[nodes[0]])[0].tolist()
    near = [int(at[problem.flows[f].src]) for f in problem.incoming[nodes[0]]] + [int(at[min(nodes[-1] + 1, len(at) - 1)]), int(at[max(nodes[0] - 1, 0)])]
    others = [m for m in near if m != at[nodes[0]]]
    new[nodes] = others[int(rng.integers(len(others)))] if others and rng.random() < 0.7 else int(rng.integers(len(problem.meshes)))
    return new
