"""Which numbers a plan's outcome rests on: each one of the cluster's at the ends of its band, the others as they are.

A number decides the outcome if the policy places differently at one of its ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from partition.arguments import checked
from partition.errors import InfeasibleError, PlacementError
from partition.evaluation import evaluate
from partition.hardware import End, Kind
from partition.overrides import banded
from partition.pipeline import place
from partition.problem import Placement, Problem, on
from partition.tables import table
from partition.units import outcome, shown

if TYPE_CHECKING:
    from partition.pipeline import Plan
    from partition.policies import Policy


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Swing:
    """What one number does: the objective's score at the low and at the high end of its band, and whether the policy places otherwise there.

    kept: the scores of the plan's own placement; moved: those of what the policy then chooses; None where it finds nothing.
    """

    name: str
    kind: Kind
    dimension: str
    low: float
    high: float
    kept: tuple[float, float]
    moved: tuple[float | None, float | None]
    decides: bool

    @property
    def width(self) -> float:
        """How far the plan's own score moves over the band, as a share of the lower end's."""
        a, b = sorted(self.kept)
        return (b - a) / a if a else 0.0


@checked
def sensitivity(plan: Plan, policy: str | Policy | None = None, progress: Callable[[str], None] | None = None) -> tuple[Swing, ...]:
    """Vary each number that has a band, capacities left out; those that decide the placement first, then the widest swings.

    policy: what places anew, by default the plan's own by its name. Raises PlacementError for a plan that was loaded.
    """
    problem, cluster, found = plan.problem, plan.problem.cluster, []
    if problem.phases is None or cluster is None:
        raise PlacementError("a loaded plan has no program to take the cost of", where=plan.title, mend="plan the model again")
    chooser = policy if policy is not None else plan.policy

    def score(posed: Problem, placement: Placement) -> float:
        return evaluate(posed, dataclasses.replace(placement, problem=posed)).score(problem.objective)

    for name, dimension, q in banded(cluster):
        if progress is not None:
            progress(f"vary {name}")
        kept, moved, decides = [], list[float | None](), False
        for end in (End.LOW, End.HIGH):
            posed = on(problem, cluster.replace({name: float(q.at(end))}))
            kept.append(score(posed, plan.placement))
            try:
                placement = place(posed, chooser)
            except InfeasibleError:
                moved.append(None)
                continue
            moved.append(score(posed, placement))
            decides |= not np.array_equal(placement.mesh, plan.placement.mesh)
        found.append(Swing(name=name, kind=q.kind, dimension=dimension, low=float(q.at(End.LOW)), high=float(q.at(End.HIGH)), kept=(kept[0], kept[1]), moved=(moved[0], moved[1]), decides=decides))
    return tuple(sorted(found, key=lambda s: (not s.decides, -s.width, s.name)))


def sensitivity_text(plan: Plan, swings: tuple[Swing, ...], most: int = 12) -> str:
    """The swings as a table, and what the outcome rests on in a line."""
    objective = plan.problem.objective
    lines = [(s.name, str(s.kind), f"{shown(s.low, s.dimension)} .. {shown(s.high, s.dimension)}", " .. ".join(outcome(abs(x), objective) for x in s.kept), f"{100 * s.width:.1f} %", "yes" if s.decides else "no") for s in swings[:most]]
    deciding = [f"{s.name} ({s.kind})" for s in swings if s.decides]
    rests = f"The placement changes within the band of {', '.join(deciding)}." if deciding else "No number changes the placement within its band."
    title = f"What {objective} rests on" + (f" (the first {most} of {len(swings)})" if len(swings) > most else "")
    return table(title, ("number", "kind", "band", objective, "swing", "changes the placement"), lines) + f"\n{rests}"
