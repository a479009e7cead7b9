"""Many placements of one problem evaluated at once, as arrays: what `evaluate` gives for each, in a small part of its time.

Nothing is approximated but the latency through a host, for which the sum of all loads stands; a test holds the two together. Nodes that both phases
need go to every mesh that reads them, as `Problem.placement` has it. Memory, links that are missing, groups and limits are held to; the order of
stages is not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from partition.arguments import checked
from partition.evaluation import FAR, groups
from partition.flow import by_value
from partition.phases import Phase
from partition.problem import OBJECTIVES, Problem

_AT_ONCE = 20_000_000
"""Entries of the largest table that is made at once."""


_TIMES, _LOADS = ("ttft", "tpot", "e2e"), ("throughput", "usd_per_mtok", "joules_per_token")


class Batch:
    """A problem, ready to have many placements of it evaluated: `Batch(problem).scores(mesh [b, n], "e2e")`."""

    @checked
    def __init__(self, problem: Problem):
        import scipy.sparse

        self.p = problem
        self.incidence = scipy.sparse.csr_matrix(problem.incidence.astype(np.float32))
        self.by_src: list[list[int]] = [[] for _ in problem.names]
        for i, f in enumerate(problem.flows):
            self.by_src[f.src].append(i)
        self.by_value = by_value(problem.flows)
        self.both = [n for n in reversed(range(len(problem))) if problem.phase[n] is Phase.BOTH]
        self.before, self.inside, self.after = groups(problem)
        self.weights = np.array([r.kind == "weights" for r in problem.residents], bool)

    def scores(self, mesh: np.ndarray, objective: str | None = None) -> np.ndarray:
        """The numbers that a policy minimises, [b], inf for what is not feasible; mesh: int [b, n]. objective: the problem's own, unless told."""
        wanted, limits = objective or self.p.objective, self.p.limits if objective is None else {}
        found = self.values(mesh, (wanted, *(name for name in limits if name != wanted)))
        over = np.zeros(len(mesh))
        with np.errstate(divide="ignore", invalid="ignore"):
            for name, limit in limits.items():
                if name == "crossings":  # as `evaluation.broken` has it
                    over += np.maximum(0.0, (found[name] + 1) / (np.floor(limit) + 1) - 1.0)
                    continue
                over += np.maximum(0.0, (limit / found[name] if name == "throughput" else found[name] / limit) - 1.0 - 1e-9)
        value = -found[wanted] if wanted == "throughput" else found[wanted]
        possible = np.isfinite(found[wanted]) & (found["throughput"] > 0 if "throughput" in found else True)
        return np.where(possible, np.where(over > 0, FAR * (1 + np.minimum(over, 1e6)), value), np.inf)

    def values(self, mesh: np.ndarray, objectives: Sequence[str] = OBJECTIVES) -> dict[str, np.ndarray]:
        """Numbers of `Estimate` for each placement, [b] each; inf (0 for throughput) where one is not feasible."""
        step = max(1, _AT_ONCE // (len(self.p.meshes) * max(len(self.p), len(self.p.residents), 1)))
        parts = [_Some(self, mesh[i : i + step]).values(set(objectives)) for i in range(0, len(mesh), step)]
        return {o: np.concatenate([part[o] for part in parts]) for o in objectives}


class _Some:
    """The schedule of b placements at once; see `evaluation.Schedule`, whose steps these are."""

    def __init__(self, of: Batch, mesh: np.ndarray):
        self.of, self.p, self.rows = of, of.p, np.arange(len(mesh))
        self.mesh = mesh.astype(np.int64)
        for n, m in self.p.pins.items():
            self.mesh[:, n] = m
        b, m = len(mesh), len(self.p.meshes)
        self.on = np.zeros((len(self.p), b, m), bool)
        for n in range(len(self.p)):
            if self.p.phase[n] is not Phase.BOTH:
                self.on[n, self.rows, self.mesh[:, n]] = True
        for n in of.both:
            for i in of.by_src[n]:
                for d in self.p.flows[i].dst:
                    self.on[n] |= self.on[d]
            lonely = ~self.on[n].any(axis=1)
            self.on[n, self.rows[lonely], self.mesh[lonely, n]] = True
            self.mesh[:, n] = self.on[n].argmax(axis=1)
        self.at = self.rows * m + self.mesh.T  # [n, b]: where a node's mesh stands in a table [b, m]
        self.taken = np.take_along_axis(self.p.seconds, self.mesh.T, axis=1)  # [n, b] s
        self.free, self.ports_free, self.link_free = np.zeros(b * m), np.zeros(b * m), np.zeros(b * m * m)
        self.sends: dict[tuple[int, bool], Any] = {}
        self.arrived: dict[int, np.ndarray] = {}  # flow -> [b x m] s

    def values(self, objectives: set[str]) -> dict[str, np.ndarray]:
        p, found = self.p, dict[str, np.ndarray]()
        weights, batch = self.held()
        feasible = (weights + batch <= p.capacity).all(axis=1) & np.isfinite(p.seconds[np.arange(len(p)), self.mesh]).all(axis=1)
        for group in p.together:
            feasible &= (self.mesh[:, list(group)] == self.mesh[:, group[:1]]).all(axis=1)
        if p.ports is not None:
            found = self.through_host()
        else:
            if objectives.intersection(_TIMES):
                found |= self.times()
                feasible &= np.isfinite(found["e2e"])
            if objectives.intersection(_LOADS):
                crossed, busiest = self.crossed()
                feasible &= np.isfinite(busiest)
                found |= self.loads(self.occupied(weights, batch), busiest, crossed)
        if "crossings" in objectives:
            found["crossings"] = self.passed()
        return {o: np.where(feasible, found[o], 0.0 if o == "throughput" else np.inf) for o in objectives}

    def loads(self, occupied: np.ndarray, busiest: np.ndarray | float, crossed: np.ndarray | float) -> dict[str, np.ndarray]:
        tokens, longest = self.p.workload.tokens, np.maximum(occupied.max(axis=1), busiest)
        return {"throughput": np.divide(tokens, longest, out=np.zeros_like(longest), where=longest > 0), "usd_per_mtok": (occupied @ self.p.price + crossed) / tokens * 1e6,
                "joules_per_token": occupied @ self.p.power / tokens}  # fmt: skip

    def times(self) -> dict[str, np.ndarray]:
        p, trips = self.p, self.p.workload.trips if self.of.inside else 0
        prefill_end = self.run(self.of.before, ("forward",), -1)
        ready = prefill_end
        for i, f in enumerate(p.flows):
            if f.kind == "handoff" and i in self.arrived:
                for d in f.dst:
                    ready = np.maximum(ready, self.arrived[i].take(self.at[d]))
        ends, shown = [prefill_end], min(trips, 3)
        for trip in range(shown):
            ends.append(self.run(self.of.inside, ("forward", "handoff") if trip == 0 else ("forward", "handoff", "carry"), trip))
        tpot = np.zeros(len(self.rows))
        if shown:
            with np.errstate(invalid="ignore"):  # what never ends on a mesh that it cannot reach
                last = np.nan_to_num(ends[-1] - ends[-2], nan=np.inf, posinf=np.inf)
            tpot = np.maximum(last, self.work(self.of.inside).max(axis=1))
        end = (self.run(self.of.after, ("forward", "result"), 0) if self.of.after else ends[-1]) + (trips - shown) * tpot
        return {"ttft": ready, "tpot": tpot, "e2e": np.maximum(end, ready)}

    def run(self, nodes: list[int], kinds: tuple[str, ...], trip: int) -> np.ndarray:
        p, shape = self.p, (len(self.rows), len(self.p.meshes))
        for n in nodes:
            waiting = [i for i in p.incoming[n] if i in self.arrived and p.flows[i].kind in kinds]
            if p.phase[n] is Phase.BOTH:
                start = self.free
                for i in waiting:
                    start = np.maximum(start, self.arrived[i])
                self.free = np.where(self.on[n].ravel(), start + np.tile(p.seconds[n], shape[0]), self.free)
            else:
                begin = self.free.take(self.at[n])
                for i in waiting:
                    np.maximum(begin, self.arrived[i].take(self.at[n]), out=begin)
                self.free[self.at[n]] = begin + self.taken[n]
            if self.leaving(n, trip) is not None:
                self.send(n, trip)
        last: np.ndarray = np.where(self.on[nodes].any(axis=0), self.free.reshape(shape), 0.0).max(axis=1)
        return last

    def elsewhere(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(placements, meshes) that read a flow from another mesh than its maker's own, in the order of placements."""
        f, both = self.p.flows[i], Phase.BOTH
        rows = self.rows
        if all(self.p.phase[n] is not both for n in (f.src, *f.dst)):  # only where some reader is away
            rows = np.nonzero(functools.reduce(np.logical_or, (self.at[f.src] != self.at[d] for d in f.dst)))[0]
        away = np.zeros((len(rows), len(self.p.meshes)), bool)
        for d in f.dst:
            if self.p.phase[d] is both:
                away |= self.on[d][rows]
            else:
                away.ravel()[self.at[d][rows] + (np.arange(len(rows)) - rows) * away.shape[1]] = True
        b, m = np.nonzero(away & ~self.on[f.src][rows])
        return rows[b], m

    @functools.cached_property
    def away(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """What `elsewhere` says of each flow."""
        return [self.elsewhere(i) for i in range(len(self.p.flows))]

    def distinct(self, flows: list[int]) -> np.ndarray:
        """Where some flows go in [b, m], each place once."""
        goes = [rows * len(self.p.meshes) + to for rows, to in (self.away[i] for i in flows)]
        return goes[0] if len(goes) == 1 else np.unique(np.concatenate(goes))

    def leaving(self, n: int, trip: int) -> Any:
        """What a node sends in a trip: (where its senders stand in [b, m], seconds of their ports, its transfers); None for nothing. Found once.

        A transfer: (flow, whose of the senders, where it goes in [b, m], its link in [b, m, m], seconds on it, whether others go elsewhere).
        """
        if (n, trip < 0) not in self.sends:
            p, flows = self.p, [i for i in self.of.by_src[n] if len(self.away[i][0]) and not (trip < 0 and self.p.flows[i].kind in ("carry", "result"))]
            if not flows:
                self.sends[n, trip < 0] = None
                return None
            many = len(p.meshes)
            reached = np.bincount(self.distinct(flows) // many, minlength=len(self.rows))
            senders = np.nonzero(reached)[0]
            place, ports, found = np.zeros(len(self.rows), np.int64), np.zeros(len(senders)), []
            place[senders] = np.arange(len(senders))
            for i in flows:
                rows, to = self.away[i]
                src, nbytes = self.mesh[rows, n], p.flows[i].nbytes
                wire, beta = p.wire[src, to], p.beta[src, to]
                np.add.at(ports, place[rows], np.divide(nbytes, wire, out=np.zeros(len(rows)), where=wire > 0))
                took = np.divide(nbytes, beta, out=np.full(len(rows), np.inf), where=beta > 0)
                found.append((i, place[rows], rows * many + to, (rows * many + src) * many + to, np.stack([took, p.alpha[src, to]]), reached[rows] > 1))
            self.sends[n, trip < 0] = self.at[n][senders], ports, found
        return self.sends[n, trip < 0]

    def send(self, n: int, trip: int) -> None:
        home, ports, transfers = self.leaving(n, trip)
        made = np.maximum(self.free[home], self.ports_free[home])
        closing = made + ports
        self.ports_free[home] = closing
        for i, whose, to, link, (took, alpha), several in transfers:
            stop = np.maximum(made[whose], self.link_free[link]) + took
            stop = np.where(several, np.maximum(stop, closing[whose]), stop)
            self.link_free[link] = stop
            if i not in self.arrived:
                self.arrived[i] = np.zeros(len(self.free))
            self.arrived[i][to] = stop + alpha

    def held(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [b, m]: weights; and what one batch holds."""
        p, (b, m) = self.p, (len(self.rows), len(self.p.meshes))
        used = (self.of.incidence @ self.on.reshape(len(p), b * m).astype(np.float32) > 0).reshape(len(p.residents), b, m)
        peak = np.zeros((b, m))
        for n in np.nonzero(p.activation.any(axis=1))[0]:
            np.maximum(peak, self.on[n] * p.activation[n], out=peak)
        nbytes = [np.einsum("rbm,rm->bm", used[rows], p.resident[rows]) if rows.any() else np.zeros((b, m)) for rows in (self.of.weights, ~self.of.weights)]
        return nbytes[0], nbytes[1] + peak

    def work(self, nodes: Iterable[int], times: np.ndarray | None = None) -> np.ndarray:
        """Seconds [b, m] that some nodes run, so many times each; once, unless told."""
        p, busy = self.p, np.zeros(len(self.rows) * len(self.p.meshes))
        for n in nodes:
            often = 1 if times is None else times[n]
            if p.phase[n] is Phase.BOTH:
                busy += np.where(self.on[n], p.seconds[n] * often if often else 0.0, 0.0).ravel()
            else:
                busy[self.at[n]] += self.taken[n] * often if often else 0.0
        return busy.reshape(len(self.rows), -1)

    def occupied(self, weights: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Seconds [b, m] that a batch keeps others from each mesh; see `evaluation.under_way`."""
        p, busy = self.p, self.work(range(len(self.p)), self.p.times)
        if (p.depth == 1).all():
            return busy
        room = np.floor((p.capacity - weights) / np.maximum(batch, 1.0))
        most = np.where(p.depth > 1, np.maximum(1.0, np.minimum(p.depth, room)), 1.0)
        parts: dict[int, list[int]] = {}
        for n in range(len(p)):
            parts.setdefault(int(p.layer[n]) if p.layer[n] >= 0 else -1 - n, []).append(n)
        longest = np.zeros_like(busy)
        for nodes in parts.values():
            np.maximum(longest, self.work(nodes, p.times), out=longest)
        return np.where(p.depth > 1, np.maximum(longest, busy / most), busy)

    def passed(self) -> np.ndarray:
        """How many values pass from a mesh to another [b], each once for each mesh that takes it in."""
        many = np.zeros(len(self.rows))
        for flows in self.of.by_value:
            many += np.bincount(self.distinct(flows) // len(self.p.meshes), minlength=len(many))
        return many

    def crossed(self) -> tuple[np.ndarray, np.ndarray]:
        """($ for the bytes that cross, the seconds of the busiest link or sender's ports), each [b]. A value goes once to each mesh."""
        p, rows = self.p, len(self.rows)
        links, ports, money = np.zeros((rows, len(p.meshes), len(p.meshes))), np.zeros((rows, len(p.meshes))), np.zeros(rows)
        for flows in self.of.by_value:
            seen = np.zeros((rows, len(p.meshes)), bool) if len(flows) > 1 else None
            for i in flows:  # the first stands for all
                b, m = self.away[i]
                if seen is not None:
                    new = ~seen[b, m]
                    b, m = b[new], m[new]
                    seen[b, m] = True
                f, a = p.flows[i], self.mesh[b, p.flows[i].src]
                moved = f.nbytes * f.times
                links[b, a, m] += np.divide(moved, p.beta[a, m], out=np.full(len(b), np.inf), where=p.beta[a, m] > 0)
                np.add.at(ports, (b, a), np.divide(moved, p.wire[a, m], out=np.zeros(len(b)), where=p.wire[a, m] > 0))
                np.add.at(money, b, moved * p.link_price[a, m])
        return money, np.maximum(links.max(axis=(1, 2)), ports.max(axis=1))

    def through_host(self) -> dict[str, np.ndarray]:
        """By the load of each mesh, with what it gives out and takes in; a request takes as long as all one after the other, at most."""
        p, load = self.p, self.work(range(len(self.p)), self.p.times)
        assert p.ports is not None
        for i, f in enumerate(p.flows):
            b, m = self.away[i]
            cost = f.nbytes * f.times
            load[b, m] += cost * p.ports[m]
            gives = np.unique(b)
            a = self.mesh[gives, f.src]
            load[gives, a] += cost * p.ports[a]
        done = load.sum(axis=1)
        return self.loads(load, 0.0, 0.0) | {"ttft": done, "tpot": np.zeros(len(done)), "e2e": done}
