"""Problems made from a seed, for comparing policies: chains, series-parallel graphs, random layers, transformers; and suites that papers can cite.

A suite never changes: a test holds its digest. What is better comes under another name. Values pass through a host; a byte is a second.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from partition.errors import NameUnknownError
from partition.plain import plain
from partition.problem import Problem


def posed(seconds: np.ndarray, edges: Mapping[int, Sequence[int]], cost: np.ndarray, size: np.ndarray, counts: Sequence[int], room: float) -> Problem:
    """A problem of nodes in topological order. seconds [n, k] on each kind, edges: node -> readers, cost [n] of moving what a node makes, size [n]
    B, counts: meshes of each kind, room B of each."""
    seconds, cost, size = (np.round(a, 6) for a in (seconds, cost, size))  # the same on every processor
    columns = [k for k, count in enumerate(counts) for _ in range(count)]
    m = len(columns)
    return plain([f"node {i}" for i in range(len(seconds))], [f"kind{k}" for k in columns], seconds[:, columns], [(i, edges[i], float(cost[i])) for i in sorted(edges)], size,
                 np.full(m, room), price=np.ones(m), power=np.ones(m), ports=np.ones(m))  # fmt: skip


def _random(edges: Mapping[int, Sequence[int]], n: int, rng: np.random.Generator, counts: Sequence[int]) -> Problem:
    """Times within a factor of four, transfers a tenth of them, a second kind up to twice as slow or as fast, and room for twice all sizes."""
    base = np.exp(rng.uniform(-0.7, 0.7, n))
    seconds = np.stack([base, *(base * np.exp(rng.uniform(-0.7, 0.7, n)) for _ in counts[1:])], axis=1)
    size = rng.uniform(0, 1, n)
    return posed(seconds, edges, 0.1 * np.exp(rng.uniform(-1.5, 1.5, n)), size, counts, 2 * float(size.sum()) / sum(counts))


def chain(n: int, seed: int, counts: Sequence[int] = (4,)) -> Problem:
    """n nodes one after the other."""
    return _random({i: [i + 1] for i in range(n - 1)}, n, np.random.default_rng(seed), counts)


def series_parallel(n: int, seed: int, counts: Sequence[int] = (4,)) -> Problem:
    """Branches that part and meet, of two to four paths of one to four nodes, one such part after the other, until there are about n nodes."""
    rng, edges, last, count = np.random.default_rng(seed), dict[int, list[int]](), 0, 1
    while count < n:
        ends = []
        for _ in range(int(rng.integers(2, 5))):
            at = last
            for _ in range(int(rng.integers(1, 5))):
                edges.setdefault(at, []).append(count)
                at, count = count, count + 1
            ends.append(at)
        for end in ends:
            edges.setdefault(end, []).append(count)
        last, count = count, count + 1
    return _random(edges, count, rng, counts)


def layered(n: int, seed: int, counts: Sequence[int] = (4,), width: int = 4) -> Problem:
    """Layers of `width` nodes, each of which reads one to three of the layer before."""
    rng, edges = np.random.default_rng(seed), dict[int, list[int]]()
    for i in range(width, n):
        first = (i // width - 1) * width
        for s in rng.choice(width, size=min(width, int(rng.integers(1, 4))), replace=False):
            edges.setdefault(first + int(s), []).append(i)
    return _random(edges, n, rng, counts)


def transformer(layers: int, seed: int, counts: Sequence[int] = (4,)) -> Problem:
    """Layers of eight nodes: norm, three projections, attention, projection, and a gated MLP, with what passes them by added; tables that all layers read."""
    rng = np.random.default_rng(seed)
    n, edges = 2 + 8 * layers, dict[int, list[int]]()
    seconds, cost, size = np.zeros(n), np.zeros(n), np.zeros(n)
    seconds[0], cost[0], size[0], cost[1] = 0.02, 0.5, 4.0, 0.05  # embedding; table of positions
    stream = 0
    for layer in range(layers):
        norm, q, k, v, attend, out, up, down = (2 + 8 * layer + i for i in range(8))
        for s, d in ((norm, q), (norm, k), (norm, v), (q, attend), (k, attend), (v, attend), (attend, out), (stream, out), (out, up), (up, down), (out, down)):
            edges.setdefault(s, []).append(d)
        edges.setdefault(stream, []).append(norm)
        edges.setdefault(1, []).extend([q, k])
        for node, time, moved, held in ((norm, 0.02, 0.5, 0.0), (q, 0.3, 0.5, 1.0), (k, 0.08, 0.12, 0.25), (v, 0.08, 0.12, 0.25), (attend, 0.5, 0.5, 0.0),
                                        (out, 0.3, 0.5, 1.0), (up, 1.6, 1.75, 7.0), (down, 0.8, 0.5, 3.5)):  # fmt: skip
            seconds[node], cost[node], size[node] = time, moved, held
        stream = down
    kinds = np.stack([seconds, *(seconds * np.exp(rng.uniform(-0.5, 0.5, n)) for _ in counts[1:])], axis=1)
    return posed(kinds, edges, 0.2 * cost, size, counts, 2 * float(size.sum()) / sum(counts))


_MAKERS: dict[str, Callable[..., Problem]] = {"chain": chain, "series_parallel": series_parallel, "layered": layered, "transformer": transformer}

SUITES: dict[str, tuple[tuple[str, int, int, tuple[int, ...]], ...]] = {
    "v1": (
        *(("chain", n, seed, counts) for n, seed, counts in ((12, 1, (3,)), (100, 2, (4,)), (1000, 3, (4, 4)))),
        *(("series_parallel", n, seed, counts) for n, seed, counts in ((12, 4, (3,)), (60, 5, (4,)), (200, 6, (2, 2)))),
        *(("layered", n, seed, counts) for n, seed, counts in ((12, 7, (3,)), (60, 8, (4,)), (200, 9, (2, 2)))),
        *(("transformer", n, seed, counts) for n, seed, counts in ((2, 10, (3,)), (12, 11, (4,)), (80, 12, (4, 4)))),
    ),
}
"""Name of a suite -> (maker, size, seed, meshes of each kind) of its problems."""


def suite(name: str) -> dict[str, Problem]:
    """The problems of a suite by name. Raises NameUnknownError."""
    if name not in SUITES:
        raise NameUnknownError.among("suite", name, SUITES)
    return {f"{maker}-{n}-{'+'.join(map(str, counts))}": _MAKERS[maker](n, seed, counts) for maker, n, seed, counts in SUITES[name]}


def digest(problem: Problem) -> str:
    """What a problem is, in twelve digits: of all of its numbers and edges."""
    found = hashlib.sha256()
    for field in dataclasses.fields(problem):
        value = getattr(problem, field.name)
        if isinstance(value, np.ndarray):
            found.update(np.ascontiguousarray(value).tobytes())
    found.update(repr([(f.src, f.dst, f.nbytes, f.times, f.kind) for f in problem.flows]).encode())
    found.update(repr([(r.blocks, r.nbytes) for r in problem.residents]).encode())
    return found.hexdigest()[:12]
