"""Why a plan is what it is: what each alternative would cost under a load, what binds it, and where the answer flips.

The announced split is held against everything on one kind of machine, GPUs too, and against the best that is found. The price of the decode machine
and the bandwidth into it at which the split draws level are computed, since neither is published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from partition.arguments import checked
from partition.errors import InfeasibleError, PlacementError
from partition.evaluation import Estimate, evaluate
from partition.fleet import Fleet, devices_of, fleet
from partition.phases import Phase
from partition.policies import phase_split, portfolio, single
from partition.policies._layers import of_kind
from partition.problem import Placement, Problem
from partition.units import dollars, rate, seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """One way to place the whole problem, or why it cannot be done. fleet: what it takes under the load; binds: what most of the time of prefill and
    of decode goes to."""

    name: str
    placement: Placement | None
    estimate: Estimate | None
    why_not: str = ""
    fleet: Fleet | None = None
    binds: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The split against everything else, at a load of `rate` requests/s.

    best: the alternative, the split and what the solver finds apart, that costs least under the load. window: ($/h, $/h) of one decode machine
    between which the split is the cheapest of all these (0 and infinity where open; None: at no price). ingest [B/s]: bandwidth between the kinds below which it is not,
    None where bandwidth does not decide. flip_beta [B/s]: the same for one request alone, end to end, against the fastest on one kind.
    """

    rate: float
    split: Alternative
    best: Alternative
    alternatives: tuple[Alternative, ...]
    decode_kind: str
    window: tuple[float, float] | None
    ingest: float | None
    flip_beta: float | None
    sentence: str


def alternatives(problem: Problem) -> tuple[Alternative, ...]:
    """Everything on each kind of machine alone, and the split."""
    ways = [(f"all on {kind}", lambda kind=kind: single(problem, kind=kind)) for kind in sorted(of_kind(problem))]
    return tuple(_tried(problem, name, make) for name, make in [*ways, ("split", lambda: phase_split(problem))])


def _tried(problem: Problem, name: str, make: Callable[[], Placement]) -> Alternative:
    try:
        placed = make()
    except (InfeasibleError, PlacementError) as error:
        return Alternative(name=name, placement=None, estimate=None, why_not=error.what)
    return Alternative(name=name, placement=placed, estimate=evaluate(problem, placed), binds=binding(problem, placed))


def binding(problem: Problem, placement: Placement) -> str:
    """What most of the time of each phase goes to, as "prefill compute, decode memory"; empty for a problem without costs of ops."""
    told = []
    for phase in (Phase.PREFILL, Phase.DECODE):
        parts = dict.fromkeys(("compute", "memory", "link", "latency"), 0.0)
        for n in problem.nodes(phase) if problem.costs else ():
            for part in parts:
                parts[part] += float(getattr(problem.costs[n][placement.mesh[n]], part) * problem.times[n])
        if any(parts.values()):
            told.append(f"{phase} {max(parts, key=lambda part: parts[part])}")
    return ", ".join(told)


def price_window(split: Fleet, others: Sequence[Fleet], kind: str) -> tuple[float, float] | None:
    """($/h, $/h) of one device of `kind` between which the split's fleet costs less than every other; None: at no price.

    What a fleet costs is a straight line in that price, so each other fleet bounds it from one side.
    """
    low, high = 0.0, float("inf")
    fixed, slope = split.line(kind)
    for other in others:
        other_fixed, other_slope = other.line(kind)
        if slope == other_slope:
            if fixed >= other_fixed:
                return None
            continue
        level = (other_fixed - fixed) / (slope - other_slope) * 3600
        low, high = (low, min(high, level)) if slope > other_slope else (max(low, level), high)
    return (low, high) if low < high and high > 0 else None


def flips(problem: Problem, wins: Callable[[Problem], bool]) -> float | None:
    """Bandwidth [B/s] of the links between kinds below which a placement no longer wins; None where bandwidth does not decide."""
    kinds = np.array(problem.kinds)
    across = kinds[:, None] != kinds[None, :]

    def at(beta: float) -> bool:  # ports give at least what is tried, so that it alone decides
        return wins(dataclasses.replace(problem, beta=np.where(across & (problem.beta > 0), beta, problem.beta), wire=np.where(across & (problem.wire > 0), np.maximum(beta, problem.wire), problem.wire)))

    low, high = 1e3, 1e15
    if at(low) or not at(high):
        return None
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if at(middle) else (middle, high)
    return high


@checked
def explain(problem: Problem, *, load: float = 1.0, busiest: float = 0.8, others: Sequence[Problem] = ()) -> Answer:
    """Hold the announced split against the alternatives at `load` requests/s, with no machine busier than `busiest` of the time (see `fleet`).

    others: the same request on further clusters, such as GPUs; of each, everything on one kind, and the split over its meshes where it has two.
    Raises InfeasibleError where the split or every single kind does not fit.
    """
    found = [*((problem, a) for a in alternatives(problem)), (problem, _tried(problem, "best found", lambda: portfolio(problem)))]
    for other in others:
        name = other.cluster.name if other.cluster is not None else "another cluster"
        for a in alternatives(other):
            if a.name == "split" and len(other.meshes) == 1:
                continue
            found.append((other, a if a.name != "split" else dataclasses.replace(a, name=f"split over {name}")))
    loaded = [dataclasses.replace(a, fleet=fleet(of, a.placement, load, busiest=busiest)) if a.placement is not None else a for of, a in _told_once(found)]
    split = next(a for a in loaded if a.name == "split")
    rivals = [a for a in loaded if a.fleet is not None and a.name not in ("split", "best found")]
    ours = [a for a in rivals if a.fleet is not None and a.fleet.problem is problem]
    if split.fleet is None or split.placement is None or split.estimate is None or not ours:
        lacking = split if split.fleet is None else loaded[0]
        raise InfeasibleError(f"{lacking.name}: {lacking.why_not}", where="explain", mend="use a larger cluster")
    fleets = [a.fleet for a in rivals if a.fleet is not None]
    best = min(rivals, key=lambda a: a.fleet.usd_per_mtok)  # type: ignore[union-attr]
    fastest = min(a.estimate.e2e for a in ours if a.estimate is not None)
    least = min(f.usd_per_second for f in fleets)
    decode, placed = int(split.placement.mesh[problem.nodes(Phase.DECODE)[0]]), split.placement
    kind, price = problem.kinds[decode], float(problem.price[decode]) / devices_of(problem, decode) * 3600
    answer = Answer(
        rate=load, split=split, best=best, alternatives=tuple(loaded), decode_kind=kind, window=price_window(split.fleet, fleets, kind),
        ingest=flips(problem, lambda p: fleet(p, placed, load, busiest=busiest).usd_per_second < least), flip_beta=flips(problem, lambda p: evaluate(p, placed).e2e < fastest), sentence="",
    )  # fmt: skip
    return dataclasses.replace(answer, sentence=_sentence(answer, price, split.fleet.usd_per_second < least, split.estimate.e2e < fastest))


def _told_once(found: Sequence[tuple[Problem, Alternative]]) -> list[tuple[Problem, Alternative]]:
    """Of alternatives of one name, such as the same GPUs in two clusters, the first that can be done."""
    kept: dict[str, tuple[Problem, Alternative]] = {}
    for of, a in found:
        if a.name not in kept or (kept[a.name][1].placement is None and a.placement is not None):
            kept[a.name] = of, a
    return list(kept.values())


def _numbers(a: Alternative) -> str:
    assert a.fleet is not None and a.estimate is not None
    most: dict[str, float] = {}
    for kind, b, copies in zip(a.fleet.problem.kinds, a.fleet.busy, a.fleet.copies, strict=True):
        if copies:
            most[kind] = max(most.get(kind, 0.0), b)
    busy = ", ".join(f"{kind} {100 * b:.0f} %" for kind, b in most.items())
    return f"takes {a.fleet.machines} (busy at most: {busy}), TTFT {seconds(a.fleet.ttft)}, TPOT {seconds(a.estimate.tpot)}, {dollars(a.fleet.usd_per_mtok)} per million tokens"


def _sentence(answer: Answer, price: float, cheaper: bool, faster: bool) -> str:
    split, kind = answer.split, answer.decode_kind
    assert split.estimate is not None and split.fleet is not None
    if answer.window is None:
        money = f"it is the cheapest at no price of a {kind}"
    else:
        low, high = answer.window
        between = f"between {dollars(low)} and {dollars(high)}" if low > 0 and high < float("inf") else f"above {dollars(low)}" if low > 0 else f"below {dollars(high)}"
        money = f"it is the cheapest {between} per {kind}-hour (the profile says {dollars(price)})" if low > 0 or high < float("inf") else f"it is the cheapest at any price of a {kind}"
    ingest = f"above {rate(answer.ingest)} of ingest" if answer.ingest is not None else f"{'at any' if cheaper else 'at no'} bandwidth between the two"
    speed = f"faster end to end above {rate(answer.flip_beta)}" if answer.flip_beta is not None else f"{'faster' if faster else 'slower'} end to end at any bandwidth"
    return (
        f"At {answer.rate:g} request{'s' * (answer.rate != 1)}/s{f' of {n} sequences each' if (n := split.fleet.problem.workload.batch) > 1 else ''} the announced split {_numbers(split)}; idle but for one request, its machines cost {dollars(split.estimate.usd_reserved)}, saturated "
        f"{dollars(split.estimate.usd_per_mtok)}. The cheapest alternative ({answer.best.name}) {_numbers(answer.best)}. At this load the split pays {ingest}, and "
        f"{money}. One request alone is {speed} than on one kind of machine."
    )
