"""Ordered stages found exactly: a shortest path over ideals, the sets of groups that hold all that must stand before them.

Stages in order are a chain of ideals; a stage is the difference of two. All stages that a bound allows are priced at once, as products of
matrices: which of a value's groups are in an ideal is a pattern, and what a stage pays for the value depends on the patterns of its two ideals.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from partition.chain import Chain, joined
from partition.errors import PlacementError

Stage = tuple[int, tuple[int, ...]]
"""A kind of mesh, and groups."""

_BLOCK = 256
"""Ideals whose stages are priced at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The best stages on any numbers of meshes. values: meshes of each kind that may be used -> the longest stage, or the sum of all."""

    values: Mapping[tuple[int, ...], float]
    trace: Callable[[tuple[int, ...]], tuple[Stage, ...]] = dataclasses.field(repr=False)

    @property
    def value(self) -> float:
        """The value on all meshes."""
        return self.values[max(self.values)]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages on all meshes, in order."""
        return self.trace(max(self.values))


def ideals(chain: Chain, most: int) -> np.ndarray | None:
    """Every ideal of a chain, as bool [i, g]; None where there are more than `most`."""
    before = [sum(1 << b for b in earlier) for earlier in chain.before]
    after = [sorted(later) for later in chain.after]
    start = tuple(g for g, b in enumerate(before) if not b)
    level: dict[int, tuple[int, ...]] = {0: start}
    found = [0]
    while level:
        further: dict[int, tuple[int, ...]] = {}
        for ideal, free in level.items():
            for g in free:
                grown = ideal | 1 << g
                if grown not in further:
                    further[grown] = (*(f for f in free if f != g), *(a for a in after[g] if before[a] & ~grown == 0))
        found += further
        if len(found) > most:
            return None
        level = further
    width = (len(chain) + 7) // 8
    packed = np.frombuffer(b"".join(i.to_bytes(width, "little") for i in found), np.uint8).reshape(len(found), width)
    members: np.ndarray = np.unpackbits(packed, axis=1, bitorder="little", count=len(chain)).astype(bool)
    return members


def prefixes(chain: Chain, order: Sequence[int] | None = None, ends: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """The ideals that an order of the groups goes through, as bool [i, g]: after each group, or after so many as `ends` says."""
    place = np.argsort(np.arange(len(chain)) if order is None else np.asarray(order))
    after = np.arange(len(chain) + 1) if ends is None else np.asarray(ends)
    made: np.ndarray = place[None, :] < after[:, None]
    return made


def calm(chain: Chain, order: Sequence[int], most: int, best: float = float("inf")) -> np.ndarray:
    """After how many groups of an order stages end, about `most` times at most: of all places where one may if none takes longer than `best`, where the
    least passes in each equal part of the work. Nothing and all are among them."""
    at = np.asarray(order)
    place, n = np.argsort(at), len(chain)
    done, live = np.append(0.0, np.cumsum(chain.work.min(axis=1)[at])), np.zeros(n + 2)
    for c in chain.crossings:
        ends = place[list(c.ends)]
        live[ends.min() + 1] += c.cost
        live[ends.max() + 1] -= c.cost
    passing = np.cumsum(live)[: n + 1]
    allowed = np.nonzero(_possible(chain, done, best))[0] if np.isfinite(best) else np.arange(n + 1)
    if len(allowed) > most:
        spread = np.linspace(done[allowed[0]], done[allowed[-1]], most)
        part = np.searchsorted(spread, done[allowed], side="left")
        lowest = np.lexsort((allowed, passing[allowed], part))
        allowed = allowed[lowest[np.unique(part[lowest], return_index=True)[1]]]
    return np.unique(np.concatenate([[0], allowed, [n]]))


def thinned(chain: Chain, order: Sequence[int], ends: np.ndarray) -> Chain:
    """The chain with the groups of an order between two of `ends` as one."""
    return joined(chain, [list(order[a:b]) for a, b in itertools.pairwise(ends.tolist())])


def windowed(chain: Chain, members: np.ndarray, best: float) -> np.ndarray:
    """bool [i]: the ideals at which a stage may end if none takes longer than `best`: so many meshes can have done what is in one, the others the rest."""
    return _possible(chain, members @ chain.work.min(axis=1), best)


def _possible(chain: Chain, done: np.ndarray, best: float) -> np.ndarray:
    """The same by the least work [s] that is done in each ideal."""
    total, count = float(chain.work.min(axis=1).sum()), sum(chain.counts)
    stages, slack = np.arange(count + 1), 1e-9 * best
    kept = ((done[:, None] <= stages * best + slack) & (total - done[:, None] <= (count - stages) * best + slack)).any(axis=1)
    return np.asarray(kept)


def priced(chain: Chain, members: np.ndarray, best: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(the earlier ideals, the later ideals, seconds [pair, k] of the stages between them, inf where one does not fit), in blocks of the later.

    members: ideals in the order of their least work. Stages that take longer than `best` on every kind are left out.
    """
    least = chain.work.min(axis=1)
    done, own = members @ least, members.astype(float)
    able = np.isfinite(chain.work)
    work, unable, size = own @ np.where(able, chain.work, 0.0), own @ ~able, own @ chain.size
    below = members.sum(axis=1)
    for start in range(1, len(members), _BLOCK):
        later = np.arange(start, min(start + _BLOCK, len(members)))
        first = int(np.searchsorted(done, done[later[0]] - best * (1 + 1e-9), side="left"))
        earlier = np.arange(first, int(later[-1]))
        if not len(earlier):
            continue
        subset = (own[earlier] @ own[later].T >= below[earlier][:, None] - 0.5) & (below[earlier][:, None] < below[later][None, :])
        subset &= done[later][None, :] - done[earlier][:, None] <= best * (1 + 1e-9)
        varied = np.ptp(members[first : later[-1] + 1].astype(np.int8), axis=0) > 0
        a, b = np.nonzero(subset)
        seconds = np.where(unable[later[b]] - unable[earlier[a]] < 0.5, work[later[b]] - work[earlier[a]], np.inf)
        if chain.port.any():
            seconds += _paid(chain, members, earlier, later, varied)[a, b][:, None] * chain.port
        held = size[later[b]] - size[earlier[a]]
        for users, nbytes in chain.shared:
            if varied[list(users)].any():
                had, has = members[earlier][:, users].sum(axis=1), members[later][:, users].sum(axis=1)
                held = held + (has[b] > had[a])[:, None] * nbytes
        seconds = np.where(held <= chain.capacity * (1 + 1e-12), seconds, np.inf)
        kept = seconds.min(axis=1) <= best * (1 + 1e-9)
        yield earlier[a[kept]], later[b[kept]], seconds[kept]


def _paid(chain: Chain, members: np.ndarray, earlier: np.ndarray, later: np.ndarray, varied: np.ndarray) -> np.ndarray:
    """Bytes [earlier, later] that the stage between two ideals gives out and takes in."""
    had, has = [], []
    for c in chain.crossings:
        if not varied[list(c.ends)].any():
            continue
        ends = list(c.ends)
        rows = np.concatenate([members[earlier][:, ends], members[later][:, ends]])
        code = rows @ (1 << np.arange(len(ends))) if len(ends) < 60 else np.unique(rows, axis=0, return_inverse=True)[1]
        _, at, of = np.unique(code, return_index=True, return_inverse=True)
        patterns = rows[at]
        stage = patterns[None, :, :] & ~patterns[:, None, :]  # [earlier pattern, later pattern, group]
        pays = np.where(stage[..., 0], ~stage[..., 1:].all(axis=-1), stage[..., 1:].any(axis=-1)) * c.cost
        hot = np.eye(len(patterns))
        had.append(pays[of[: len(earlier)]])
        has.append(hot[of[len(earlier) :]])
    if not had:
        return np.zeros((len(earlier), len(later)))
    paid: np.ndarray = np.concatenate(had, axis=1) @ np.concatenate(has, axis=1).T
    return paid


def best_stages(
    chain: Chain, members: np.ndarray, *, goal: Literal["longest", "sum"] = "longest", best: float = float("inf"), cross: np.ndarray | None = None, most: int = 40_000_000,
) -> Found | None:  # fmt: skip
    """The best stages that end at some ideals, on no more meshes of each kind than there are; None where none reaches `best`.

    best [s]: what no stage may take longer than. cross [i, k, k]: what passing from a stage of one kind to the next of another adds at each of `members` [s]. O(pairs of ideals x numbers of meshes used). Raises
    PlacementError where there are more than `most` pairs.
    """
    order = np.argsort(members @ chain.work.min(axis=1) + 1e-15 * members.sum(axis=1), kind="stable")
    members, cross = members[order], None if cross is None else cross[order]
    if np.isfinite(best) and goal == "longest":
        kept = windowed(chain, members, best)
        members, cross = members[kept], None if cross is None else cross[kept]
    if (pairs := _pairs(chain, members, best, most)) is None:
        return None
    return _shortest(chain, members, *pairs, np.maximum if goal == "longest" else np.add, cross)


def compromises(chain: Chain, members: np.ndarray, *, points: int = 12, most: int = 40_000_000) -> Iterator[tuple[Stage, ...]]:
    """Stages that end at some ideals of which none has both a shorter longest and a smaller sum: the least sum first, then under a cap that falls.

    The stages are priced once; each of at most `points` is one pass of the recurrence of `best_stages` over those that the cap leaves. The last has
    the shortest longest. Raises PlacementError as `best_stages` does.
    """
    members = members[np.argsort(members @ chain.work.min(axis=1) + 1e-15 * members.sum(axis=1), kind="stable")]
    if (pairs := _pairs(chain, members, float("inf"), most)) is None:
        return
    before, after, seconds = pairs
    end = tuple(chain.counts)

    def under(cap: float, join: np.ufunc) -> Found | None:
        return _shortest(chain, members, before, after, np.where(seconds <= cap, seconds, np.inf), join, None)

    if (shortest := under(float("inf"), np.maximum)) is None:
        return
    low, cap = shortest.values[end], float("inf")
    for i in range(points):
        least = under(cap if i < points - 1 else low * (1 + 1e-9), np.add)
        if least is None:
            return
        stages = least.trace(end)
        yield stages
        longest = max(_took(chain, stages))
        if longest <= low * (1 + 1e-9):
            return
        cap = min(longest * (1 - 1e-9), longest - (longest - low) / (points - i))


def _took(chain: Chain, stages: Sequence[Stage]) -> list[float]:
    """Seconds of each of some stages, what it gives out and takes in included."""
    found = []
    for kind, groups in stages:
        inside = set(groups)
        paid = sum(c.cost for c in chain.crossings if (c.src in inside and not inside.issuperset(c.dst)) or (c.src not in inside and not inside.isdisjoint(c.dst)))
        found.append(float(chain.work[list(groups), kind].sum() + paid * chain.port[kind]))
    return found


def _pairs(chain: Chain, members: np.ndarray, best: float, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """What `priced` gives, in the order of the later ideals; None where nothing reaches from no group to all."""
    parts, total = [], 0
    for block in priced(chain, members, best):
        parts.append(block)
        total += len(block[0])
        if total > most:
            raise PlacementError(f"more than {most:,} stages would have to be priced", where=f"{len(members):,} places where one may end", mend="use the policy 'order_dp'")
    if not parts or members[0].any() or not members[-1].all():
        return None
    before, after, seconds = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(after, kind="stable")
    return before[order], after[order], seconds[order]


def _shortest(chain: Chain, members: np.ndarray, before: np.ndarray, after: np.ndarray, seconds: np.ndarray, join: np.ufunc, cross: np.ndarray | None) -> Found | None:
    """The shortest paths over ideals, by meshes used and by the kind of the last stage; pairs are in the order of `after`."""
    ends, starts = np.unique(after, return_index=True)
    every, size = range(len(chain.kinds)), len(members)
    states = list(itertools.product(*(range(n + 1) for n in chain.counts)))
    tables: dict[tuple[int, ...], np.ndarray] = {}

    def without(state: tuple[int, ...], k: int) -> tuple[int, ...]:
        return tuple(n - (i == k) for i, n in enumerate(state))

    def ways(table: np.ndarray, k: int) -> np.ndarray:
        """The value with which a stage of kind k starts at each ideal, by the kind before [k, i]."""
        return table if cross is None else np.where(table == 0.0, table, join(table, cross[:, :, k].T))

    for state in states:
        tables[state] = table = np.full((len(every), size), np.inf)
        table[:, 0] = 0.0
        for k in (k for k in every if state[k]):
            less = tables[without(state, k)]
            np.minimum(table, less, out=table)
            begun = ways(less, k).min(axis=0)
            table[k, ends] = np.minimum(table[k, ends], np.minimum.reduceat(join(begun[before], seconds[:, k]), starts))

    def trace(state: tuple[int, ...]) -> tuple[Stage, ...]:
        at, stages, k = size - 1, list[Stage](), int(tables[state][:, -1].argmin())
        while at:
            if (easier := next((j for j in every if state[j] and tables[without(state, j)][k, at] <= tables[state][k, at]), None)) is not None:
                state = without(state, easier)
                continue
            rows = slice(int(np.searchsorted(after, at, "left")), int(np.searchsorted(after, at, "right")))
            state, begun = without(state, k), ways(tables[without(state, k)], k)
            came = int(before[rows][int(join(begun.min(axis=0)[before[rows]], seconds[rows, k]).argmin())])
            stages.append((k, tuple(np.nonzero(members[at] & ~members[came])[0].tolist())))
            at, k = came, int(begun[:, came].argmin())
        return tuple(reversed(stages))

    values = {state: float(table[:, -1].min()) for state, table in tables.items()}
    return Found(values=values, trace=trace) if np.isfinite(values[states[-1]]) else None
