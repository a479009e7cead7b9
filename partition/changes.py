"""diff(): how two plans differ, in what went in and in what came out, and which of the inputs caused it.

Each input that differs is put into the first plan alone, which is then made again: what the outcome does is what that input causes. Where the nodes are the
same, the second plan's numbers are also tried on the first plan's placement, which tells new numbers from a new placement.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from partition.arguments import checked
from partition.errors import PartitionError, PlacementError
from partition.evaluation import evaluate, verify
from partition.overrides import quantities
from partition.pipeline import Plan, plan, request
from partition.problem import Placement
from partition.tables import table
from partition.units import outcome, shown
from partition.workload import USUAL, sizes_in

if TYPE_CHECKING:
    from partition.program import Program

OUTCOMES = ("ttft", "tpot", "e2e", "throughput", "usd_per_mtok", "joules_per_token")
MOST = 12
"""Numbers of a cluster that are tried one by one; more are tried together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """An input that is another. dimension: of a number of the cluster, see `units.UNITS`. alone: outcomes of the first plan made again with this input alone changed; empty where that cannot be, which `why_not` says."""

    what: str
    before: Any
    after: Any
    dimension: str = ""
    alone: Mapping[str, float] = dataclasses.field(default_factory=dict)
    why_not: str = ""

    @property
    def sides(self) -> tuple[str, str]:
        """Before and after, as people read them."""
        one, other = (shown(v, self.dimension) if self.dimension and isinstance(v, float) else str(v) for v in (self.before, self.after))
        return one, other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """before, after: outcomes of both plans. kept: of the first placement under the second plan's numbers, None where the nodes are others. moved: (phase, mesh before, mesh after) -> nodes."""

    objective: str
    inputs: tuple[Change, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]
    kept: Mapping[str, float] | None
    moved: Mapping[tuple[str, str, str], int]

    @property
    def causes(self) -> list[Change]:
        """Inputs that were tried alone, those first that move the objective most."""
        return sorted((c for c in self.inputs if c.alone), key=lambda c: -abs(c.alone[self.objective] - self.before[self.objective]))

    def __str__(self) -> str:
        parts = []
        if not self.inputs and self.before == self.after and not self.moved:
            return "the plans are the same"
        told = {c.what for c in self.causes}
        rows = [(c.what, *c.sides, outcome(c.alone[self.objective], self.objective), _share(c.alone[self.objective], self.before[self.objective]), self._most(c)) for c in self.causes]
        if rows:
            parts.append(table("Inputs that differ, each alone", ("input", "first", "second", self.objective, "effect", "what moves most"), rows))
        if rest := [(c.what, *c.sides, c.why_not) for c in self.inputs if c.what not in told]:
            parts.append(table("Other inputs" if rows else "Inputs that differ", ("input", "first", "second", ""), rest))
        kept = self.kept or {}
        parts.append(table("Outcomes", ("", "first", "its placement, second numbers", "second", "change"), [(k, outcome(self.before[k], k), outcome(kept[k], k) if kept else "-", outcome(self.after[k], k), _share(self.after[k], self.before[k])) for k in OUTCOMES]))
        if self.moved:
            parts.append(table("Nodes that moved", ("phase", "from", "to", "nodes"), [(*k, str(n)) for k, n in sorted(self.moved.items())]))
        return "\n\n".join(parts)

    def _most(self, change: Change) -> str:
        """The outcome that an input moves most, as a share of what it was."""
        moved = {k: change.alone[k] / self.before[k] - 1 for k in OUTCOMES if self.before[k]}
        name = max(moved, key=lambda k: abs(moved[k]), default="")
        return f"{name} {_share(change.alone[name], self.before[name])}" if name and moved[name] else "nothing"


def _share(after: float, before: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else "-"


def inputs(made: Plan) -> dict[str, Any]:
    """Name -> value of all that went into a plan."""
    found: dict[str, Any] = dict(made.request) | {"policy": made.policy, "objective": made.problem.objective}
    found |= {f"limit {k}": v for k, v in made.problem.limits.items()}
    if (cluster := made.problem.cluster) is not None:
        found["meshes"] = ", ".join(f"{m.name}: {m.count} {m.device.name}" for m in cluster.meshes)
        found |= {name: float(q) for name, _, q in quantities(cluster)}
    return found | {f"version of {k}": v for k, v in made.versions.items()}


def outcomes(made: Any) -> dict[str, float]:
    """The objectives of an estimate."""
    return {k: float(getattr(made, k)) for k in OUTCOMES}


@checked
def diff(a: Plan, b: Plan, *, again: bool = True, progress: Callable[[str], None] | None = None) -> Changes:
    """How two plans (as made, or loaded) differ. again: make the first plan again with each input that differs alone, where both are of models by name.

    Raises nothing for plans that have little in common: what cannot be compared is left out.
    """
    say = progress or (lambda _: None)
    one, other = inputs(a), inputs(b)
    names = [k for k in {**one, **other} if one.get(k) != other.get(k)]
    numbers = {name: dimension for p in (a, b) if p.problem.cluster is not None for name, dimension, _ in quantities(p.problem.cluster)}
    found = [Change(what=k, before=one.get(k, "-"), after=other.get(k, "-"), dimension=numbers.get(k, "")) for k in names]
    if len(several := [c for c in found if c.what in numbers]) > MOST:
        found = [c for c in found if c.what not in numbers] + [Change(what="numbers of the cluster", before=f"{len(several)} of them", after="")]
    if again and a.request and b.request:
        traced = functools.cache(lambda model, sizes: _traced(model, dict(sizes)))
        found = [_tried(a, b, c, numbers, traced, say) for c in found]
    same = a.problem.names == b.problem.names and len(a.problem.meshes) == len(b.problem.meshes)
    moved = Counter((str(a.problem.phase[n]), _at(a, n), _at(b, n)) for n in range(len(a.problem)) if a.placement.of(n) != b.placement.of(n)) if same else Counter()
    kept = None
    if same:
        try:
            placement = Placement(mesh=a.placement.mesh, also=a.placement.also, problem=b.problem)
            kept = outcomes(evaluate(b.problem, verify(b.problem, placement)))
        except PartitionError:  # it does not fit there, or breaks a limit
            kept = None
    return Changes(objective=b.problem.objective, inputs=tuple(found), before=outcomes(a.estimate), after=outcomes(b.estimate), kept=kept, moved=dict(moved))


def _at(made: Plan, n: int) -> str:
    return " + ".join(made.problem.meshes[m] for m in made.placement.of(n))


def _traced(model: str, sizes: Mapping[str, int]) -> Program:
    from partition.program import trace

    fn, args = request(model, **sizes)
    return trace(fn, *args)


def _tried(a: Plan, b: Plan, change: Change, numbers: Collection[str], traced: Callable[[str, tuple[tuple[str, int], ...]], Program], say: Callable[[str], None]) -> Change:
    """The change with what it does to the first plan alone. traced: (model, sizes) -> its program."""
    if change.what.startswith("version of"):
        return change
    asked, cluster, other = dict(a.request), a.problem.cluster, b.problem.cluster
    policy, objective, limits = a.policy, a.problem.objective, dict(a.problem.limits)
    assert cluster is not None and other is not None
    try:
        if change.what in asked:
            asked[change.what] = b.request[change.what]
        elif change.what in USUAL:
            return dataclasses.replace(change, why_not="one of the models has its own")
        elif change.what == "policy":
            policy = b.policy
        elif change.what == "objective":
            objective = b.problem.objective
        elif change.what.startswith("limit "):
            name = change.what.removeprefix("limit ")
            limits = {k: v for k, v in limits.items() if k != name} | ({name: b.problem.limits[name]} if name in b.problem.limits else {})
        elif change.what == "meshes" or "-" in (change.before, change.after) or change.what not in numbers:
            cluster = other
        else:
            cluster = cluster.replace({change.what: change.after})
        say(f"make the first plan with {change.what} {change.sides[1]}")
        program = traced(asked["model"], tuple(sizes_in(asked).items()))
        made = plan(program, cluster=cluster, policy=policy, objective=objective, limits=limits, trips=asked.get("trips"), sharding=asked.get("sharding", "search"))
        return dataclasses.replace(change, alone=outcomes(made.estimate))
    except PartitionError as error:
        return dataclasses.replace(change, why_not=f"alone it gives no plan: {error.what}")


def load_both(a: Any, b: Any) -> tuple[Plan, Plan]:
    """Two saved plans. Raises OutputError; PlacementError where both are one file."""
    if str(a) == str(b):
        raise PlacementError("both are the same file", where=str(a), mend="name two plans")
    return Plan.load(a), Plan.load(b)
