"""examine(): the sentences of the announcement, held one by one against the model: a verdict, how sure it is, and the number that decides it.

In March 2026 AWS and Cerebras said that prefill is bound by arithmetic and decode by memory, that wafers decode many times faster than GPUs,
that the split costs less than one kind of machine, and that answers are near instant. Each is true of some machines, sizes and prices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from partition.errors import InfeasibleError, PlacementError
from partition.evaluation import Estimate, evaluate
from partition.explanation import alternatives
from partition.phases import Phase, Phases
from partition.pipeline import place
from partition.policies import single
from partition.problem import Placement, Problem, on, pose
from partition.profiles import cluster as find_cluster
from partition.tables import table

_INSTANT = {"voice": 0.3, "live coding": 0.5, "an agent's step": 1.0}
"""Seconds until the first token that feel like no wait (assumed)."""

_MANY = 5.0
"""How many times faster "many times" is taken to be (assumed)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A sentence and what the model says of it. verdict: "holds", "fails", or "depends" where the ends of the bands disagree. says: the numbers;
    rests: what decides it."""

    sentence: str
    verdict: str
    says: str
    rests: str


def examine(
    make: Callable[[], tuple[Any, tuple[Any, ...]]], *, split: str = "trn2_efa_4cs3", gpus: str = "h100_only", progress: Callable[[str], None] | None = None,
) -> tuple[Claim, ...]:  # fmt: skip
    """Hold the announcement's sentences against one request. make: gives (fn, args). split, gpus: clusters of the two kinds of machine, and of GPUs.

    Raises InfeasibleError where the split does not hold the model.
    """
    from partition.phases import tag
    from partition.program import trace

    say = progress or (lambda _: None)
    say("trace")
    fn, args = make()
    phases = tag(trace(fn, *args))
    say(f"pose on {split}")
    problem = pose(phases, find_cluster(split), objective="usd_per_mtok")
    say("place the alternatives")
    *singles, announced = alternatives(problem)
    if (placement := announced.placement) is None:
        raise InfeasibleError(announced.why_not, where=f"cluster {split!r}", mend="name a larger cluster: --cluster")
    alone = {a.name: a.placement for a in singles if a.placement is not None}
    say(f"pose on {gpus}")
    others = _gpus(phases, gpus)
    return (*_bound(problem), _faster(problem, placement, others), _cheaper(problem, placement, alone, others), *_instant(problem, placement))


def _gpus(phases: Phases, name: str) -> tuple[Problem, Placement] | None:
    problem = pose(phases, find_cluster(name), objective="usd_per_mtok")
    try:
        return problem, place(problem, single)
    except (InfeasibleError, PlacementError):
        return None


def _ends(problem: Problem, placement: Placement) -> list[Estimate]:
    """What a placement gives at the nominal numbers, and with all at their better and their worse ends."""
    assert problem.cluster is not None
    posed = [problem, *(on(problem, problem.cluster.at(worse=worse)) for worse in (False, True))]
    return [evaluate(p, dataclasses.replace(placement, problem=p)) for p in posed]


def _verdict(holds: Sequence[bool]) -> str:
    return "holds" if all(holds) else "depends" if any(holds) else "fails"


def _bound(problem: Problem) -> list[Claim]:
    """Prefill by arithmetic, decode by memory: on each kind of machine, what most of the time goes to."""
    found = []
    for phase, wanted in ((Phase.PREFILL, "compute"), (Phase.DECODE, "memory")):
        holds, told = [], []
        for kind in sorted(set(problem.kinds)):
            m, parts = problem.kinds.index(kind), dict.fromkeys(("compute", "memory", "link", "latency"), 0.0)
            for n in problem.nodes(phase):
                for part in parts:
                    parts[part] += float(getattr(problem.costs[n][m], part)) * float(problem.times[n])
            most = max(parts, key=lambda part: parts[part])
            holds.append(most == wanted)
            told.append(f"{kind}: {most} ({100 * parts[most] / max(sum(parts.values()), 1e-30):.0f} %)")
        sentence = "Prefill is bound by compute" if phase is Phase.PREFILL else "Decode is bound by memory bandwidth"
        found.append(Claim(sentence=sentence, verdict=_verdict(holds), says=", ".join(told), rests="the machine: of a wafer, weights lie where they are used"))
    return found


def _faster(problem: Problem, placement: Placement, others: tuple[Problem, Placement] | None) -> Claim:
    sentence = "Decode is many times faster than on GPUs"
    if others is None:
        return Claim(sentence=sentence, verdict="depends", says="the GPUs do not hold the model", rests="the number of GPUs")
    ours, theirs = _ends(problem, placement), _ends(*others)
    ratio, low, high = theirs[0].tpot / ours[0].tpot, theirs[1].tpot / ours[2].tpot, theirs[2].tpot / ours[1].tpot
    return Claim(sentence=sentence, verdict=_verdict([x >= _MANY for x in (low, ratio, high)]), says=f"{ratio:.1f} times a token faster; {low:.1f} to {high:.1f} with all bands against or for it",
                 rests=f"what many is ({_MANY:g} here), and how many GPUs share a layer")  # fmt: skip


def _cheaper(problem: Problem, placement: Placement, alone: Mapping[str, Placement], others: tuple[Problem, Placement] | None) -> Claim:
    ours = [e.usd_per_mtok for e in _ends(problem, placement)]
    rivals = {kind: [e.usd_per_mtok for e in _ends(problem, p)] for kind, p in alone.items()}
    if others is not None:
        rivals[f"all on {others[0].kinds[0]}"] = [e.usd_per_mtok for e in _ends(*others)]
    cheapest = min(rivals, key=lambda kind: rivals[kind][0])
    best = rivals[cheapest]
    told = ", ".join(f"{kind} ${cost[0]:.2f} (${cost[1]:.2f} to ${cost[2]:.2f})" for kind, cost in sorted(rivals.items()))
    return Claim(sentence="The split costs less than one kind of machine", verdict=_verdict([ours[0] < best[0], ours[2] < best[1], ours[1] < best[2]]),
                 says=f"split ${ours[0]:.2f} (${ours[1]:.2f} to ${ours[2]:.2f}) per million tokens at full load; {told}", rests="the price of a wafer, how many batches its memory holds, the load")  # fmt: skip


def _instant(problem: Problem, placement: Placement) -> list[Claim]:
    ends = _ends(problem, placement)
    return [Claim(sentence=f"Near instant for {use}", verdict=_verdict([e.ttft <= limit for e in ends]),
                  says=f"first token after {ends[0].ttft:.3g} s ({ends[1].ttft:.3g} to {ends[2].ttft:.3g} s), then {1 / ends[0].tpot:,.0f} tokens/s each", rests=f"what instant is ({limit:g} s here), and an idle queue")
            for use, limit in _INSTANT.items()]  # fmt: skip


def claims_text(found: Sequence[Claim]) -> str:
    """The claims as a table, and what each rests on."""
    lines = [(c.sentence, c.verdict, c.says) for c in found]
    return "\n".join([table("The announcement, sentence by sentence", ("sentence", "verdict", "what"), lines), *(f"{c.sentence}: rests on {c.rests}." for c in found)])
