"""Why a plan is what it is: what the alternatives would cost, and where the answer flips.

The announced split is held against the best placement on one kind of machine. The price of the decode machine and the bandwidth of
the link at which the two draw level are computed, since neither is published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from partition.errors import InfeasibleError, PlacementError
from partition.evaluation import Estimate, evaluate
from partition.phases import Phase
from partition.policies import phase_split, portfolio, single
from partition.policies._layers import of_kind
from partition.problem import Placement, Problem
from partition.units import dollars, rate, seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """One way to place the whole problem, or why it cannot be done."""

    name: str
    placement: Placement | None
    estimate: Estimate | None
    why_not: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The split against the best single kind.

    window: ($/h, $/h) of one decode machine between which the split is the cheapest of all (0 and infinity where open; None: at no
    price). flip_beta [B/s]: bandwidth at which split and best single kind draw level end to end, None where it does not decide.
    """

    split: Alternative
    best: Alternative
    alternatives: tuple[Alternative, ...]
    decode_kind: str
    window: tuple[float, float] | None
    flip_beta: float | None
    sentence: str


def alternatives(problem: Problem) -> tuple[Alternative, ...]:
    """Everything on each kind of machine alone, and the split."""
    found = []
    for kind in sorted(of_kind(problem)):
        try:
            placed = single(problem, kind=kind)
            found.append(Alternative(name=f"all on {kind}", placement=placed, estimate=evaluate(problem, placed)))
        except InfeasibleError as error:
            found.append(Alternative(name=f"all on {kind}", placement=None, estimate=None, why_not=error.what))
    try:
        placed = phase_split(problem)
        found.append(Alternative(name="split", placement=placed, estimate=evaluate(problem, placed)))
    except (InfeasibleError, PlacementError) as error:
        found.append(Alternative(name="split", placement=None, estimate=None, why_not=error.what))
    return tuple(found)


def best_found(problem: Problem) -> Alternative:
    """What the portfolio finds for the problem's objective."""
    try:
        placed = portfolio(problem)
    except (InfeasibleError, PlacementError) as error:
        return Alternative(name="best found", placement=None, estimate=None, why_not=error.what)
    return Alternative(name="best found", placement=placed, estimate=evaluate(problem, placed))


def price_window(problem: Problem, split: Estimate, others: Sequence[Estimate], kind: str) -> tuple[float, float] | None:
    """($/h, $/h) of one device of `kind` between which the split costs less for a token than every other; None: at no price.

    What a placement costs is a straight line in that price, so each other placement bounds it from one side.
    """

    def line(e: Estimate) -> tuple[float, float]:
        fixed = sum(b * float(problem.price[m]) for m, b in enumerate(e.occupied) if problem.kinds[m] != kind)
        return fixed, sum(b * _devices(problem, m) for m, b in enumerate(e.occupied) if problem.kinds[m] == kind)

    low, high = 0.0, float("inf")
    fixed, slope = line(split)
    for other in others:
        other_fixed, other_slope = line(other)
        if slope == other_slope:
            if fixed >= other_fixed:
                return None
            continue
        level = (other_fixed - fixed) / (slope - other_slope) * 3600
        low, high = (low, min(high, level)) if slope > other_slope else (max(low, level), high)
    return (low, high) if low < high and high > 0 else None


def _devices(problem: Problem, mesh: int) -> int:
    return 1 if problem.cluster is None else problem.cluster.meshes[mesh].count


def flip_beta(problem: Problem, split: Placement, other: Estimate) -> float | None:
    """Bandwidth [B/s] of the links between kinds below which the split loses end to end; None where bandwidth does not decide."""
    kinds = np.array(problem.kinds)
    across = kinds[:, None] != kinds[None, :]

    def wins(beta: float) -> bool:
        slower = dataclasses.replace(problem, beta=np.where(across, beta, problem.beta))
        return evaluate(slower, split).e2e < other.e2e

    low, high = 1e3, 1e15
    if wins(low) or not wins(high):
        return None
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high


def explain(problem: Problem) -> Answer:
    """Hold the announced split against the best single kind of machine, for the problem's objective.

    Raises InfeasibleError where the split or every single kind does not fit.
    """
    found = alternatives(problem)
    split = found[-1]
    singles = [a for a in found[:-1] if a.estimate is not None]
    if split.estimate is None or split.placement is None or not singles:
        lacking = split if split.estimate is None else found[0]
        raise InfeasibleError(f"{lacking.name}: {lacking.why_not}", where="explain", mend="use a larger cluster")
    best = min(singles, key=lambda a: a.estimate.score(problem.objective))  # type: ignore[union-attr]
    assert best.estimate is not None
    decode = int(split.placement.mesh[problem.nodes(Phase.DECODE)[0]])
    kind, price = problem.kinds[decode], float(problem.price[decode]) / _devices(problem, decode) * 3600
    window = price_window(problem, split.estimate, [a.estimate for a in singles if a.estimate is not None], kind)
    beta = flip_beta(problem, split.placement, best.estimate)
    sentence = _sentence(split.estimate, best, kind, price, window, beta)
    return Answer(split=split, best=best, alternatives=(*found, best_found(problem)), decode_kind=kind, window=window, flip_beta=beta, sentence=sentence)


def _numbers(e: Estimate) -> str:
    return f"TTFT {seconds(e.ttft)}, TPOT {seconds(e.tpot)}, {dollars(e.usd_per_mtok)} per million tokens"


def _sentence(split: Estimate, best: Alternative, kind: str, price: float, window: tuple[float, float] | None, beta: float | None) -> str:
    assert best.estimate is not None
    if window is None:
        money = f"it is the cheapest at no price of a {kind}"
    else:
        low, high = window
        between = f"between {dollars(low)} and {dollars(high)}" if low > 0 and high < float("inf") else f"above {dollars(low)}" if low > 0 else f"below {dollars(high)}"
        money = f"it is the cheapest {between} per {kind}-hour (the profile says {dollars(price)})" if low > 0 or high < float("inf") else f"it is the cheapest at any price of a {kind}"
    wins = split.e2e < best.estimate.e2e
    speed = f"faster end to end above {rate(beta)} between the two" if beta is not None else f"{'faster' if wins else 'slower'} end to end at any bandwidth"
    return f"The announced split gives {_numbers(split)}; the best single kind ({best.name}) {_numbers(best.estimate)}; {money}, and {speed}."
