"""The placement problem as numbers: all that a policy sees. Nodes, seconds[n, m], flows, residents, capacities, links, prices.

`pose()` makes it from a tagged program and a cluster; `evaluation.py` says what a placement of it gives. No JAX here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from partition.arguments import checked
from partition.coarsen import Block, coarsen, share
from partition.costs import Cost
from partition.errors import NameUnknownError, PlacementError, TraceError, WorkError
from partition.flow import Flow, Resident, flows
from partition.graph import Graph, Role
from partition.hardware import Cluster
from partition.keeping import kept
from partition.measured import Times, put
from partition.phases import Phase, Phases, is_weight
from partition.pricing import depth, layer_of, layouts, node_costs
from partition.profiles import cluster as named
from partition.sharding import Layout
from partition.shrinking import carried
from partition.symbols import first
from partition.work import Work, loop_trips, work
from partition.workload import Workload

if TYPE_CHECKING:
    import networkx as nx

OBJECTIVES = ("ttft", "tpot", "e2e", "throughput", "usd_per_mtok", "joules_per_token")
"""What a policy may be asked for: times [s], money and energy [J] are minimised, throughput [tokens/s] is maximised."""

LIMITS = (*OBJECTIVES, "crossings")
"""What may be held to a limit: an objective, and how many values pass from mesh to mesh."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """mesh[n] is the mesh number of node n of `problem`; `also` gives the other meshes of a node that is replicated.

    bound: a score (as `Estimate.score`) that no placement beats, and its proof, where the policy found one.
    """

    mesh: np.ndarray
    also: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    problem: Problem | None = dataclasses.field(default=None, repr=False)
    bound: tuple[float, str] | None = None

    def of(self, node: int) -> tuple[int, ...]:
        """All meshes of a node."""
        return (int(self.mesh[node]), *self.also.get(node, ()))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """n nodes in topological order, m meshes.

    seconds [n, m]: one run of a node on a mesh. times [n]: runs a request. flows: what passes between nodes. resident [r, m]: bytes of
    each resident on each mesh, copies included. activation [n, m]: bytes alive while a node runs. capacity [m] B, alpha [m, m] s,
    beta [m, m] B/s (0: no link), wire [m, m] B/s that the ports of the
    sender take for all of its transfers on such links together, price [m] $/s, power [m] W, link_price [m, m] $/B. depth [m]: batches that
    a mesh works on at once where its layers lie side by side (1: they do not). layer [n]: which layer a node is of (-1: none).
    pins: node -> mesh. kinds: device of each mesh. limits: one of LIMITS -> what
    it may be at most (throughput: at least).
    ports [m] s/B: where given, values pass through a host and no links: a mesh waits so long for each byte of a value that it gives to others or
    takes in, once each (0: a processor of the host, on which every node runs by itself). together: nodes that must share a mesh. backward: nodes
    of a way back through the stages. contiguous: whether meshes must be stages in an order.
    rates [m, h] tokens/s: where given, nodes are layers in a row that several meshes may hold, and a mesh that holds h of them passes on so many tokens
    (0: it cannot hold them); lanes [m + 2, m + 2] tokens/s then says how many go from mesh to mesh, from the source (m) and to the sink (m + 1).
    measured: the (node, mesh) whose time is a user's own. layouts, op_works, times_given, trips: the split of each mesh, the work of each op, a user's
    own times, and how often loops run that do not tell, to cost it anew.
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
    wire: np.ndarray
    price: np.ndarray
    power: np.ndarray
    link_price: np.ndarray
    depth: np.ndarray
    layer: np.ndarray
    workload: Workload
    objective: str = "e2e"
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    pins: Mapping[int, int] = dataclasses.field(default_factory=dict)
    ports: np.ndarray | None = None
    together: tuple[tuple[int, ...], ...] = ()
    backward: frozenset[int] = frozenset()
    contiguous: bool = False
    rates: np.ndarray | None = None
    lanes: np.ndarray | None = None
    blocks: tuple[Block, ...] = ()
    works: tuple[Work, ...] = ()
    costs: tuple[tuple[Cost, ...], ...] = ()
    phases: Phases | None = dataclasses.field(default=None, repr=False)
    cluster: Cluster | None = dataclasses.field(default=None, repr=False)
    layouts: tuple[Layout, ...] = dataclasses.field(default=(), repr=False)
    op_works: Mapping[int, Work] = dataclasses.field(default_factory=dict, repr=False)
    trips: int | None = None
    times_given: Times = dataclasses.field(default_factory=dict, repr=False)
    measured: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # a value: no policy changes what the others are measured by
            if isinstance(array := getattr(self, field.name), np.ndarray):
                array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.names)

    def nodes(self, *wanted: Phase) -> list[int]:
        """Node numbers of these phases, in topological order."""
        return [n for n, p in enumerate(self.phase) if p in wanted]

    @functools.cached_property
    def dag(self) -> nx.DiGraph[int]:
        """Nodes and what must precede what within one trip (carries left out), with bytes on the edges."""
        import networkx as nx

        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from((n, {"name": self.names[n], "phase": str(self.phase[n])}) for n in range(len(self)))
        for f in self.flows:
            if f.kind != "carry":
                graph.add_edges_from(((f.src, d) for d in f.dst), bytes=f.nbytes)
        return graph

    @functools.cached_property
    def precedes(self) -> tuple[tuple[int, int], ...]:
        """Pairs of nodes of one phase of which the first must stand in no later stage. The way back goes through the stages in the opposite
        order, with the nodes that its own are paired with."""
        paired = {n for group in self.together if not self.backward.issuperset(group) for n in group}
        found = []
        for f in self.flows:
            for d in f.dst:
                if f.kind != "forward" or self.phase[f.src] is not self.phase[d] or self.region[f.src] != self.region[d]:
                    continue
                if f.src not in self.backward and d not in self.backward:
                    found.append((f.src, d))
                elif f.src in self.backward and d in self.backward and not {f.src, d} <= paired:
                    found.append((d, f.src))
        return tuple(found)

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

    @functools.cached_property
    def needs(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the numbers of the residents that it needs."""
        found: list[list[int]] = [[] for _ in self.names]
        for r, resident in enumerate(self.residents):
            for n in resident.blocks:
                found[n].append(r)
        return tuple(map(tuple, found))

    def placement(self, mesh: Sequence[int] | np.ndarray) -> Placement:
        """A placement from one mesh number a node. Pinned nodes go where they are pinned, and nodes that both phases need are
        replicated to every mesh that reads them."""
        given = np.asarray(mesh)
        if given.size and given.dtype.kind not in "iub":
            raise PlacementError(f"mesh numbers are whole numbers, the placement holds {given.dtype}", where="placement",
                                 mend=f"give the number of a mesh, 0 to {len(self.meshes) - 1}, for each node")  # fmt: skip
        array = given.astype(np.int64)
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

    @functools.cached_property
    def _users(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The nodes of all residents, where those of each begin, and which residents are weights."""
        counts = [len(r.blocks) for r in self.residents]
        starts = np.cumsum([0, *counts])[:-1].astype(np.int64)
        return np.array([n for r in self.residents for n in r.blocks], np.int64), starts, np.array([r.kind == "weights" for r in self.residents], bool)

    def held(self, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
        """Bytes on each mesh [m]: weights, each counted once a mesh; and what one batch holds, its state and the largest activation."""
        on = np.zeros((len(self), len(self.meshes)), bool)
        on[np.arange(len(self)), placement.mesh] = True
        for n, more in placement.also.items():
            on[n, list(more)] = True
        nodes, starts, weights = self._users
        used = np.where(np.logical_or.reduceat(on[nodes], starts, axis=0) if len(starts) else np.zeros((0, len(self.meshes)), bool), self.resident, 0.0)
        return used[weights].sum(axis=0), used[~weights].sum(axis=0) + np.where(on, self.activation, 0.0).max(axis=0, initial=0.0)

    def memory(self, placement: Placement) -> np.ndarray:
        """Bytes on each mesh [m]: residents (each counted once a mesh) and the largest activation of its nodes."""
        weights, batch = self.held(placement)
        total: np.ndarray = weights + batch
        return total


@checked
def pose(
    phases: Phases, cluster: str | Cluster, *, objective: str = "e2e", level: Literal["block", "op"] = "block",
    trips: int | None = None, pins: Mapping[str, str] | None = None, sharding: Literal["search", "tensor"] = "search",
    costs: Times | None = None, limits: Mapping[str, float] | None = None, keep: Sequence[str] = (), like: Problem | None = None,
) -> Problem:  # fmt: skip
    """Make the placement problem of a tagged program on a cluster (or the name of one).

    objective: one of OBJECTIVES. level: "block" or "op". trips: for loops whose structure does not tell how often they run.
    pins: node name -> mesh name. limits: one of LIMITS -> what it may be at most (throughput: at least). keep: what stays whole (see `keeping`). sharding: how ops are split inside a mesh, by a search for what is fastest if
    all of the request ran there, or ("tensor") along the weights over all devices, even where that is slower. costs: a user's own times, node name or pattern -> mesh or device -> seconds of one run, which
    take the place of the model's (see `measured`). like: the problem of a program of the same structure, whose nodes these are to be. Raises NameUnknownError, WorkError, ProfileError.
    """
    for what, told, known in (("objective", objective, OBJECTIVES), ("level", level, ("block", "op")), ("sharding", sharding, ("search", "tensor"))):
        if told not in known:
            raise NameUnknownError.among(what, str(told), known)
    hold_limits(limits or {}, where="pose(limits=...)")
    cluster = named(cluster) if isinstance(cluster, str) else cluster
    if trips is not None and trips < 0:
        raise WorkError(f"a loop cannot run {trips} times", where="pose(trips=...)", mend="give the number of trips, from 0")
    if sizes := phases.program.sizes:
        raise TraceError(f"the program's shapes hold the symbols {', '.join(sizes)}, a problem needs numbers", where=phases.program.entry.name,
                         mend=f"give them: program.at({', '.join(f'{n}=...' for n in sizes)})")  # fmt: skip
    graph, weights = phases.program.graph, is_weight(phases.program)
    loop = phases.token_loop
    runs = loop_trips(loop, graph, trips) if loop is not None else 0
    on_chip: set[int] = set()
    works = work(graph, weights=weights, trips=trips, on_chip=on_chip)
    blocks = coarsen(phases, level=level, most=min(m.capacity for m in cluster.meshes) / 16) if like is None else carried(like.blocks, like.phases, graph)
    splits = layouts(phases, works, cluster, trips, tensor=sharding == "tensor")
    flowing, lying = flows(blocks, phases, runs)
    names, layer = unique([b.scope or b.phase for b in blocks]), layer_of(phases, blocks)
    return Problem(
        **_numbers(phases, blocks, works, splits, cluster, trips, names, costs or {}),
        names=names, times_given=costs or {}, phase=tuple(b.phase for b in blocks), region=tuple(b.region for b in blocks),
        meshes=tuple(m.name for m in cluster.meshes), kinds=tuple(m.device.name for m in cluster.meshes),
        times=np.array([runs if b.region != "top" else 1 for b in blocks], np.int64), flows=tuple(flowing), residents=tuple(lying),
        resident=np.array([[split.copies(r.value[0]) * r.nbytes for split in splits] for r in lying]).reshape(len(lying), len(splits)),
        activation=_activations(blocks, phases, weights | on_chip, splits), layer=layer, capacity=np.array([m.capacity for m in cluster.meshes]),
        workload=Workload(batch=phases.batch, trips=runs), objective=objective, limits=dict(limits or {}),
        pins=_pins(pins or {}, names, [m.name for m in cluster.meshes]), together=kept(keep, blocks, layer, lying), contiguous="order" in keep, blocks=blocks,
        works=_node_works(blocks, works), phases=phases, layouts=tuple(splits), op_works=works, trips=trips,
    )  # fmt: skip


def hold_limits(limits: Mapping[str, float], *, where: str) -> None:
    """Raises NameUnknownError for a limit on what has none, PlacementError for a number that is none."""
    for name, most in limits.items():
        if name not in LIMITS:
            raise NameUnknownError.among("limit", name, LIMITS, where=where)
        if not isinstance(most, int | float) or not (most > 0 or (name == "crossings" and most == 0)) or (name == "crossings" and most % 1):
            raise PlacementError(f"{name} cannot be held to {most!r}", where=where, mend="give a whole number from 0" if name == "crossings" else "give a number above 0")


def on(problem: Problem, cluster: Cluster) -> Problem:
    """The same problem with the numbers of another cluster of as many meshes of as many devices: nodes, flows and capacities stay.

    Raises PlacementError for a problem that was loaded (it has no program) and for a cluster of other meshes.
    """
    phases, ways = problem.phases, [s.degree for s in problem.layouts]
    if phases is None:
        raise PlacementError("a loaded problem has no program to take the cost of", where="problem.on(...)", mend="pose the program again")
    if [m.ways for m in cluster.meshes] != ways:
        raise PlacementError("the cluster has other meshes than the problem", where=f"cluster {cluster.name!r}", mend=f"give one of {len(ways)} meshes over which ops are split {ways} ways")
    return dataclasses.replace(problem, **_numbers(phases, problem.blocks, problem.op_works, problem.layouts, cluster, problem.trips, problem.names, problem.times_given))


def _numbers(
    phases: Phases, blocks: Sequence[Block], works: Mapping[int, Work], splits: Sequence[Layout], cluster: Cluster, trips: int | None,
    names: Sequence[str], times: Times,
) -> dict[str, Any]:  # fmt: skip
    """What of a problem follows from the numbers of a cluster, but for what its meshes hold."""
    found, marked = put(node_costs(phases, blocks, works, splits, cluster, trips), names, cluster, times)
    alpha, beta, wire, money = _links(cluster)
    return {
        "seconds": np.array([[c.seconds for c in row] for row in found]).reshape(len(blocks), len(cluster.meshes)), "costs": found,
        "alpha": alpha, "beta": beta, "wire": wire, "price": np.array([m.price for m in cluster.meshes]), "power": np.array([m.power for m in cluster.meshes]), "link_price": money,
        "depth": np.array([depth(phases, cluster, m) for m in cluster.meshes]), "cluster": cluster, "measured": marked,
    }  # fmt: skip


def at_sizes(problem: Problem, graph: Graph, works: Mapping[int, Work], alike: Mapping[int, object]) -> Problem:
    """The same problem with the numbers of the same graph at other sizes, which may be arrays: then so are entries of seconds and resident; the first decides.

    alike: see `costs`. Nodes, splits, what decides between ways of costing, and activations stay.
    """
    phases, cluster, splits = problem.phases, problem.cluster, problem.layouts
    assert phases is not None and cluster is not None
    program = phases.program
    entry = dataclasses.replace(program.entry, lowered=dataclasses.replace(program.entry.lowered, graph=graph))
    there = dataclasses.replace(phases, program=dataclasses.replace(program, entries=(entry,)))
    batch = next((n for t in graph.inputs for n in graph.tensors[t].shape if graph.tensors[t].role is Role.INPUT and first(n) == phases.batch), phases.batch)
    table = node_costs(phases, problem.blocks, works, splits, cluster, problem.trips, graph=graph, batch=batch, alike=alike)
    found, _ = put(table, problem.names, cluster, problem.times_given)
    taken = {i: c.seconds for i, c in {id(c): c for row in found for c in row}.items()}
    flowing, lying = flows(problem.blocks, there, problem.workload.trips)
    held = [[(r.nbytes, split.copies(r.value[0])) for split in splits] for r in lying]
    copied = {(id(nbytes), n): nbytes * n for row in held for nbytes, n in row}  # rows of a stack are as large as each other
    return dataclasses.replace(
        problem, seconds=_objects([[taken[id(c)] for c in row] for row in found], len(splits)), flows=tuple(flowing),
        resident=_objects([[copied[id(nbytes), n] for nbytes, n in row] for row in held], len(splits)),
        residents=tuple(lying), workload=dataclasses.replace(problem.workload, batch=batch), phases=None, costs=(),
    )  # fmt: skip


def _objects(rows: Sequence[Sequence[Any]], width: int) -> np.ndarray:
    """An array [n, m] of numbers and of arrays of numbers."""
    made = np.empty((len(rows), width), object)
    for n, row in enumerate(rows):
        for m, x in enumerate(row):
            made[n, m] = x
    return made


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """Names with a number behind each that was there before."""
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


def _node_works(blocks: Sequence[Block], works: Mapping[int, Work]) -> tuple[Work, ...]:
    out = []
    for b in blocks:
        total = Work()
        for op, span in b.items:
            total = total + (works[op.id] if (part := share(op, span)) == 1.0 else works[op.id] * part)
        out.append(total)
    return tuple(out)


def _links(cluster: Cluster) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    n = len(cluster.meshes)
    index = {m.name: i for i, m in enumerate(cluster.meshes)}
    alpha, beta, wire, money = (np.zeros((n, n)) for _ in range(4))
    for e in cluster.edges:
        i, j = index[e.src], index[e.dst]
        alpha[i, j], beta[i, j], wire[i, j], money[i, j] = e.alpha, e.beta, float(e.link.beta), float(e.link.price)
    np.fill_diagonal(beta, np.inf)
    np.fill_diagonal(wire, np.inf)
    return alpha, beta, wire, money


def _activations(blocks: Sequence[Block], phases: Phases, apart: frozenset[int], splits: Sequence[Layout]) -> np.ndarray:
    """Bytes [n, m] of the largest op of each block: its activations in and out, at their splits, but for those `apart`."""
    tensors = phases.program.graph.tensors
    table = np.zeros((len(blocks), len(splits)))
    columns = {id(s): [m for m, other in enumerate(splits) if other is s] for s in splits}
    for s in {id(s): s for s in splits}.values():
        for n, b in enumerate(blocks):
            most = 0.0
            for op, span in b.items:
                moving = [t for t in (*op.inputs, *op.outputs) if tensors[t].role is Role.ACTIVATION and t not in apart]
                alive = sum(tensors[t].nbytes * s.copies(t) for t in moving)
                most = max(most, alive if span is None else alive / 2)
            table[n, columns[id(s)]] = most
    return table
