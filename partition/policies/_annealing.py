"""Groups moved between meshes by chance, many walks side by side, where values pass through a host and the longest load is to be short.

Only the values that a moved group makes or reads are counted anew. Source: simulated annealing (Kirkpatrick et al., 1983).
"""

from __future__ import annotations

import numpy as np

from partition.chain import Chain

_WALKS = 128
_SHARP = 24.0
"""The power of the norm that stands for the longest load while walks are warm: it tells moves apart that leave the longest as it is."""


class Walks:
    """`_WALKS` assignments of the groups of a chain to meshes, all starting from one, which wander and cool."""

    def __init__(self, chain: Chain, start: np.ndarray, seed: int):
        self.rng, self.chain = np.random.default_rng(seed), chain
        kind = {m: k for k, ms in enumerate(chain.kinds) for m in ms}
        meshes = len(kind)
        of = np.array([kind[m] for m in range(meshes)])
        finite = np.isfinite(chain.work)
        work = np.where(finite, chain.work, 1e3 * np.where(finite, chain.work, 0.0).sum())  # where a mesh cannot run a group
        self.work, self.size, self.port, self.capacity = work[:, of], chain.size[:, of], chain.port[of], chain.capacity[of]
        self.cost = np.array([c.cost for c in chain.crossings])
        self.src = np.array([c.src for c in chain.crossings], np.int64)
        touching: list[list[tuple[int, int]]] = [[] for _ in chain.groups]
        for t, c in enumerate(chain.crossings):
            for g in set(c.ends):
                touching[g].append((t, c.dst.count(g)))
        most = max(map(len, touching), default=0)
        none = len(chain.crossings)  # a value of no cost, that pads
        self.values = np.full((len(chain), most), none)
        self.reads = np.zeros((len(chain), most), np.int32)
        for g, pairs in enumerate(touching):
            for i, (t, n) in enumerate(pairs):
                self.values[g, i], self.reads[g, i] = t, n
        self.cost, self.src = np.append(self.cost, 0.0), np.append(self.src, 0)
        self.at = np.repeat(start[None, :], _WALKS, axis=0)
        self.count = np.zeros((_WALKS, none + 1, meshes), np.int32)
        for t, c in enumerate(chain.crossings):
            for g in c.dst:
                self.count[np.arange(_WALKS), t, self.at[:, g]] += 1
        self.load, self.held = np.zeros((_WALKS, meshes)), np.zeros((_WALKS, meshes))
        for g in range(len(chain)):
            self.load[np.arange(_WALKS), self.at[:, g]] += self.work[g][self.at[:, g]]
            self.held[np.arange(_WALKS), self.at[:, g]] += self.size[g][self.at[:, g]]
        every = np.repeat(np.arange(none)[None, :], _WALKS, axis=0)
        if none:
            self.load += self.paid(every, self.count[:, :none], self.at[:, self.src[:none]])
        self.best, self.found = float(self.load[0].max()), start.copy()

    def paid(self, values: np.ndarray, count: np.ndarray, home: np.ndarray) -> np.ndarray:
        """Seconds [walk, mesh] for some values [walk, i], their readers on each mesh [walk, i, mesh] and where they are made [walk, i]."""
        reads = count > 0
        own = np.arange(count.shape[2]) == home[..., None]
        taken = reads & ~own
        seconds: np.ndarray = np.einsum("wi,wim->wm", self.cost[values], taken | (own & taken.any(axis=2, keepdims=True))) * self.port
        return seconds

    def step(self, heat: float) -> None:
        """One move of one group in each walk, taken where it is good or the heat allows."""
        walks, meshes = np.arange(_WALKS), self.load.shape[1]
        g = self.rng.integers(len(self.chain), size=_WALKS)
        here = self.at[walks, g]
        there = (here + self.rng.integers(1, meshes, size=_WALKS)) % meshes
        near = self.rng.random(_WALKS) < 0.5  # half of the moves go to where a neighbour is
        if self.values.shape[1]:
            t = self.values[g, self.rng.integers(self.values.shape[1], size=_WALKS)]
            there = np.where(near & (self.at[walks, self.src[t]] != here) & (t < len(self.cost) - 1), self.at[walks, self.src[t]], there)
        values, reads = self.values[g], self.reads[g]
        old = self.count[walks[:, None], values]
        home = self.at[walks[:, None], self.src[values]]
        new = old.copy()
        index = np.arange(values.shape[1])[None, :]
        new[walks[:, None], index, here[:, None]] -= reads
        new[walks[:, None], index, there[:, None]] += reads
        moved = np.where(self.src[values] == g[:, None], there[:, None], home)
        load = self.load - self.paid(values, old, home) + self.paid(values, new, moved)
        load[walks, here] -= self.work[g, here]
        load[walks, there] += self.work[g, there]
        fits = self.held[walks, there] + self.size[g, there] <= self.capacity[there]
        before, after = self.score(self.load), self.score(load)
        taken = fits & (self.rng.random(_WALKS) < np.exp(np.minimum(0.0, (before - after) / max(heat, 1e-12))))
        w = walks[taken]
        self.load[w] = load[w]
        self.count[w[:, None], values[w]] = new[w]
        self.held[w, here[w]] -= self.size[g[w], here[w]]
        self.held[w, there[w]] += self.size[g[w], there[w]]
        self.at[w, g[w]] = there[w]
        longest = self.load.max(axis=1)
        if len(w) and longest[w].min() < self.best - 1e-12:
            i = int(w[longest[w].argmin()])
            self.best, self.found = float(longest[i]), self.at[i].copy()

    def score(self, load: np.ndarray) -> np.ndarray:
        scale = load.max(axis=1, keepdims=True)
        norm: np.ndarray = scale[:, 0] * (np.clip(load / scale, 0.0, 1.0) ** _SHARP).sum(axis=1) ** (1 / _SHARP)
        return norm

    def cool(self, steps: int, warm: float, cold: float) -> np.ndarray:
        """Walk for some steps while the heat falls from `warm` to `cold` (shares of the longest load); now and then the worst half starts at the best."""
        for i in range(steps):
            self.step(self.best * warm * (cold / warm) ** (i / steps))
            if i % 2000 == 1999:
                order = self.load.max(axis=1).argsort()
                good, bad = order[: _WALKS // 2], order[_WALKS // 2 :]
                for table in (self.at, self.count, self.load, self.held):
                    table[bad] = table[good]
        return self.found
