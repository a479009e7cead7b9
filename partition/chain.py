"""A problem as ordered stages see it: groups of nodes that stay together, what must precede what, kinds of alike meshes, tensors that cross.

A placement in ordered stages gives each mesh a run of the groups: everything that a stage needs is in it or in a stage before. `reduced`
makes groups of what a placement must keep together (colocations, cycles among them), and merges further ones where that loses no optimum.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from partition.problem import Placement, Problem


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """A value of group `src` that groups `dst` read. A stage pays `cost` [B] where it makes it for another, and where it reads it from one."""

    src: int
    dst: tuple[int, ...]
    cost: float

    @property
    def ends(self) -> tuple[int, ...]:
        """Its groups, the source first."""
        return (self.src, *self.dst)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """g groups, k kinds of meshes.

    groups: the nodes of each, in an order that keeps `before` [g] (the groups that must stand no later). kinds: the meshes of each kind.
    work [g, k] s. size [g, k] B of residents that no other group has; shared: (groups, bytes [k]) of those that several need. capacity [k] B.
    port [k] s/B: what a stage waits for a byte that it takes in or gives out; 0 where nothing waits. ordered: whether
    stages must be in an order.
    """

    problem: Problem
    groups: tuple[tuple[int, ...], ...]
    before: tuple[frozenset[int], ...]
    kinds: tuple[tuple[int, ...], ...]
    work: np.ndarray
    size: np.ndarray
    shared: tuple[tuple[tuple[int, ...], np.ndarray], ...]
    capacity: np.ndarray
    port: np.ndarray
    crossings: tuple[Crossing, ...]
    ordered: bool = True

    def __len__(self) -> int:
        return len(self.groups)

    @functools.cached_property
    def after(self) -> tuple[frozenset[int], ...]:
        """The groups that must stand no earlier, by group."""
        found: list[set[int]] = [set() for _ in self.groups]
        for g, earlier in enumerate(self.before):
            for e in earlier:
                found[e].add(g)
        return tuple(map(frozenset, found))

    @property
    def counts(self) -> tuple[int, ...]:
        """Meshes of each kind."""
        return tuple(map(len, self.kinds))

    @property
    def most(self) -> float:
        """What no longest load is longer than [s]: all work on the slowest kind that is able, and all that crosses given out and taken in."""
        return float(np.where(np.isfinite(self.work), self.work, 0.0).max(axis=1).sum()) + 2 * sum(c.cost for c in self.crossings) * float(self.port.max())

    def laid(self, stages: Iterable[tuple[int, Iterable[int]]], taken: Sequence[int] | None = None) -> dict[int, int]:
        """Mesh of each node of stages, each a kind and its groups; a stage takes the next mesh of its kind after those `taken` [k]."""
        used, found = list(taken or [0] * len(self.kinds)), dict[int, int]()
        for kind, groups in stages:
            found |= {n: self.kinds[kind][used[kind]] for g in groups for n in self.groups[g]}
            used[kind] += 1
        return found

    def placed(self, stages: Iterable[tuple[int, Iterable[int]]]) -> Placement:
        """The placement of stages that hold all nodes."""
        found = self.laid(stages)
        return self.problem.placement([found[n] for n in range(len(self.problem))])


def kinds(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Meshes that are alike in all that a stage sees of them, in the problem's order."""
    found: dict[bytes, list[int]] = {}
    for m in range(len(problem.meshes)):
        one = [problem.seconds[:, m], problem.resident[:, m], problem.activation[:, m], problem.capacity[m : m + 1], problem.price[m : m + 1], problem.power[m : m + 1], problem.depth[m : m + 1]]
        one += [np.array([float(m)])] if m in problem.pins.values() else []  # a mesh that is named is a kind of its own
        one += [problem.ports[m : m + 1]] if problem.ports is not None else [_links(problem, m)]
        found.setdefault(problem.kinds[m].encode() + np.concatenate(one).tobytes(), []).append(m)
    return tuple(map(tuple, found.values()))


def _links(problem: Problem, m: int) -> np.ndarray:
    """The links of a mesh to meshes of each device, as numbers."""
    names = np.array(problem.kinds)
    return np.concatenate([np.sort(np.delete(table[m], m)[np.delete(names, m) == name]) for name in sorted(set(problem.kinds)) for table in (problem.alpha, problem.beta)])


def reduced(problem: Problem, nodes: Iterable[int] | None = None, *, best: float = float("inf"), roomy: bool = False, ordered: bool = True) -> Chain:
    """The groups of some nodes (all, unless told) for ordered stages.

    best [s]: the longest stage of a placement that is known; where it is finite, groups are merged further that no better placement needs apart.
    roomy: merge as if memory never mattered, which may lose the best. ordered: whether stages must be in an order; else groups may go anywhere,
    and hold what must share a mesh and no more. O(nodes + edges) but for the merging, which is that for each turn.
    """
    chosen = sorted(range(len(problem)) if nodes is None else nodes)
    made = _grouped(problem, chosen, ordered)
    while np.isfinite(best) and (pairs := _dominated(made, best, roomy)):
        made = _merged(made, pairs)
    return made


def _grouped(problem: Problem, nodes: Sequence[int], ordered: bool) -> Chain:
    import networkx as nx

    inside = set(nodes)
    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from(nodes)
    order.add_edges_from((a, b) for a, b in problem.precedes if ordered and a in inside and b in inside)
    for group in problem.together:
        nx.add_cycle(order, [n for n in group if n in inside])
    condensed = nx.condensation(order)
    members = {c: sorted(condensed.nodes[c]["members"]) for c in condensed}
    sequence = list(nx.lexicographical_topological_sort(condensed, key=lambda c: members[c][0]))
    place = {c: i for i, c in enumerate(sequence)}
    before = tuple(frozenset(place[p] for p in condensed.predecessors(c)) for c in sequence)
    return dataclasses.replace(_chain(problem, tuple(tuple(members[c]) for c in sequence), before), ordered=ordered)


def _chain(problem: Problem, groups: tuple[tuple[int, ...], ...], before: tuple[frozenset[int], ...]) -> Chain:
    alike = kinds(problem)
    first = [ms[0] for ms in alike]
    of = {n: g for g, nodes in enumerate(groups) for n in nodes}
    able = np.isfinite(problem.seconds[:, first])
    for n, m in problem.pins.items():
        able[n] &= [m in ms for ms in alike]
    weight = np.where(able, np.where(able, problem.seconds[:, first], 0.0) * problem.times[:, None], np.inf)
    work = np.array([weight[list(nodes)].sum(axis=0) for nodes in groups]).reshape(len(groups), len(first))
    shared: dict[tuple[int, ...], np.ndarray] = {}
    size = np.zeros((len(groups), len(first)))
    for r, resident in enumerate(problem.residents):
        users = tuple(sorted({of[n] for n in resident.blocks if n in of}))
        if len(users) == 1:
            size[users[0]] += problem.resident[r, first]
        elif users:
            shared[users] = shared.get(users, np.zeros(len(first))) + problem.resident[r, first]
    costs: dict[tuple[int, tuple[int, ...]], float] = {}
    for f in problem.flows:
        if f.src in of and (dst := tuple(sorted({of[d] for d in f.dst if d in of} - {of[f.src]}))):
            costs[of[f.src], dst] = costs.get((of[f.src], dst), 0.0) + f.nbytes * f.times
    port = problem.ports[first] if problem.ports is not None else np.zeros(len(first))
    return Chain(problem=problem, groups=groups, before=before, kinds=alike, work=work, size=size, shared=tuple(shared.items()), capacity=problem.capacity[first],
                 port=port, crossings=tuple(Crossing(src=s, dst=d, cost=c) for (s, d), c in sorted(costs.items())))  # fmt: skip


def _dominated(chain: Chain, best: float, roomy: bool) -> dict[int, int]:
    """Group -> the neighbour that it may join without loss: cutting between them costs a stage no less than having the group would.

    An exchange argument: a group whose only predecessor is u (or only successor) may move to u's stage. What the two share, also with others,
    then costs no stage more; so both pay no more where what only the two share costs at least the group's work and all that it shares with
    others alone. Kinds on which u alone takes longer than `best` are out.
    """
    roomy = roomy or bool((chain.size.sum(axis=0) + sum((b for _, b in chain.shared), np.zeros(len(chain.kinds))) <= chain.capacity).all())
    touching: list[list[Crossing]] = [[] for _ in chain.groups]
    for c in chain.crossings:
        for g in set(c.ends):
            touching[g].append(c)
    bound = {g for users, _ in chain.shared for g in users}
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for v in range(len(chain)):
        ways = [w for w in (chain.before[v], chain.after[v]) if len(w) == 1] if chain.ordered else [{g for c in touching[v] for g in c.ends} - {v}]
        for u in sorted({u for way in ways for u in way}):
            if v in taken or u in taken or not (roomy or (not chain.size[v].any() and v not in bound)):
                continue
            own = sum(c.cost for c in touching[v] if set(c.ends) == {u, v})
            other = sum(c.cost for c in touching[v] if u not in c.ends)
            able = chain.work[u] <= best
            if other <= own and (chain.port * (own - other) >= chain.work[v])[able].all():
                pairs[v] = u
                taken |= {u, v}
    return pairs


def _merged(chain: Chain, pairs: dict[int, int]) -> Chain:
    """The chain with each group of `pairs` in that of its neighbour."""
    import networkx as nx

    runs: dict[int, list[int]] = {}
    for g in range(len(chain)):
        runs.setdefault(pairs.get(g, g), []).append(g)
    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from(runs)
    order.add_edges_from((pairs.get(b, b), u) for u, run in runs.items() for g in run for b in chain.before[g] if pairs.get(b, b) != u)
    return joined(chain, [runs[u] for u in nx.lexicographical_topological_sort(order)])


def joined(chain: Chain, runs: Sequence[Sequence[int]]) -> Chain:
    """The chain with each run of its groups as one, in the order of the runs, which must keep `before`."""
    of = {g: i for i, run in enumerate(runs) for g in run}
    before = tuple(frozenset({of[b] for g in run for b in chain.before[g]} - {i}) for i, run in enumerate(runs))
    made = _chain(chain.problem, tuple(tuple(sorted(n for g in run for n in chain.groups[g])) for run in runs), before)
    return dataclasses.replace(made, ordered=chain.ordered)
