"""schedule(): who runs when. The same schedule that `evaluate` scores, with its slots kept, to draw and to look at."""

from __future__ import annotations

import dataclasses

from partition.arguments import checked
from partition.evaluation import Estimate, Slot, evaluate
from partition.problem import Placement, Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """slots: nodes on meshes and transfers on links, for everything before the loop, its first three trips, and what follows.

    estimate: the whole request. makespan [s] is its end-to-end time; bottleneck the mesh or link that is busiest in a request.
    """

    problem: Problem = dataclasses.field(repr=False)
    placement: Placement = dataclasses.field(repr=False)
    slots: tuple[Slot, ...] = dataclasses.field(repr=False)
    estimate: Estimate

    @property
    def makespan(self) -> float:
        """Seconds of the whole request."""
        return self.estimate.e2e

    @property
    def bottleneck(self) -> str:
        """The mesh or link that a request keeps longest from others: what bounds throughput."""
        p, e = self.problem, self.estimate
        work = {p.meshes[m]: b for m, b in enumerate(e.occupied)}
        work |= {f"{p.meshes[a]} -> {p.meshes[b]}": s for (a, b), s in e.link_busy.items()}
        return max(work, key=lambda k: work[k])


@checked
def schedule(problem: Problem, placement: Placement) -> Timeline:
    """Lay a placement out in time."""
    slots: list[Slot] = []
    estimate = evaluate(problem, placement, record=slots)
    return Timeline(problem=problem, placement=placement, slots=tuple(slots), estimate=estimate)
