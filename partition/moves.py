"""A placement that changes one node at a time: its loads, transfers and memory are counted anew only where a move changes them.

For the objectives that are sums and longest loads (throughput, money, energy) a move costs what the moved node touches, not the whole problem. Times
to tokens come from a schedule in which everything later may shift; they are `evaluate`'s.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable

import numpy as np

from partition.arguments import checked
from partition.errors import PlacementError
from partition.flow import by_value
from partition.phases import Phase
from partition.problem import Placement, Problem

LOADS = ("throughput", "usd_per_mtok", "joules_per_token")
"""The objectives that moves are counted for."""


class Moves:
    """`moves = Moves(placement); moves.move(node, mesh); moves.score("throughput")`: what `evaluate` gives, up to the rounding of sums that change.

    A problem of machines with rates or of a host is refused, as are groups, pins, limits and orders: those are the caller's to keep (`verify`
    holds them). Raises PlacementError.
    """

    @checked
    def __init__(self, placement: Placement):
        if (problem := placement.problem) is None or problem.rates is not None or problem.ports is not None:
            raise PlacementError("moves are counted for placements over links", where="Moves(placement)", mend="give a placement of a problem that was posed on a cluster")
        self.p: Problem = problem
        self.seconds = (problem.seconds * problem.times[:, None]).tolist()
        self.resident, self.activation = problem.resident.tolist(), problem.activation.tolist()
        self.beta, self.wire, self.link_price = problem.beta.tolist(), problem.wire.tolist(), problem.link_price.tolist()
        m = len(problem.meshes)
        layers = int(problem.layer.max(initial=-1)) + 1
        self.column = [int(x) if x >= 0 else layers + n for n, x in enumerate(problem.layer)]
        self.parts = np.zeros((m, layers + len(problem)))  # seconds by layer, and of nodes that are of none
        self.busy, self.money = [0.0] * m, 0.0
        self.held = [[0.0, 0.0] for _ in range(m)]  # B of weights, and of what one batch holds
        self.users = [[0] * m for _ in problem.residents]
        self.alive: list[list[float]] = [[] for _ in range(m)]  # activations of the nodes of each mesh, in order
        self.links: dict[tuple[int, int], float] = {}
        self.ports = [0.0] * m
        self.impossible = 0  # transfers without a link, nodes on meshes that cannot run them
        self.values = by_value(problem.flows)
        self.touching: list[list[int]] = [[] for _ in problem.names]
        self.feeds: list[set[int]] = [set() for _ in problem.names]  # nodes of both phases that a node reads
        for v, flows in enumerate(self.values):
            src = problem.flows[flows[0]].src
            for n in sorted({src, *itertools.chain(*(problem.flows[i].dst for i in flows))}):
                self.touching[n].append(v)
                if n != src and problem.phase[src] is Phase.BOTH:
                    self.feeds[n].add(src)
        self.readers = [sorted({d for v in self.touching[n] for i in self.values[v] if problem.flows[i].src == n for d in problem.flows[i].dst}) for n in range(len(problem))]
        self.on: list[tuple[int, ...]] = [()] * len(problem)
        for n in range(len(problem)):
            self._lie(n, placement.of(n))
        for v in range(len(self.values)):
            self._pass(v, 1)

    def move(self, node: int, mesh: int) -> None:
        """Put a node on a mesh; what both phases need follows its readers. Raises PlacementError for a node or a mesh that there is not."""
        if not (0 <= node < len(self.p) and 0 <= mesh < len(self.p.meshes)):
            raise PlacementError(f"node {node} cannot move to mesh {mesh}", where="Moves.move", mend=f"nodes run from 0 to {len(self.p) - 1}, meshes to {len(self.p.meshes) - 1}")
        self._shift(node, (mesh,))

    def _shift(self, n: int, to: tuple[int, ...]) -> None:
        if self.p.phase[n] is Phase.BOTH and self.readers[n]:
            to = tuple(sorted({m for d in self.readers[n] for m in self.on[d]}))
        if to == self.on[n]:
            return
        for v in self.touching[n]:
            self._pass(v, -1)
        self._lie(n, to)
        for v in self.touching[n]:
            self._pass(v, 1)
        for source in sorted(self.feeds[n], reverse=True):
            self._shift(source, ())

    def _lie(self, n: int, to: Iterable[int]) -> None:
        """Take a node from where it lies and lay it on meshes."""
        for sign, meshes in ((-1, self.on[n]), (1, tuple(to))):
            for m in meshes:
                took = self.seconds[n][m]
                if not math.isfinite(took):
                    self.impossible, took = self.impossible + sign, 0.0
                self.busy[m] += sign * took
                self.parts[m, self.column[n]] += sign * took
                for r in self.p.needs[n]:
                    self.users[r][m] += sign
                    if self.users[r][m] == (1 if sign > 0 else 0):
                        self.held[m][self.p.residents[r].kind != "weights"] += sign * self.resident[r][m]
                if sign > 0:
                    bisect.insort(self.alive[m], self.activation[n][m])
                else:
                    del self.alive[m][bisect.bisect_left(self.alive[m], self.activation[n][m])]
        self.on[n] = tuple(to)

    def _pass(self, v: int, sign: int) -> None:
        """Count the transfers of a value in or out: once for each mesh that takes it in, as often as what reads it there most often."""
        flows = [self.p.flows[i] for i in self.values[v]]
        home, often = self.on[flows[0].src], dict[int, float]()
        for f in flows:
            for d in f.dst:
                for m in self.on[d]:
                    if m not in home and often.get(m, -1.0) < f.nbytes * f.times:
                        often[m] = f.nbytes * f.times
        for m, moved in often.items():
            a = home[0]
            if not self.beta[a][m] > 0:
                self.impossible += sign
                continue
            self.links[a, m] = self.links.get((a, m), 0.0) + sign * moved / self.beta[a][m]
            self.ports[a] += sign * moved / self.wire[a][m] if self.wire[a][m] > 0 else 0.0
            self.money += sign * moved * self.link_price[a][m]

    def memory(self) -> list[float]:
        """Bytes on each mesh [m]."""
        return [weights + batch + (alive[-1] if alive else 0.0) for (weights, batch), alive in zip(self.held, self.alive, strict=True)]

    def score(self, objective: str | None = None) -> float:
        """What a policy minimises, of LOADS; inf where a mesh cannot hold its nodes or run them, or a link is missing. objective: the problem's own, unless told."""
        wanted, p = objective or self.p.objective, self.p
        if wanted not in LOADS:
            raise PlacementError(f"moves are not counted for {wanted}", where="Moves.score", mend=f"ask for {', '.join(LOADS)}, or evaluate the placement")
        if self.impossible or any(x > room for x, room in zip(self.memory(), p.capacity, strict=True)):
            return float("inf")
        occupied = list(self.busy)
        for m, depth in enumerate(p.depth):
            if depth > 1:
                weights, batch = self.held[m]
                room = np.floor((p.capacity[m] - weights) / max(batch + (self.alive[m][-1] if self.alive[m] else 0.0), 1.0))
                occupied[m] = max(float(self.parts[m].max()), self.busy[m] / max(1.0, min(depth, room)))
        if wanted == "throughput":
            longest = max(*occupied, *self.ports, *self.links.values(), 0.0)
            return -p.workload.tokens / longest if longest > 0 else float("inf")
        if wanted == "joules_per_token":
            return sum(x * float(w) for x, w in zip(occupied, p.power, strict=True)) / p.workload.tokens
        return (sum(x * float(w) for x, w in zip(occupied, p.price, strict=True)) + self.money) / p.workload.tokens * 1e6

    def placement(self) -> Placement:
        """The placement as it stands."""
        return self.p.placement([on[0] for on in self.on])
