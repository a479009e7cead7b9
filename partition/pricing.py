"""What the nodes of a problem cost on the meshes of a cluster: how each mesh splits the program, the price of every op, what servers add.

Sizes may be numbers, or arrays of numbers that are costed at once (see `scaling`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partition.coarsen import Block, share
from partition.collectives import collective
from partition.costs import Cost, Request, total, written
from partition.costs import costs as op_costs
from partition.graph import Graph, Op
from partition.hardware import Cluster, Mesh
from partition.phases import Phase, Phases
from partition.sharding import Layout, layout
from partition.work import Work, loop_trips

Table = tuple[tuple[Cost, ...], ...]
"""Costs [n][m]: of one run of node n on mesh m."""


_FOR_WEIGHTS = 0.9
"""The share of a device's usable memory that a split may fill with weights; the rest is left to caches and activations (assumed)."""


def _machine(mesh: Mesh) -> tuple[object, ...]:
    """What meshes that split and cost alike have in common."""
    return mesh.device.name, mesh.count, mesh.fabric and mesh.fabric.name


def layouts(phases: Phases, works: Mapping[int, Work], cluster: Cluster, trips: int | None = None, *, tensor: bool = False) -> list[Layout]:
    """How each mesh of a cluster splits a program, by a search with the mesh's own times (see `sharding`); alike meshes alike."""
    graph, made = phases.program.graph, dict[tuple[object, ...], Layout]()
    for m in cluster.meshes:
        if (key := _machine(m)) not in made and m.ways == 1:
            made[key] = layout(graph, 1)
        elif key not in made:
            alone = op_costs(graph, works, layout(graph, 1), m, trips, layers_on(phases, cluster, m))
            wait = functools.partial(collective, fabric=m.fabric)
            made[key] = layout(graph, m.ways, {i: c.busy for i, c in alone.items()}, wait, capacity=_FOR_WEIGHTS * m.capacity / m.ways, tensor=tensor)
    return [made[_machine(m)] for m in cluster.meshes]


def layers_on(phases: Phases, cluster: Cluster, mesh: Mesh) -> float:
    """How many layers share a wafer: those of the model, over as few of the wafers there are as hold its weights; what stands idle beside them changes nothing. 1 where a device has no regions.

    A placement that spreads over more wafers is priced as if each had as many layers: its larger regions are not counted.
    """
    if mesh.device.region is None:
        return 1.0
    layers = max(phases.anatomy.layers.counts.values(), default=1)
    alike = [m for m in cluster.meshes if m.device.name == mesh.device.name]
    room = _FOR_WEIGHTS * float(mesh.capacity) / mesh.count
    needed = max(1, math.ceil(phases.program.weight_bytes / room)) if room > 0 else 1
    return max(1.0, layers / min(needed, sum(m.count for m in alike)))


def depth(phases: Phases, cluster: Cluster, mesh: Mesh) -> float:
    """How many batches a mesh works on at once: as many as it has layers side by side. 1 where a device has no regions."""
    region, layers = mesh.device.region, layers_on(phases, cluster, mesh)
    places = float("inf") if region is None or region.side is None else max(1.0, float(region.cores) // float(region.side) ** 2)
    return max(1.0, mesh.count * min(layers, places)) if region is not None else 1.0


def layer_of(phases: Phases, blocks: Sequence[Block]) -> np.ndarray:
    """The layer of each block, int64 [n]: that of most of its ops; -1 of one that is in none."""
    found = []
    for b in blocks:
        counts: Counter[int] = Counter()
        for op, span in b.items:
            of = phases.anatomy.layers.of.get(op.id, ())
            counts.update(of if span is None else of[span[0] : span[1]])
        found.append(counts.most_common(1)[0][0] if counts else -1)
    return np.array(found, np.int64)


def request(phases: Phases, trips: int | None) -> Request:
    """What a tagged program asks of machines beyond the shapes of its ops."""
    by = {p: frozenset(i for i, phase in phases.of.items() if phase is p) for p in (Phase.PREFILL, Phase.DECODE)}
    graph, loop = phases.program.graph, phases.token_loop
    runs = loop_trips(loop, graph, trips) if loop is not None else 0
    return Request(prefill=by[Phase.PREFILL], decode=by[Phase.DECODE], batch=int(phases.batch or 1), written=written(graph, by[Phase.PREFILL]), trips=runs)


def node_costs(
    phases: Phases, blocks: Sequence[Block], works: Mapping[int, Work], splits: Sequence[Layout], cluster: Cluster, trips: int | None, *,
    graph: Graph | None = None, batch: Any = None, alike: Mapping[int, object] | None = None,
) -> Table:  # fmt: skip
    """Costs of all nodes on all meshes.

    graph, batch, alike: the same graph at other sizes, its batch, and what its ops that cost the same have in common (see `costs`).
    """
    at, asked = phases.program.graph if graph is None else graph, request(phases, trips)
    if graph is not None:
        asked = dataclasses.replace(asked, batch=batch, written=written(graph, asked.prefill))
    priced: dict[tuple[object, ...], dict[int, Cost]] = {}
    for m, split in zip(cluster.meshes, splits, strict=True):
        if (key := _machine(m)) not in priced:
            if graph is not None:
                waits = {i: tuple(_resized(c, phases.program.op[i], phases.program.graph, graph) for c in cs) for i, cs in split.collectives.items()}
                split = dataclasses.replace(split, collectives=waits)
            priced[key] = op_costs(at, works, split, m, trips, layers_on(phases, cluster, m), request=asked, alike=alike)
    return _served(_by_node(blocks, [priced[_machine(m)] for m in cluster.meshes], alike), blocks, cluster)


def _served(found: Table, blocks: Sequence[Block], cluster: Cluster) -> Table:
    """With what servers add to a request and to a step, where they do: shared out evenly over the blocks of prefill, and over those of a trip of decode, so that a phase pays it
    once where it lies on one mesh, a part of it where a part lies there, and no search escapes it by moving a block."""
    rows = [list(row) for row in found]
    decode = [n for n, b in enumerate(blocks) if b.phase is Phase.DECODE]
    payers = {"start": [n for n, b in enumerate(blocks) if b.phase is Phase.PREFILL], "step": [n for n in decode if blocks[n].region == "body"] or decode}
    for field, nodes in payers.items():
        for m, mesh in enumerate(cluster.meshes):
            if (chip := mesh.device.systolic) is not None:
                for n in nodes:
                    rows[n][m] = rows[n][m] + Cost(latency=float(getattr(chip, field)) / len(nodes))
    return tuple(map(tuple, rows))


def _by_node(blocks: Sequence[Block], tables: Sequence[Mapping[int, Cost]], alike: Mapping[int, object] | None) -> Table:
    """The ops' costs summed over blocks; blocks of ops that cost the same are summed once."""
    rows: dict[int, list[Cost]] = {}
    for table in tables:
        if id(table) not in rows:
            known: dict[object, Cost] = {}
            rows[id(table)] = []
            for n, b in enumerate(blocks):
                key: object = n if alike is None else tuple((alike.get(op.id, op.id), share(op, span)) for op, span in b.items)
                known[key] = known[key] if key in known else total((table[op.id], share(op, span)) for op, span in b.items)
                rows[id(table)].append(known[key])
    return tuple(tuple(rows[id(t)][n] for t in tables) for n in range(len(blocks)))


def _resized(wait: tuple[str, float, int], op: Op, was: Graph, now: Graph) -> tuple[str, Any, int]:
    """A collective of an op at other sizes: its bytes are those of one of the op's tensors, or a whole part of them."""
    kind, nbytes, devices = wait
    parts = {t: was.tensors[t].nbytes / nbytes for t in (*op.outputs, *op.inputs) if nbytes and was.tensors[t].nbytes >= nbytes}
    t = min(parts, key=lambda t: (parts[t] % 1.0 > 1e-9, parts[t]), default=None)
    return (kind, nbytes, devices) if t is None else (kind, now.tensors[t].nbytes / parts[t], devices)
