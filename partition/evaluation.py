"""What a placement gives: every objective defined once. Policies minimise it, bounds bound it, the timeline draws it.

`evaluate()` runs the list schedule of a placement and sums it up; `verify()` holds a placement to its problem and its capacities.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from partition.arguments import checked
from partition.errors import InfeasibleError, PlacementError
from partition.flood import flow, spans
from partition.graph import Value
from partition.problem import Placement, Problem
from partition.symbols import first
from partition.units import size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """Something that took time: node `node` on mesh `mesh`, or (node None) flow `flow` on the link `mesh` -> `to`."""

    start: float
    end: float
    mesh: int
    to: int | None = None
    node: int | None = None
    flow: int | None = None
    trip: int = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a placement gives for one batch.

    ttft [s]: until the decode side can go on from the first token, the exposed part of the hand-off included. tpot [s]: one trip of the
    token loop in its steady state. e2e [s]: the whole request. busy [m] and link_busy {(m, m): s}: seconds of work a request. occupied [m]: seconds
    that it keeps others from a mesh, less than busy where several are under way in the layers of a wafer.
    throughput [tokens/s]: with requests pipelined, as many as the busiest mesh, link or sender's ports let through. usd_per_mtok: $ per million
    tokens when every machine is paid for the time it is busy, as in a rate-matched fleet under full load. usd_reserved: the same
    when all used machines are kept for this one batch. joules_per_token [J]: of the machines while they are busy. crossings: values that pass from a mesh to another, each once for each mesh that takes it in. exposed [s]: hand-off time that prefill does not hide.
    """

    ttft: float
    tpot: float
    e2e: float
    throughput: float
    usd_per_mtok: float
    usd_reserved: float
    joules_per_token: float
    exposed: float
    busy: tuple[float, ...]
    occupied: tuple[float, ...]
    link_busy: Mapping[tuple[int, int], float]
    link_bytes: Mapping[tuple[int, int], float]
    memory: tuple[float, ...]
    crossings: int = 0

    def score(self, objective: str) -> float:
        """The number that a policy minimises for an objective."""
        value = getattr(self, objective)
        return -float(value) if objective == "throughput" else float(value)


FAR = 1e15
"""What is added to the score of a placement that breaks a limit, and again for each limit's worth that it is over: it is worse than all that keep them."""


def broken(problem: Problem, estimate: Estimate) -> dict[str, float]:
    """Limit -> by what share a placement breaks it."""
    found = {}
    for name, limit in problem.limits.items():
        value = float(getattr(estimate, name))
        if name == "crossings":  # may be held to 0
            value, limit = value + 1, np.floor(limit) + 1
        over = (limit / value if value > 0 else np.inf) if name == "throughput" else value / limit
        if over > 1 + 1e-9:
            found[name] = over - 1
    return found


def scored(problem: Problem, estimate: Estimate) -> float:
    """The number that a policy minimises: the problem's objective, and far more where a limit is broken, the more the further."""
    over = sum(broken(problem, estimate).values())
    return estimate.score(problem.objective) if not over else FAR * (1 + min(over, 1e6))


def later(a: Any, b: Any) -> Any:
    """The later of two times, one by one where they are arrays."""
    return np.maximum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else max(a, b)


def one(x: Any) -> Any:
    """A number as Python's own; an array as it is."""
    return x if isinstance(x, np.ndarray) and x.ndim else float(x)


class Schedule:
    """List schedule of a placement in node order: each mesh runs one node at a time, each link one transfer at a time.

    A transfer starts when its value is made and the link and the sender's ports are free, holds the link for bytes / beta and the ports for
    bytes / wire, and arrives alpha later. So the hand-off of a layer crosses while prefill goes on with the next, and several receivers
    that each take in less than the ports give are served at once.
    """

    def __init__(self, problem: Problem, placement: Placement, record: bool = False):
        self.p, self.where = problem, [placement.of(n) for n in range(len(problem))]
        self.free = [0.0] * len(problem.meshes)
        self.link_free: dict[tuple[int, int], float] = {}
        self.ports_free: dict[int, float] = {}
        self.done: dict[tuple[int, int], float] = {}  # (node, mesh) -> end
        self.arrived: dict[tuple[int, int], float] = {}  # (flow, other mesh) -> when it is there; at home, a mesh has it before it is free
        self.slots: list[Slot] | None = [] if record else None
        self.by_src: list[list[int]] = [[] for _ in problem.names]
        for i, f in enumerate(problem.flows):
            self.by_src[f.src].append(i)

    def run(self, nodes: Sequence[int], kinds: tuple[str, ...], trip: int = -1) -> float:
        """Run nodes in order, waiting for flows of these kinds; returns when the last one ends."""
        p, ends = self.p, dict[int, Any]()
        for n in nodes:
            for m in self.where[n]:
                start = self.free[m]
                for i in p.incoming[n]:
                    if (i, m) in self.arrived and p.flows[i].kind in kinds:
                        start = later(start, self.arrived[i, m])
                stop = start + one(p.seconds[n, m])
                self.free[m] = self.done[n, m] = ends[m] = stop
                if self.slots is not None:
                    self.slots.append(Slot(start=start, end=stop, mesh=m, node=n, trip=trip))
            self.send(n, trip)
        return functools.reduce(later, ends.values(), 0.0)

    def least(self, nodes: Sequence[int]) -> Any:
        """What running some nodes again and again takes at least: the work of the busiest mesh."""
        busy: dict[int, Any] = {}
        for n in nodes:
            for m in self.where[n]:
                busy[m] = busy.get(m, 0.0) + one(self.p.seconds[n, m])
        return functools.reduce(later, busy.values(), 0.0)

    def send(self, n: int, trip: int) -> None:
        """Start every transfer of what node n made, once for each mesh that reads it; those that leave together share the sender's ports."""
        p, home = self.p, self.where[n]
        leaving: list[tuple[int, int]] = []
        for i in self.by_src[n]:
            flow = p.flows[i]
            if trip < 0 and flow.kind in ("carry", "result"):
                continue
            leaving += [(i, m) for m in sorted({m for d in flow.dst for m in self.where[d]}) if m not in home]
        if not leaving:
            return
        src = home[0]
        made = later(self.done[n, src], self.ports_free.get(src, 0.0))
        self.ports_free[src] = made + sum(p.flows[i].nbytes / float(p.wire[src, m]) for i, m in leaving if p.wire[src, m] > 0)
        for i, m in leaving:
            start = later(made, self.link_free.get((src, m), 0.0))
            stop = start + p.flows[i].nbytes / float(p.beta[src, m]) if p.beta[src, m] > 0 else float("inf")
            stop = later(stop, self.ports_free[src]) if len({m for _, m in leaving}) > 1 else stop
            self.link_free[src, m] = stop
            self.arrived[i, m] = stop + float(p.alpha[src, m])
            if self.slots is not None:
                self.slots.append(Slot(start=start, end=self.arrived[i, m], mesh=src, to=m, flow=i, trip=trip))


def groups(problem: Problem) -> tuple[list[int], list[int], list[int]]:
    """Node numbers before the token loop, in it (condition first), and after it."""
    inside = [n for n, r in enumerate(problem.region) if r != "top"]
    if not inside:
        return list(range(len(problem))), [], []
    return list(range(inside[0])), inside, list(range(inside[-1] + 1, len(problem)))


WATCH: contextvars.ContextVar[Callable[[Problem, Placement, Estimate], None] | None] = contextvars.ContextVar("WATCH", default=None)
"""What is told every placement that is evaluated, where somebody listens."""


@checked
def evaluate(problem: Problem, placement: Placement, *, record: list[Slot] | None = None) -> Estimate:
    """Every objective of a placement. With `record`, the slots of the schedule (first trips only) are appended to it. Raises PlacementError for a mesh that is not there."""
    if placement.mesh.size and not 0 <= int(placement.mesh.min()) <= int(placement.mesh.max()) < len(problem.meshes):
        raise PlacementError(f"the placement names meshes {placement.mesh.min()} to {placement.mesh.max()}", where="evaluate(placement=...)", mend=f"give numbers from 0 to {len(problem.meshes) - 1}")
    if problem.rates is not None:
        found = _flooded(problem, placement)
    else:
        found = _through_host(problem, placement) if problem.ports is not None else _over_links(problem, placement, record)
    if (watch := WATCH.get()) is not None:
        watch(problem, placement, found)
    return found


def _over_links(problem: Problem, placement: Placement, record: list[Slot] | None) -> Estimate:
    before, inside, after = groups(problem)
    schedule = Schedule(problem, placement, record=record is not None)
    trips = problem.workload.trips if inside else 0
    prefill_end = schedule.run(before, ("forward",))
    handoff = [schedule.arrived.get((i, m), 0.0) for i, f in enumerate(problem.flows) if f.kind == "handoff"
               for d in f.dst for m in schedule.where[d]]  # fmt: skip
    ready = functools.reduce(later, handoff, prefill_end)
    ends, shown = [prefill_end], min(trips, 3)
    for trip in range(shown):
        ends.append(schedule.run(inside, ("forward", "handoff") if trip == 0 else ("forward", "handoff", "carry"), trip))
    tpot = later(ends[-1] - ends[-2], schedule.least(inside)) if shown else 0.0  # a late hand-off may hide what a trip takes
    rest = (trips - shown) * tpot
    end = schedule.run(after, ("forward", "result")) + rest if after else ends[-1] + rest
    if record is not None:
        record.extend(schedule.slots or [])
    return _summary(problem, placement, ttft=ready, tpot=tpot, e2e=later(end, ready), exposed=ready - prefill_end)


def crossings(problem: Problem, placement: Placement) -> list[tuple[int, int, int]]:
    """Every transfer of a placement as (flow, from mesh, to mesh). A value goes once to each mesh that reads it, whatever for."""
    found: dict[tuple[Value, int, int], tuple[int, int, int]] = {}
    for i, f in enumerate(problem.flows):
        home = placement.of(f.src)
        for m in sorted({m for d in f.dst for m in placement.of(d)} - set(home)):
            key = (f.value, f.src, m)
            if key not in found or problem.flows[found[key][0]].times < f.times:
                found[key] = (i, home[0], m)
    return list(found.values())


def _summary(problem: Problem, placement: Placement, *, ttft: float, tpot: float, e2e: float, exposed: float) -> Estimate:
    busy = [0.0] * len(problem.meshes)
    for n in range(len(problem)):
        for m in placement.of(n):
            busy[m] += one(problem.seconds[n, m] * problem.times[n])
    link_busy: dict[tuple[int, int], float] = {}
    link_bytes: dict[tuple[int, int], float] = {}
    ports: dict[int, float] = {}
    passed = crossings(problem, placement)
    for i, a, b in passed:
        moved = problem.flows[i].nbytes * problem.flows[i].times
        link_bytes[a, b] = link_bytes.get((a, b), 0.0) + moved
        link_busy[a, b] = link_busy.get((a, b), 0.0) + (moved / float(problem.beta[a, b]) if problem.beta[a, b] > 0 else float("inf"))
        ports[a] = ports.get(a, 0.0) + (moved / float(problem.wire[a, b]) if problem.wire[a, b] > 0 else 0.0)
    tokens, used = problem.workload.tokens, [m for m, b in enumerate(busy) if first(b) > 0]
    occupied = _occupied(problem, placement, busy)
    bytes_usd = sum(b * float(problem.link_price[pair]) for pair, b in link_bytes.items())
    usd = sum(occupied[m] * float(problem.price[m]) for m in used) + bytes_usd
    reserved = sum(float(problem.price[m]) for m in used) * e2e + bytes_usd
    return Estimate(
        ttft=ttft, tpot=tpot, e2e=e2e, exposed=exposed, throughput=tokens / busiest if first(busiest := functools.reduce(later, [*occupied, *link_busy.values(), *ports.values()], 0.0)) > 0 else 0.0,
        usd_per_mtok=usd / tokens * 1e6, usd_reserved=reserved / tokens * 1e6,
        joules_per_token=sum(occupied[m] * float(problem.power[m]) for m in used) / tokens, busy=tuple(busy), occupied=tuple(occupied), link_busy=link_busy,
        link_bytes=link_bytes, memory=tuple(map(one, problem.memory(placement))), crossings=len(passed),
    )  # fmt: skip


def _through_host(problem: Problem, placement: Placement) -> Estimate:
    """What a placement gives where values pass through a host: a mesh works, gives out and takes in one after the other.

    A request is done when the last mesh is: each runs all of its nodes once its inputs are there (inf where two wait for each other); nodes on
    processors of the host run as soon as they can. Source: Tarnawski et al., NeurIPS 2020.
    """
    import networkx as nx

    assert problem.ports is not None
    where, ports = [int(m) for m in placement.mesh], problem.ports
    unit = [(m, n) if ports[m] == 0 else (m, -1) for n, m in enumerate(where)]
    busy = np.zeros(len(problem.meshes))
    np.add.at(busy, where, problem.seconds[np.arange(len(where)), where] * problem.times)
    took: dict[tuple[int, int], float] = {}
    for n, u in enumerate(unit):
        took[u] = took.get(u, 0.0) + float(problem.seconds[n, where[n]] * problem.times[n])
    waits = np.zeros(len(problem.meshes))
    order: nx.DiGraph[tuple[int, int]] = nx.DiGraph()
    order.add_nodes_from(took)
    for f in problem.flows:
        home, cost = unit[f.src], f.nbytes * f.times
        away = {unit[d] for d in f.dst} - {home}
        for u in ({home} if {m for m, _ in away} - {home[0]} else set()) | {u for u in away if u[0] != home[0]}:
            waits[u[0]] += cost * ports[u[0]]
            took[u] += float(cost * ports[u[0]])
        order.add_edges_from((home, u) for u in away)
    ends: dict[tuple[int, int], float] = {}
    try:
        for u in nx.topological_sort(order):
            ends[u] = took[u] + max((ends[p] for p in order.predecessors(u)), default=0.0)
        done = max(ends.values())
    except nx.NetworkXUnfeasible:
        done = float("inf")
    load, tokens = busy + waits, problem.workload.tokens
    used, longest = sorted(set(where)), float(load.max())
    return Estimate(
        ttft=done, tpot=0.0, e2e=done, exposed=0.0, throughput=tokens / longest if longest > 0 else 0.0, usd_per_mtok=float(load @ problem.price) / tokens * 1e6,
        usd_reserved=float(problem.price[used].sum()) * done / tokens * 1e6, joules_per_token=float(load @ problem.power) / tokens, busy=tuple(busy.tolist()),
        occupied=tuple(load.tolist()), link_busy={}, link_bytes={}, memory=tuple(problem.memory(placement).tolist()), crossings=len(crossings(problem, placement)),
    )  # fmt: skip


def _flooded(problem: Problem, placement: Placement) -> Estimate:
    """What a placement gives where machines hold layers in a row: the tokens that flow through them (see `flood`); times are not modelled."""
    tokens, none = flow(problem, spans(problem, placement)), (0.0,) * len(problem.meshes)
    return Estimate(ttft=0.0, tpot=0.0, e2e=0.0, exposed=0.0, throughput=tokens, usd_per_mtok=0.0, usd_reserved=0.0, joules_per_token=0.0, busy=none, occupied=none,
                    link_busy={}, link_bytes={}, memory=none)  # fmt: skip


def under_way(problem: Problem, placement: Placement) -> list[Any]:
    """How many batches each mesh works on at once: as many as its layers side by side, and as its memory holds beside the weights; at least one."""
    weights, batch = problem.held(placement)
    most = []
    for m, depth in enumerate(problem.depth):
        room = np.floor((problem.capacity[m] - weights[m]) / np.maximum(batch[m], 1.0)) if depth > 1 else 1.0
        most.append(np.maximum(1.0, np.minimum(depth, room)))
    return most


def _occupied(problem: Problem, placement: Placement, busy: Sequence[Any]) -> list[Any]:
    """Seconds of each mesh that a batch keeps from others: of a pipelined one what its longest layer does, and no less than memory allows."""
    if (problem.depth == 1).all():
        return list(busy)
    most, parts = under_way(problem, placement), dict[tuple[int, int], Any]()
    for n in range(len(problem)):
        for m in placement.of(n):
            key = m, int(problem.layer[n]) if problem.layer[n] >= 0 else -1 - n
            parts[key] = parts.get(key, 0.0) + one(problem.seconds[n, m] * problem.times[n])
    longest = [functools.reduce(later, (p for (at, _), p in parts.items() if at == m), 0.0) for m in range(len(busy))]
    return [b if problem.depth[m] == 1 else one(later(longest[m], b / most[m])) for m, b in enumerate(busy)]


def verify(problem: Problem, placement: Any) -> Placement:
    """Hold a placement to the problem. Raises PlacementError for a wrong shape, mesh or pin, InfeasibleError for what does not fit."""
    if not isinstance(placement, Placement):
        raise PlacementError(f"a policy returned {type(placement).__name__}, not a Placement", where="policy",
                             mend="return problem.placement(array of mesh numbers)")  # fmt: skip
    mesh = np.asarray(placement.mesh)
    if mesh.shape != (len(problem),):
        raise PlacementError(f"the placement has {mesh.size} entries, the problem {len(problem)} nodes", where="placement",
                             mend="give one mesh number for each node, in the problem's order")  # fmt: skip
    if mesh.dtype.kind not in "iu":
        raise PlacementError(f"mesh numbers are whole numbers, the placement holds {mesh.dtype}", where="placement",
                             mend="return problem.placement(array of mesh numbers)")  # fmt: skip
    for n, others in placement.also.items():
        if not 0 <= n < len(problem):
            raise PlacementError(f"node {n} is placed, which this problem does not have", where="placement.also", mend=f"nodes run from 0 to {len(problem) - 1}")
        known = isinstance(others, tuple) and all(isinstance(m, int | np.integer) for m in others)
        if not known or len({int(mesh[n]), *others}) != 1 + len(others):
            raise PlacementError(f"the further meshes of node {n} are {others!r}", where="placement.also",
                                 mend="give a tuple of mesh numbers, each once and without the node's own; or use problem.placement(...)")  # fmt: skip
    foreign = [n for n in range(len(problem)) if any(not 0 <= m < len(problem.meshes) for m in placement.of(n))]
    if foreign:
        n = foreign[0]
        raise PlacementError(f"node {n} is placed on mesh {mesh[n]}, which this problem does not have", where=f"node {n} ({problem.names[n]})",
                             mend=f"mesh numbers run from 0 to {len(problem.meshes) - 1}: {', '.join(problem.meshes)}")  # fmt: skip
    if wrong := [n for n, m in problem.pins.items() if m not in placement.of(n)]:
        raise PlacementError(f"node {wrong[0]} is pinned to {problem.meshes[problem.pins[wrong[0]]]} and placed elsewhere",
                             where=problem.names[wrong[0]], mend="keep pinned nodes on their mesh")  # fmt: skip
    if problem.rates is not None:
        spans(problem, placement)
    if unable := [(n, m) for n in range(len(problem)) for m in placement.of(n) if not np.isfinite(problem.seconds[n, m])]:
        n, m = unable[0]
        raise InfeasibleError(f"{problem.meshes[m]} cannot run {problem.names[n]}", where=f"node {n}", mend="place it on a mesh that supports it")
    if apart := [group for group in problem.together if len({placement.of(n) for n in group}) > 1]:
        raise InfeasibleError(f"{len(apart[0])} nodes that must share a mesh are on {len({placement.of(n) for n in apart[0]})}", where=", ".join(problem.names[n] for n in apart[0][:4]),
                              mend="place them together")  # fmt: skip
    if problem.contiguous and (cycle := _stages_in_a_circle(problem, placement)):
        raise InfeasibleError("the meshes are no stages in an order", where=" -> ".join(problem.meshes[m] for m in cycle), mend="give each mesh a run of the nodes")
    for i, a, b in crossings(problem, placement):
        if problem.beta[a, b] <= 0:
            f = problem.flows[i]
            raise InfeasibleError(f"no link joins {problem.meshes[a]} and {problem.meshes[b]}",
                                  where=f"{problem.names[f.src]} -> {problem.names[f.dst[0]]}",
                                  mend="add the link to the cluster, or place both on meshes that are joined")  # fmt: skip
    over = problem.memory(placement) - problem.capacity
    if (over > 0).any():
        m = int(over.argmax())
        raise InfeasibleError(
            f"{problem.meshes[m]} would hold {size(float(over[m] + problem.capacity[m]))}, {size(float(over[m]))} more than its capacity",
            where=f"mesh {problem.meshes[m]} ({size(float(problem.capacity[m]))} usable)",
            mend="use more meshes or a larger cluster, another policy, a smaller batch or a shorter context",
        )  # fmt: skip
    if problem.limits and (over := broken(problem, estimate := evaluate(problem, placement))):
        worst = max(over, key=lambda name: over[name])
        raise InfeasibleError(f"{worst} is {getattr(estimate, worst):.4g}, its limit {problem.limits[worst]:.4g}", where=f"limits on {', '.join(problem.limits)}",
                              mend=f"relax {' and '.join(sorted(over))}, use the policy 'portfolio', or another cluster")  # fmt: skip
    return placement if placement.problem is problem else dataclasses.replace(placement, problem=problem)


def _stages_in_a_circle(problem: Problem, placement: Placement) -> list[int]:
    """Meshes of which each has a node of a phase that must stand before one of the next, the first again after the last; empty where there are none."""
    import networkx as nx

    for phase in set(problem.phase):
        order: nx.DiGraph[int] = nx.DiGraph()
        order.add_edges_from((int(placement.mesh[a]), int(placement.mesh[b])) for a, b in problem.precedes if problem.phase[a] is phase and placement.mesh[a] != placement.mesh[b])
        if not nx.is_directed_acyclic_graph(order):
            return [a for a, _ in nx.find_cycle(order)]
    return []
