"""What stages of the phases of a program cost, and the candidates that `order_dp` evaluates: phases apart on meshes of their own, or together.

The costs leave out what only a schedule tells (contention, overlap); so the few candidates that look best are evaluated, and the best is taken.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from partition.chain import Chain, reduced
from partition.errors import InfeasibleError
from partition.evaluation import evaluate, scored, verify
from partition.ideals import Found, best_stages
from partition.phases import Phase
from partition.policies._layers import finish
from partition.problem import Placement, Problem

Ends = Callable[[Chain], np.ndarray]
"""The ideals of a chain, bool [i, g], at which stages may end."""

_EVALUATED = 12
"""Candidates that are evaluated at most, in the order of their approximate values."""


def rates(problem: Problem) -> np.ndarray:
    """What a second on each mesh counts for in the problem's objective [m]: time itself, money or energy, over the batches under way."""
    per = {"usd_per_mtok": problem.price / problem.depth, "joules_per_token": problem.power / problem.depth, "throughput": 1 / problem.depth}
    found: np.ndarray = per.get(problem.objective, np.ones(len(problem.meshes)))
    return found


def weighted(problem: Problem) -> Problem:
    """The problem with nodes that count as much as their phase does in its objective: the times to the first token leave decode out, and so on."""
    factor = np.ones(len(problem))
    if problem.objective in ("ttft", "tpot"):
        other = Phase.DECODE if problem.objective == "ttft" else Phase.PREFILL
        factor[[n for n, p in enumerate(problem.phase) if p is other]] = 1e-6  # what does not count is still laid out well
    return dataclasses.replace(problem, seconds=problem.seconds * rates(problem)[None, :] * factor[:, None])


def crossing(chain: Chain, members: np.ndarray) -> np.ndarray:
    """Seconds [i, k, k] that passing from a stage of one kind to the next adds where the groups of ideal i stand before it."""
    problem = chain.problem
    live, many = np.zeros(len(members)), np.zeros(len(members))
    for c in chain.crossings:
        alive = members[:, c.src] & ~members[:, c.dst].all(axis=1)
        live += alive * c.cost
        many = np.maximum(many, alive * max(problem.times[n] for n in chain.groups[c.src]))
    timed = problem.objective not in ("usd_per_mtok", "joules_per_token")
    out = np.zeros((len(members), len(chain.kinds), len(chain.kinds)))
    for (a, ms), (b, others) in itertools.product(enumerate(chain.kinds), repeat=2):
        pairs = [(m, o) for m in ms for o in others if m != o]
        best = max(pairs, key=lambda p: problem.beta[p], default=None)
        if best is None or problem.beta[best] <= 0:
            out[:, a, b] = np.inf
            continue
        alpha = 0.0 if problem.objective == "throughput" else problem.alpha[best]  # a link is a stage of its own
        out[:, a, b] = (many * alpha + live / problem.beta[best]) * (1.0 if timed else 1e-9)
    out[~members.any(axis=1) | members.all(axis=1)] = 0.0
    return out


def solved(problem: Problem, nodes: Sequence[int], ends: Ends) -> tuple[Chain, Found] | None:
    """The best stages of some nodes on any numbers of meshes that end where `ends` says."""
    worst = problem.activation[list(nodes)].max(axis=0, initial=0.0)
    chain = reduced(problem, nodes)
    chain = dataclasses.replace(chain, capacity=chain.capacity - worst[[ms[0] for ms in chain.kinds]])
    members = ends(chain)
    found = best_stages(chain, members, goal="longest" if problem.objective == "throughput" else "sum", cross=crossing(chain, members))
    return None if found is None else (chain, found)


def apart(problem: Problem, prefill: Sequence[int], decode: Sequence[int], ends: Ends) -> Iterator[tuple[float, dict[int, int]]]:
    """(approximate value, mesh of each node) of placements with each phase on meshes of its own."""
    first, second = solved(problem, prefill, ends), solved(problem, decode, ends)
    if first is None or second is None:
        return
    (chain, early), (other, late) = first, second
    counts, join = np.array(chain.counts), max if problem.objective == "throughput" else sum
    ways = [(join((early.values[a], late.values[b])), a, b) for a in early.values for b in late.values
            if (np.add(a, b) <= counts).all() and np.isfinite(early.values[a]) and np.isfinite(late.values[b])]  # fmt: skip
    for value, a, b in sorted(ways, key=lambda w: (w[0], sum(w[1]) + sum(w[2]), w[1:]))[:_EVALUATED]:
        early_stages, late_stages = early.trace(a), late.trace(b)
        taken = [sum(kind == k for kind, _ in early_stages) for k in range(len(counts))]
        yield value, chain.laid(early_stages) | other.laid(late_stages, taken)


def together(problem: Problem, prefill: Sequence[int], decode: Sequence[int], ends: Ends) -> Iterator[tuple[float, dict[int, int]]]:
    """The same, with each node of prefill on the mesh of the node of decode whose weights it shares."""
    shared = problem.incidence.astype(float) * problem.resident.min(axis=1, initial=np.inf)[:, None]
    common = shared[:, list(prefill)].T @ problem.incidence[:, list(decode)].astype(float)
    pairs = []
    for i, n in enumerate(prefill):
        if (most := common[i].max(initial=0.0)) > 0:
            alike = np.nonzero(common[i] >= most)[0]
            near = alike[np.abs(alike / len(decode) - i / len(prefill)).argmin()]  # a table that is used at both ends pairs the near ones
            pairs.append((n, decode[int(near)]))
    tied = dataclasses.replace(problem, together=(*problem.together, *pairs))
    made = solved(tied, sorted({*prefill, *decode}), ends)
    if made is None:
        return
    chain, found = made
    for state, value in sorted(found.values.items(), key=lambda item: (item[1], sum(item[0]), item[0]))[:_EVALUATED]:
        if np.isfinite(value):
            yield value, chain.laid(found.trace(state))


def best_of(problem: Problem, ends: Ends) -> Placement | None:
    """The best evaluated candidate whose stages end where `ends` says; None where none is feasible."""
    prefill, decode = problem.nodes(Phase.PREFILL), problem.nodes(Phase.DECODE)
    decode = [n for n in decode if problem.region[n] == "body"] or decode
    cheap = weighted(problem)
    if prefill and decode:
        found = [*apart(cheap, prefill, decode, ends), *together(cheap, prefill, decode, ends)]
    else:  # a program of one phase
        made = solved(cheap, range(len(problem)), ends)
        found = [] if made is None else [(value, made[0].laid(made[1].trace(state))) for state, value in made[1].values.items() if np.isfinite(value)]
    best: tuple[float, Placement] | None = None
    near = float("inf")
    for value, placed in sorted(found, key=lambda f: f[0])[: 2 * _EVALUATED]:
        if value > 1.25 * near and problem.objective in ("ttft", "tpot", "e2e"):  # too far from what the best seemed to be
            break
        try:
            placement = verify(problem, problem.placement(finish(problem, dict(placed), next(iter(placed.values())))))
        except InfeasibleError:
            continue
        score = scored(problem, evaluate(problem, placement))
        if best is None or score < best[0]:
            best, near = (score, placement), value
    return None if best is None else best[1]
