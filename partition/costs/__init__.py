"""(Work, Mesh) -> seconds, and which limit was hit: compute, memory, link or latency.

Never a bare roofline: a device's profile names how its contractions cost what they cost, on a wafer (`region.py`), a Neuron chip
(`systolic.py`) or a GPU (`streaming.py`); a device that names none has time = max(flops / rate, bytes / bandwidth) + a fixed time. Other
ops ride along at that roofline. Collectives come on top. Work is split the ways that `sharding` found; what cannot be split is repeated by
every device and gains nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from partition.collectives import collective
from partition.costs import region, streaming, systolic
from partition.costs.contraction import Contraction, attentions, contraction, derived, scores
from partition.costs.cost import Cost, peak, total
from partition.costs.request import Request, written
from partition.graph import Graph, Op, bodies, held
from partition.hardware import Mesh
from partition.sharding import Layout
from partition.symbols import first
from partition.work import Work, copies, loop_trips

__all__ = ["Contraction", "Cost", "Request", "cost", "costs", "peak", "total", "written"]


def cost(
    work: Work, mesh: Mesh, *, ways: float = 1, collectives: Iterable[tuple[str, float, int]] = (), layers: float = 1.0, shape: Contraction | None = None,
) -> Cost:  # fmt: skip
    """Cost of one run of an op on a mesh, split `ways` ways, with the collectives (kind, bytes, devices) that it waits for.

    layers: how many layers share a wafer, which leaves each its part of the cores. shape: of a contraction, what one device has of it.
    """
    device = mesh.device
    if device.region is not None and work.contractions:
        alone = region.price(work, device.region, layers)
    elif shape is not None and device.systolic is not None:
        alone = systolic.price(work, shape, device, device.systolic, ways)
    elif shape is not None and device.streaming is not None:
        alone = streaming.price(shape, next(iter(work.flops)), device, device.streaming)
    else:
        alone = _roofline(work, mesh, ways)
    return dataclasses.replace(alone, link=alone.link + sum(collective(kind, nbytes, n, mesh.fabric) for kind, nbytes, n in collectives))


def _roofline(work: Work, mesh: Mesh, ways: float) -> Cost:
    """Arithmetic or memory, whichever takes longer, and the fixed time of a contraction."""
    device, parts = mesh.device, mesh.ways / mesh.count  # parts: those that split an op, of one device
    compute = sum(n / peak(device, dtype) for dtype, n in work.flops.items()) / ways * parts
    memory = work.bytes / (float(device.memory.bandwidth) * float(device.memory_efficiency)) / ways * parts
    return Cost(compute=compute, memory=memory, latency=work.contractions * float(device.contraction_latency), busy=np.maximum(compute, memory))


def _turn(
    work: Work, made: Contraction | None, comm: Iterable[tuple[str, float, int]], weigh: Any, share: Any, padding: Any, turns: Any,
) -> tuple[Work, Contraction | None, tuple[tuple[str, float, int], ...]]:  # fmt: skip
    """What one turn of prefill has of an op: `share` of its tokens, padding among them, and all of the `weigh` bytes of its weights."""
    one = dataclasses.replace(work * share, read=weigh + (work.read - weigh) * share, contractions=work.contractions)
    if made is not None and made.attention:
        made = dataclasses.replace(made, batch=made.batch / turns, rows=made.rows * padding, columns=made.columns * padding)
    elif made is not None:
        made = dataclasses.replace(made, rows=made.rows * share)
    return one, made, tuple((kind, nbytes * share, n) for kind, nbytes, n in comm)


def costs(
    graph: Graph, works: Mapping[int, Work], layout: Layout, mesh: Mesh, trips: int | None = None, layers: float = 1.0, *,
    request: Request | None = None, alike: Mapping[int, object] | None = None,
) -> dict[int, Cost]:  # fmt: skip
    """Cost of every op of every level, by op id, for one run of its own level; a loop counts its trips, a cond its dearest branch.

    layers: how many layers share a device, where it is a wafer. request: what phases, buckets and caches do to ops (see `request.py`).
    alike: what ops that cost the same have in common, where their sizes are arrays: a value for each op id. The seconds of those stand in `busy` alone.
    """
    found: dict[int, Cost] = {}
    memo: dict[object, Cost] = {}
    shaped = mesh.device.systolic is not None or mesh.device.streaming is not None
    weights = derived(graph, held(graph))
    asked, chip = request or Request(), mesh.device.systolic
    pairs = attentions(graph, weights) if shaped or asked.written else {}
    batches, pads = asked.turns(chip), asked.padding(chip)
    halves = {op.id: op for op in graph.walk() if op.id in pairs} if pairs else {}

    def level(g: Graph) -> Cost:
        for op in g.ops:
            found[op.id] = price(op, g)
        return total((found[op.id], 1.0) for op in g.ops)

    def shape(op: Op, g: Graph, ways: float) -> Contraction | None:
        if op.id in pairs:
            begin = halves[pairs[op.id].first]
            return scores(begin, g.tensors, weights, layout.along.get(begin.id, ()), layout.ways.get(begin.id, 1), pairs[op.id])
        return contraction(op, g.tensors, weights, layout.along.get(op.id, ()), ways) if shaped and op.primitive == "dot_general" else None

    def price(op: Op, g: Graph) -> Cost:
        inside = [level(b) for b in bodies(op)]
        if op.loop is not None:
            return sum(inside, Cost()) * loop_trips(op, g, trips)
        if inside:
            return max(inside, key=lambda c: first(c.seconds)) * copies(op)
        if alike is not None and alike[op.id] in memo:
            return memo[alike[op.id]]
        work, ways, comm = works[op.id], layout.ways.get(op.id, 1), layout.collectives.get(op.id, ())
        made = shape(op, g, ways)
        turns, padding = (batches, pads) if op.id in asked.prefill else (1.0, 1.0)
        used = asked.used(op, made.columns, chip) if made is not None and made.attention else 1.0
        key = alike[op.id] if alike is not None else (tuple(work.flops.items()), work.bytes, work.contractions, work.rows, ways, comm, made, turns, padding, used)
        if key not in memo:
            if np.any(np.greater(turns, 1)) or np.any(np.greater(padding, 1)):
                weigh = sum(g.tensors[t].nbytes for t in op.inputs if t in weights)
                work, made, comm = _turn(work, made, comm, np.minimum(weigh, work.read), padding / turns, padding, turns)
            if np.any(np.less(used, 1)) and made is not None:
                work, made = dataclasses.replace(work * used, contractions=work.contractions), dataclasses.replace(made, columns=made.columns * used)
            once = cost(work, mesh, ways=ways, collectives=comm, layers=layers, shape=made if shaped else None)
            once = once if alike is None else Cost(busy=once.seconds)
            memo[key] = once if np.ndim(turns) == 0 and turns == 1 else once * turns
        return memo[key]

    level(graph)
    return found
