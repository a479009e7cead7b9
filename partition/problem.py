"""The placement problem as numbers: all that a policy sees. Nodes, seconds[n, m], flows, residents, capacities, links, prices.

`pose()` makes it from a tagged program and a cluster. `evaluate()` defines every objective once: policies minimise it, bounds bound
it, the timeline draws it. `verify()` holds a placement to the problem and to the capacities. No JAX here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from partition.coarsen import Block, by_block, coarsen, region_graph
from partition.costs import Cost, costs
from partition.errors import InfeasibleError, NameUnknownError, PlacementError
from partition.flow import Flow, Resident, flows
from partition.graph import Role, Value
from partition.hardware import Cluster
from partition.phases import Phase, Phases, is_weight
from partition.sharding import Layout, layout
from partition.units import size
from partition.work import Work, loop_trips, work
from partition.workload import Workload

if TYPE_CHECKING:
    import networkx as nx

OBJECTIVES = ("ttft", "tpot", "e2e", "throughput", "usd_per_mtok")
"""What a policy may be asked for: times [s] and money are minimised, throughput [tokens/s] is maximised."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """mesh[n] is the mesh number of node n of `problem`; `also` gives the other meshes of a node that is replicated."""

    mesh: np.ndarray
    also: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    problem: Problem | None = dataclasses.field(default=None, repr=False)

    def of(self, node: int) -> tuple[int, ...]:
        """All meshes of a node."""
        return (int(self.mesh[node]), *self.also.get(node, ()))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """n nodes in topological order, m meshes.

    seconds [n, m]: one run of a node on a mesh. times [n]: runs a request. flows: what passes between nodes. resident [r, m]: bytes of
    each resident on each mesh, copies included. activation [n, m]: bytes alive while a node runs. capacity [m] B, alpha [m, m] s,
    beta [m, m] B/s (0: no link), price [m] $/s, link_price [m, m] $/B. pins: node -> mesh. kinds: device of each mesh.
    """

    names: tuple[str, ...]
    phase: tuple[Phase, ...]
    region: tuple[str, ...]
    meshes: tuple[str, ...]
    kinds: tuple[str, ...]
    seconds: np.ndarray
    times: np.ndarray
    flows: tuple[Flow, ...]
    residents: tuple[Resident, ...]
    resident: np.ndarray
    activation: np.ndarray
    capacity: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    price: np.ndarray
    link_price: np.ndarray
    workload: Workload
    objective: str = "e2e"
    pins: Mapping[int, int] = dataclasses.field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    works: tuple[Work, ...] = ()
    costs: tuple[tuple[Cost, ...], ...] = ()
    phases: Phases | None = dataclasses.field(default=None, repr=False)
    cluster: Cluster | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def nodes(self, *wanted: Phase) -> list[int]:
        """Node numbers of these phases, in topological order."""
        return [n for n, p in enumerate(self.phase) if p in wanted]

    @functools.cached_property
    def dag(self) -> nx.DiGraph:
        """Nodes and what must precede what within one trip (carries left out), with bytes on the edges."""
        import networkx as nx

        graph = nx.DiGraph()
        graph.add_nodes_from((n, {"name": self.names[n], "phase": str(self.phase[n])}) for n in range(len(self)))
        for f in self.flows:
            if f.kind != "carry":
                graph.add_edges_from(((f.src, d) for d in f.dst), bytes=f.nbytes)
        return graph

    @functools.cached_property
    def incoming(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the numbers of the flows that it reads."""
        found: list[list[int]] = [[] for _ in self.names]
        for i, f in enumerate(self.flows):
            for d in f.dst:
                found[d].append(i)
        return tuple(map(tuple, found))

    @functools.cached_property
    def incidence(self) -> np.ndarray:
        """bool [r, n]: whether resident r is needed by node n."""
        table = np.zeros((len(self.residents), len(self)), bool)
        for r, resident in enumerate(self.residents):
            table[r, list(resident.blocks)] = True
        return table

    def placement(self, mesh: Sequence[int] | np.ndarray) -> Placement:
        """A placement from one mesh number a node. Pinned nodes go where they are pinned, and nodes that both phases need are
        replicated to every mesh that reads them."""
        array = np.asarray(mesh, dtype=np.int64).copy()
        if array.shape != (len(self),):
            raise PlacementError(f"the placement has {array.size} entries, the problem {len(self)} nodes", where="placement",
                                 mend="give one mesh number for each node, in the problem's order")  # fmt: skip
        for n, m in self.pins.items():
            array[n] = m
        needed: dict[int, set[int]] = {}
        for n in reversed(self.nodes(Phase.BOTH)):
            readers = {d for f in self.flows if f.src == n for d in f.dst}
            needed[n] = {m for d in readers for m in needed.get(d, {int(array[d])})} or {int(array[n])}
            array[n] = min(needed[n])
        also = {n: tuple(sorted(ms)[1:]) for n, ms in sorted(needed.items()) if len(ms) > 1}
        return Placement(mesh=array, also=also, problem=self)

    def memory(self, placement: Placement) -> np.ndarray:
        """Bytes on each mesh [m]: residents (each counted once a mesh) and the largest activation of its nodes."""
        on = np.zeros((len(self), len(self.meshes)), bool)
        for n in range(len(self)):
            on[n, list(placement.of(n))] = True
        used = (self.incidence.astype(np.float32) @ on.astype(np.float32)) > 0
        held: np.ndarray = (used * self.resident).sum(axis=0)
        return held + np.where(on, self.activation, 0.0).max(axis=0, initial=0.0)


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
    token loop in its steady state. e2e [s]: the whole request. busy [m] and link_busy {(m, m): s}: seconds of work a request.
    throughput [tokens/s]: with requests pipelined, as many as the busiest mesh or link lets through. usd_per_mtok: $ per million
    tokens when every machine is paid for the time it is busy, as in a rate-matched fleet under full load. usd_reserved: the same
    when all used machines are kept for this one batch. exposed [s]: hand-off time that prefill does not hide.
    """

    ttft: float
    tpot: float
    e2e: float
    throughput: float
    usd_per_mtok: float
    usd_reserved: float
    exposed: float
    busy: tuple[float, ...]
    link_busy: Mapping[tuple[int, int], float]
    link_bytes: Mapping[tuple[int, int], float]
    memory: tuple[float, ...]

    def score(self, objective: str) -> float:
        """The number that a policy minimises for an objective."""
        value = getattr(self, objective)
        return -float(value) if objective == "throughput" else float(value)


class Schedule:
    """List schedule of a placement in node order: each mesh runs one node at a time, each link one transfer at a time.

    A transfer starts when its value is made and the link is free, holds the link for bytes / beta, and arrives alpha later. So the
    hand-off of a layer crosses while prefill goes on with the next.
    """

    def __init__(self, problem: Problem, placement: Placement, record: bool = False):
        self.p, self.where = problem, [placement.of(n) for n in range(len(problem))]
        self.free = [0.0] * len(problem.meshes)
        self.link_free: dict[tuple[int, int], float] = {}
        self.done: dict[tuple[int, int], float] = {}  # (node, mesh) -> end
        self.arrived: dict[tuple[int, int], float] = {}  # (flow, mesh) -> when it is there
        self.slots: list[Slot] | None = [] if record else None
        self.by_src: list[list[int]] = [[] for _ in problem.names]
        for i, f in enumerate(problem.flows):
            self.by_src[f.src].append(i)

    def run(self, nodes: Sequence[int], kinds: tuple[str, ...], trip: int = -1) -> float:
        """Run nodes in order, waiting for flows of these kinds; returns when the last one ends."""
        p, end = self.p, 0.0
        for n in nodes:
            for m in self.where[n]:
                start = self.free[m]
                for i in p.incoming[n]:
                    if p.flows[i].kind in kinds:
                        start = max(start, self.arrived.get((i, m), 0.0))
                stop = start + float(p.seconds[n, m])
                self.free[m] = self.done[n, m] = stop
                end = max(end, stop)
                if self.slots is not None:
                    self.slots.append(Slot(start=start, end=stop, mesh=m, node=n, trip=trip))
            self.send(n, trip)
        return end

    def send(self, n: int, trip: int) -> None:
        """Start every transfer of what node n made, once for each mesh that reads it."""
        p, home = self.p, self.where[n]
        for i in self.by_src[n]:
            flow = p.flows[i]
            if trip < 0 and flow.kind in ("carry", "result"):
                continue
            made = self.done[n, home[0]]
            for m in sorted({m for d in flow.dst for m in self.where[d]}):
                if m in home:
                    self.arrived[i, m] = self.done[n, m]
                    continue
                src = home[0]
                start = max(made, self.link_free.get((src, m), 0.0))
                stop = start + flow.nbytes / float(p.beta[src, m]) if p.beta[src, m] > 0 else float("inf")
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


def evaluate(problem: Problem, placement: Placement, *, record: list[Slot] | None = None) -> Estimate:
    """Every objective of a placement. With `record`, the slots of the schedule (first trips only) are appended to it."""
    before, inside, after = groups(problem)
    schedule = Schedule(problem, placement, record=record is not None)
    trips = problem.workload.trips if inside else 0
    prefill_end = schedule.run(before, ("forward",))
    handoff = [schedule.arrived.get((i, m), 0.0) for i, f in enumerate(problem.flows) if f.kind == "handoff"
               for d in f.dst for m in schedule.where[d]]  # fmt: skip
    ready = max([prefill_end, *handoff])
    ends, shown = [prefill_end], min(trips, 3)
    for trip in range(shown):
        ends.append(schedule.run(inside, ("forward", "handoff") if trip == 0 else ("forward", "handoff", "carry"), trip))
    tpot = ends[-1] - ends[-2] if shown else 0.0
    rest = (trips - shown) * tpot
    end = schedule.run(after, ("forward", "result")) + rest if after else ends[-1] + rest
    if record is not None:
        record.extend(schedule.slots or [])
    return _summary(problem, placement, ttft=ready, tpot=tpot, e2e=max(end, ready), exposed=ready - prefill_end)


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
            busy[m] += float(problem.seconds[n, m] * problem.times[n])
    link_busy: dict[tuple[int, int], float] = {}
    link_bytes: dict[tuple[int, int], float] = {}
    for i, a, b in crossings(problem, placement):
        moved = problem.flows[i].nbytes * problem.flows[i].times
        link_bytes[a, b] = link_bytes.get((a, b), 0.0) + moved
        link_busy[a, b] = link_busy.get((a, b), 0.0) + (moved / float(problem.beta[a, b]) if problem.beta[a, b] > 0 else float("inf"))
    tokens, used = problem.workload.tokens, [m for m, b in enumerate(busy) if b > 0]
    bytes_usd = sum(b * float(problem.link_price[pair]) for pair, b in link_bytes.items())
    usd = sum(busy[m] * float(problem.price[m]) for m in used) + bytes_usd
    reserved = sum(float(problem.price[m]) for m in used) * e2e + bytes_usd
    return Estimate(
        ttft=ttft, tpot=tpot, e2e=e2e, exposed=exposed, throughput=tokens / max([*busy, *link_busy.values(), 1e-30]),
        usd_per_mtok=usd / tokens * 1e6, usd_reserved=reserved / tokens * 1e6, busy=tuple(busy), link_busy=link_busy,
        link_bytes=link_bytes, memory=tuple(map(float, problem.memory(placement))),
    )  # fmt: skip


def verify(problem: Problem, placement: Any) -> Placement:
    """Hold a placement to the problem. Raises PlacementError for a wrong shape, mesh or pin, InfeasibleError for what does not fit."""
    if not isinstance(placement, Placement):
        raise PlacementError(f"a policy returned {type(placement).__name__}, not a Placement", where="policy",
                             mend="return problem.placement(array of mesh numbers)")  # fmt: skip
    mesh = np.asarray(placement.mesh)
    if mesh.shape != (len(problem),):
        raise PlacementError(f"the placement has {mesh.size} entries, the problem {len(problem)} nodes", where="placement",
                             mend="give one mesh number for each node, in the problem's order")  # fmt: skip
    foreign = [n for n in range(len(problem)) if any(not 0 <= m < len(problem.meshes) for m in placement.of(n))]
    if foreign or set(placement.also) - set(range(len(problem))):
        n = foreign[0] if foreign else max(placement.also)
        raise PlacementError(f"node {n} is placed on mesh {mesh[n] if n < len(problem) else '?'}, which this problem does not have",
                             where=f"node {n} ({problem.names[n] if n < len(problem) else 'foreign'})",
                             mend=f"mesh numbers run from 0 to {len(problem.meshes) - 1}: {', '.join(problem.meshes)}")  # fmt: skip
    if wrong := [n for n, m in problem.pins.items() if m not in placement.of(n)]:
        raise PlacementError(f"node {wrong[0]} is pinned to {problem.meshes[problem.pins[wrong[0]]]} and placed elsewhere",
                             where=problem.names[wrong[0]], mend="keep pinned nodes on their mesh")  # fmt: skip
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
    return placement


def pose(
    phases: Phases, cluster: Cluster, *, objective: str = "e2e", level: Literal["block", "op"] = "block",
    trips: int | None = None, pins: Mapping[str, str] | None = None,
) -> Problem:  # fmt: skip
    """Make the placement problem of a tagged program on a cluster.

    objective: one of OBJECTIVES. level: "block" or "op". trips: for loops whose structure does not tell how often they run.
    pins: node name -> mesh name. Raises NameUnknownError, WorkError.
    """
    if objective not in OBJECTIVES:
        raise NameUnknownError.among("objective", objective, OBJECTIVES)
    graph, weights = phases.program.graph, is_weight(phases.program)
    loop = phases.token_loop
    runs = loop_trips(loop, graph, trips) if loop is not None else 0
    works = work(graph, weights=weights, trips=trips)
    blocks = coarsen(phases, level=level, most=min(m.capacity for m in cluster.meshes) / 16)
    priced: dict[tuple[str, int], tuple[Layout, dict[int, Cost]]] = {}
    for m in cluster.meshes:
        if (m.device.name, m.count) not in priced:
            split = layout(graph, m.count)
            priced[m.device.name, m.count] = (split, costs(graph, works, split, m, trips))
    by_kind = [priced[m.device.name, m.count] for m in cluster.meshes]
    flowing, lying = flows(blocks, phases, runs)
    node_costs = _node_costs(blocks, [table for _, table in by_kind])
    names = _unique([b.scope or b.phase for b in blocks])
    a, b, money = _links(cluster)
    return Problem(
        names=names, phase=tuple(b.phase for b in blocks), region=tuple(b.region for b in blocks),
        meshes=tuple(m.name for m in cluster.meshes), kinds=tuple(m.device.name for m in cluster.meshes),
        seconds=np.array([[c.seconds for c in row] for row in node_costs]).reshape(len(blocks), len(cluster.meshes)),
        times=np.array([runs if b.region != "top" else 1 for b in blocks], np.int64), flows=tuple(flowing), residents=tuple(lying),
        resident=np.array([[_copies(split, r.value) * r.nbytes for split, _ in by_kind] for r in lying]).reshape(len(lying), len(by_kind)),
        activation=_activations(blocks, phases, [split for split, _ in by_kind]), capacity=np.array([m.capacity for m in cluster.meshes]),
        alpha=a, beta=b, price=np.array([m.price for m in cluster.meshes]), link_price=money,
        workload=Workload(batch=phases.batch, trips=runs), objective=objective,
        pins=_pins(pins or {}, names, [m.name for m in cluster.meshes]), blocks=blocks,
        works=_node_works(blocks, works), costs=node_costs, phases=phases, cluster=cluster,
    )  # fmt: skip


def _copies(split: Layout, value: Value) -> float:
    return split.copies(value[0])


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return tuple(out)


def _pins(pins: Mapping[str, str], names: Sequence[str], meshes: Sequence[str]) -> dict[int, int]:
    for node, mesh in pins.items():
        if node not in names:
            raise NameUnknownError.among("node", node, names, where="pins")
        if mesh not in meshes:
            raise NameUnknownError.among("mesh", mesh, meshes, where="pins")
    return {names.index(node): list(meshes).index(mesh) for node, mesh in pins.items()}


def _node_costs(blocks: Sequence[Block], tables: Sequence[Mapping[int, Cost]]) -> tuple[tuple[Cost, ...], ...]:
    unique = {id(t): t for t in tables}
    rows: dict[int, list[Cost]] = {}
    for key, table in unique.items():
        parts = {part: by_block(blocks, lambda op, part=part, table=table: getattr(table[op.id], part))  # type: ignore[misc]
                 for part in ("compute", "memory", "link", "latency", "busy")}  # fmt: skip
        rows[key] = [Cost(**{k: v[n] for k, v in parts.items()}) for n in range(len(blocks))]
    return tuple(tuple(rows[id(t)][n] for t in tables) for n in range(len(blocks)))


def _node_works(blocks: Sequence[Block], works: Mapping[int, Work]) -> tuple[Work, ...]:
    out = []
    for b in blocks:
        total = Work()
        for op, span in b.items:
            share = 1.0 if span is None or op.loop is None or op.loop.trips is None else (span[1] - span[0]) / op.loop.trips
            total = total + (works[op.id] if share == 1.0 else works[op.id] * share)
        out.append(total)
    return tuple(out)


def _links(cluster: Cluster) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = len(cluster.meshes)
    index = {m.name: i for i, m in enumerate(cluster.meshes)}
    alpha, beta, money = np.zeros((n, n)), np.zeros((n, n)), np.zeros((n, n))
    for e in cluster.edges:
        i, j = index[e.src], index[e.dst]
        alpha[i, j], beta[i, j], money[i, j] = float(e.link.alpha), e.beta, float(e.link.price)
    np.fill_diagonal(beta, np.inf)
    return alpha, beta, money


def _activations(blocks: Sequence[Block], phases: Phases, splits: Sequence[Layout]) -> np.ndarray:
    """Bytes [n, m] of the largest op of each block: its activations in and out, at their splits."""
    tensors = region_graph(phases, "top").tensors
    table = np.zeros((len(blocks), len(splits)))
    columns = {id(s): [m for m, other in enumerate(splits) if other is s] for s in splits}
    for s in {id(s): s for s in splits}.values():
        for n, b in enumerate(blocks):
            most = 0.0
            for op, span in b.items:
                moving = [t for t in (*op.inputs, *op.outputs) if tensors[t].role is Role.ACTIVATION]
                alive = sum(tensors[t].nbytes * s.copies(t) for t in moving)
                most = max(most, alive if span is None else alive / 2)
            table[n, columns[id(s)]] = most
    return table
