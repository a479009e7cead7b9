"""How long a path of nodes takes at least: each on some mesh, what crosses between meshes, and crossings that full memories force.

A path runs node after node wherever its nodes stand. Seconds on the mesh of each, and of each transfer between two that are apart, are exactly
what a schedule pays at least; the cheapest of all such walks is a shortest path over kinds of meshes. Memory adds to it: weights that need
several meshes of a kind are entered on each of these, so a byte counts its share of one entry.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from partition.chain import kinds
from partition.phases import Phase
from partition.problem import Problem


def longest(problem: Problem, nodes: Sequence[int], start: int | None = None) -> tuple[int, ...]:
    """The nodes of the longest path, each as fast as its fastest mesh; from `start`, where one is given. Nodes of both phases are left out."""
    fastest, end, came = problem.seconds.min(axis=1), dict[int, float](), dict[int, int]()
    for n in nodes:
        if problem.phase[n] is Phase.BOTH:
            continue
        ready = [(end[f.src], f.src) for f in (problem.flows[i] for i in problem.incoming[n]) if f.kind != "carry" and f.src in end]
        if start is not None and n != start and not ready:
            continue
        before = max(ready, default=(0.0, -1))
        end[n], came[n] = before[0] + float(fastest[n]), before[1]
    if not end:
        return ()
    path = [max(end, key=lambda n: (end[n], -n))]
    while came[path[-1]] >= 0:
        path.append(came[path[-1]])
    return tuple(reversed(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
    """A path seen by kinds: seconds [i, k] of its nodes; full [i, k], the share of a mesh that their weights fill; hops [i, k, k] s between node i and the
    next (the diagonal stays); entry [k] s, the least from a mesh of a kind to another of it; single [k] s, all on one mesh of a kind, inf where it does not fit."""

    seconds: np.ndarray
    full: np.ndarray
    hops: np.ndarray
    entry: np.ndarray
    single: np.ndarray

    def shortest(self, share: float, cyclic: bool) -> float:
        """The least that the path takes where full meshes are entered once each, at a share of the least that this takes.

        Of the entries of a kind some come from other kinds, and are paid in the hops already. Not counting those twice is a bound for every share from
        0 to 1: with the whole of it, coming from elsewhere may seem a gain.
        """
        kinds, entry = range(len(self.entry)), share * self.entry
        hops, seconds = self.hops - entry[None, None, :], self.seconds + entry * self.full
        hops[:, kinds, kinds] = 0.0
        value = np.full((len(entry), len(entry)), np.inf)  # [kind of the first node, kind of this one]
        value[kinds, kinds] = seconds[0]
        for hop, second in zip(hops, seconds[1:], strict=False):
            value = (value[:, :, None] + hop).min(axis=1) + second
        return float((value + hops[-1].T if cyclic else value - entry[:, None]).min())  # a path that ends does not enter its first mesh


_SHARES = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
"""Shares of an entry that are tried; each gives a bound."""


def _walk(problem: Problem, path: Sequence[int], cyclic: bool) -> _Walk:
    alike = kinds(problem)
    first = [ms[0] for ms in alike]
    seconds = problem.seconds[np.ix_(list(path), first)]
    pairs = [*itertools.pairwise(path)] + ([(path[-1], path[0])] if cyclic else [])
    alpha, rate = np.full((len(alike), len(alike)), np.inf), np.full((len(alike), len(alike)), np.inf)
    for a, ms in enumerate(alike):
        for b, others in enumerate(alike):
            joined = [(m, o) for m in ms for o in others if m != o and problem.beta[m, o] > 0]
            if joined:
                alpha[a, b] = min(problem.alpha[p] for p in joined)
                rate[a, b] = min(1 / problem.beta[p] for p in joined)
    moved = np.zeros(len(pairs))
    for i, (u, v) in enumerate(pairs):
        kind = "carry" if cyclic and i == len(path) - 1 else "forward"
        moved[i] = max((f.nbytes for f in (problem.flows[j] for j in problem.incoming[v]) if f.src == u and f.kind == kind), default=0.0)
    apart = alpha[None] + np.where(moved[:, None, None] > 0, moved[:, None, None] * rate[None], 0.0)
    entry = apart[:, range(len(alike)), range(len(alike))].min(axis=0) if len(apart) else np.zeros(len(alike))
    entry = np.where(np.isfinite(entry), entry, 0.0)
    nbytes, seen = np.zeros((len(path), len(alike))), set[int]()
    for i, n in enumerate(path):
        fresh = [r for r in problem.needs[n] if r not in seen]
        seen.update(fresh)
        nbytes[i] = problem.resident[fresh][:, first].sum(axis=0)
    room = problem.capacity[first]
    single = np.where(nbytes.sum(axis=0) <= room, seconds.sum(axis=0), np.inf)
    apart[:, range(len(alike)), range(len(alike))] = 0.0
    return _Walk(seconds=seconds, full=nbytes / room, hops=apart, entry=entry, single=single)


def path_bound(problem: Problem, path: Sequence[int]) -> float:
    """Seconds that a path takes at least."""
    if not path:
        return 0.0
    w = _walk(problem, path, False)
    return max(0.0, *(w.shortest(share, False) for share in _SHARES))


def cycle_bound(problem: Problem, path: Sequence[int]) -> float:
    """Seconds that one round of a path takes at least whose end is carried to its begin: on one mesh, or through as many as memory asks for."""
    if not path:
        return 0.0
    w = _walk(problem, path, True)
    return min(max(0.0, *(w.shortest(share, True) for share in _SHARES)), float(w.single.min()))
