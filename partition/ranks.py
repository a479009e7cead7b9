"""How sure an order of placements is, when the numbers that it rests on are only known within bands.

Every number of a cluster is drawn within its band, once for all that use it, so what two placements share moves both. A draw is priced from
what each number does by itself at the two ends of its band, in the logarithm of the score; some draws are priced in full, to tell the error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from partition.arguments import checked
from partition.errors import PlacementError
from partition.evaluation import evaluate
from partition.hardware import End, Quantity
from partition.overrides import banded
from partition.problem import Placement, Problem, on

_EXACT = 16
"""Draws that are priced in full."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """How often one placement beats another, and which number by itself reverses the two within its band, at which value (SI units); None where none does."""

    first: str
    second: str
    share: float
    number: str | None
    at: float | None
    below: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """All pairs, the better at the nominal numbers first. Of the draws that were priced in full: the worst error of a score, as a share, and the share of
    pairs that stand in the order that was said."""

    draws: int
    pairs: tuple[Rank, ...]
    error: float
    agree: float

    def __str__(self) -> str:
        lines = []
        for r in self.pairs:
            turn = f"it reverses when {r.number} {'falls below' if r.below else 'rises above'} {r.at:.4g} (SI units)" if r.number is not None and r.at is not None else "no single number reverses it within its band"
            lines.append(f"{r.first} beats {r.second} in {100 * r.share:.0f} % of {self.draws:,} draws; {turn}.")
        return "\n".join([*lines, f"Of {_EXACT} draws that were priced in full, {100 * self.agree:.0f} % of the pairs stand as said; a score differs by {100 * self.error:.0f} % at most."])


@checked
def rank(problem: Problem, placements: Mapping[str, Placement], *, draws: int = 1000, seed: int = 0, progress: Callable[[str], None] | None = None) -> Ranks:
    """Compare placements of one problem over the bands of its cluster; capacities stay. Numbers are drawn uniformly in their logarithms on either side of
    the nominal, half of them on each. Raises PlacementError for a problem without a program or a cluster, and for fewer than two placements."""
    cluster = problem.cluster
    if problem.phases is None or cluster is None:
        raise PlacementError("only a problem that was posed here can be priced anew", where="ranks", mend="pose the program on a cluster")
    if len(placements) < 2 or draws < 1:
        raise PlacementError(f"an order needs two placements and a draw, not {len(placements)} and {draws}", where="ranks", mend="give two policies or more, and some draws")
    names, moving = list(placements), banded(cluster)

    def scores(values: Mapping[str, float]) -> np.ndarray:
        posed = on(problem, cluster.replace(values)) if values else problem
        return np.array([abs(evaluate(posed, dataclasses.replace(p, problem=posed)).score(problem.objective)) for p in placements.values()])

    sign = -1.0 if problem.objective == "throughput" else 1.0
    base = np.log(scores({}))
    ends = np.zeros((len(moving), 2, len(names)))
    for i, (name, _, q) in enumerate(moving):
        if progress is not None:
            progress(f"vary {name}")
        for j, end in enumerate((End.LOW, End.HIGH)):
            ends[i, j] = np.log(scores({name: float(q.at(end))})) - base
    rng = np.random.default_rng(seed)
    u = rng.uniform(-1, 1, (draws, len(moving)))
    drawn = base + np.maximum(-u, 0) @ ends[:, 0] + np.maximum(u, 0) @ ends[:, 1]
    error, agree = 0.0, list[bool]()
    for b in range(min(_EXACT, draws)):
        if progress is not None:
            progress(f"price draw {b + 1} of {_EXACT} in full")
        values = {name: _between(q, float(u[b, i])) for i, (name, _, q) in enumerate(moving)}
        full = np.log(scores(values))
        error = max(error, float(np.abs(np.expm1(drawn[b] - full)).max()))
        agree += [bool((full[i] < full[j]) == (drawn[b][i] < drawn[b][j])) for i in range(len(names)) for j in range(i)]
    order = sorted(range(len(names)), key=lambda p: (sign * base[p], names[p]))
    pairs = [_pair(names, moving, base * sign, ends * sign, drawn * sign, a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    return Ranks(draws=draws, pairs=tuple(pairs), error=error, agree=float(np.mean(agree)))


def _between(q: Quantity, u: float) -> float:
    """A number from the low end (u = -1) over its nominal to the high end (u = 1), evenly in its logarithm where it may be."""
    value, end = float(q), float(q.at(End.LOW if u < 0 else End.HIGH))
    return value * (end / value) ** abs(u) if value > 0 and end > 0 else value + (end - value) * abs(u)


def _pair(names: list[str], moving: Sequence[tuple[str, str, Quantity]], base: np.ndarray, ends: np.ndarray, drawn: np.ndarray, a: int, b: int) -> Rank:
    ahead = base[b] - base[a]
    best: tuple[float, str, float, bool] | None = None
    for i, (name, _, q) in enumerate(moving):
        for j, u in ((0, -1.0), (1, 1.0)):
            change = ends[i, j, b] - ends[i, j, a]
            if ahead + change < 0 <= ahead and change < 0:
                part = float(ahead / -change)
                if best is None or part < best[0]:
                    best = (part, name, _between(q, u * part), j == 0)
    return Rank(first=names[a], second=names[b], share=float((drawn[:, a] < drawn[:, b]).mean()), number=None if best is None else best[1], at=None if best is None else best[2],
                below=best is not None and best[3])  # fmt: skip
