"""(Work, Mesh) -> seconds, and which limit was hit: compute, memory, link or latency.

Never a bare roofline: a device's profile names how its contractions cost what they cost, on a wafer (`region.py`), a Neuron chip
(`systolic.py`) or a GPU (`streaming.py`); a device that names none has time = max(flops / rate, bytes / bandwidth) + a fixed time. Other
ops ride along at that roofline. Collectives come on top. Work is split the ways that `sharding` found; what cannot be split is repeated by
every device and gains nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from partition.collectives import collective
from partition.costs import region, streaming, systolic
from partition.costs.contraction import Contraction, attentions, contraction, scores
from partition.costs.cost import Cost, peak
from partition.graph import Graph, Op, bodies, roots
from partition.graph import weights as weights_of
from partition.hardware import Mesh
from partition.sharding import Layout
from partition.work import Work, copies, loop_trips

__all__ = ["Contraction", "Cost", "cost", "costs", "peak"]


def cost(
    work: Work, mesh: Mesh, *, ways: float = 1, collectives: Iterable[tuple[str, float, int]] = (), layers: float = 1.0, shape: Contraction | None = None,
) -> Cost:  # fmt: skip
    """Cost of one run of an op on a mesh, split `ways` ways, with the collectives (kind, bytes, devices) that it waits for.

    layers: how many layers share a wafer, which leaves each its part of the cores. shape: of a contraction, what one device has of it.
    """
    device = mesh.device
    link = sum(collective(kind, nbytes, n, mesh.fabric) for kind, nbytes, n in collectives)
    if device.region is not None and work.contractions:
        return _waiting(region.price(work, device.region, layers), link)
    if shape is not None and device.systolic is not None:
        return _waiting(systolic.price(work, shape, device, device.systolic, ways), link)
    if shape is not None and device.streaming is not None:
        return _waiting(streaming.price(shape, next(iter(work.flops)), device, device.streaming), link)
    parts = mesh.ways / mesh.count  # what one of those that split an op has of a device
    compute = sum(n / peak(device, dtype) for dtype, n in work.flops.items()) / ways * parts
    memory = work.bytes / (float(device.memory.bandwidth) * float(device.memory_efficiency)) / ways * parts
    return Cost(compute=compute, memory=memory, link=link, latency=work.contractions * float(device.contraction_latency), busy=np.maximum(compute, memory))


def _waiting(c: Cost, link: float) -> Cost:
    return dataclasses.replace(c, link=c.link + link) if link else c


def costs(
    graph: Graph, works: Mapping[int, Work], layout: Layout, mesh: Mesh, trips: int | None = None, layers: float = 1.0, *,
    prompts: tuple[Collection[int], int] = ((), 1),
) -> dict[int, Cost]:  # fmt: skip
    """Cost of every op of every level, by op id, for one run of its own level; a loop counts its trips, a cond its dearest branch.

    layers: how many layers share a device, where it is a wafer. prompts: the ops of prefill, and how many prompts they take together; a
    device that takes fewer at once runs them so many times.
    """
    found: dict[int, Cost] = {}
    memo: dict[tuple[object, ...], Cost] = {}
    shaped = mesh.device.systolic is not None or mesh.device.streaming is not None
    top = weights_of(graph)
    held = top | {inner for inner, root in roots(graph).items() if root in top}
    pairs = attentions(graph, held) if shaped else {}
    first = {op.id: op for op in graph.walk() if op.id in pairs} if pairs else {}
    chip, (early, batch) = mesh.device.systolic, prompts
    turns = max(1.0, batch / float(chip.prefill_batch)) if chip is not None else 1.0

    def level(g: Graph) -> Cost:
        total = [0.0] * 5
        for op in g.ops:
            found[op.id] = c = price(op, g)
            for i, part in enumerate((c.compute, c.memory, c.link, c.latency, c.busy)):
                total[i] += part
        return Cost(compute=total[0], memory=total[1], link=total[2], latency=total[3], busy=total[4])

    def shape(op: Op, g: Graph, ways: float) -> Contraction | None:
        if not shaped or op.primitive != "dot_general":
            return None
        if op.id in pairs:
            other, masked = pairs[op.id]
            begin = first[other]
            return scores(begin, g.tensors, held, layout.along.get(begin.id, ()), layout.ways.get(begin.id, 1), masked)
        return contraction(op, g.tensors, held, layout.along.get(op.id, ()), ways)

    def price(op: Op, g: Graph) -> Cost:
        inside = [level(b) for b in bodies(op)]
        if op.loop is not None:
            return sum(inside, Cost()) * loop_trips(op, g, trips)
        if inside:
            return max(inside, key=lambda c: c.seconds) * copies(op)
        work, ways, comm = works[op.id], layout.ways.get(op.id, 1), layout.collectives.get(op.id, ())
        made = shape(op, g, ways)
        again = turns if op.id in early else 1.0
        key = (tuple(work.flops.items()), work.bytes, work.contractions, work.rows, ways, comm, made, again)
        if key not in memo:
            if again > 1:
                weigh = sum(g.tensors[t].nbytes for t in op.inputs if t in held)
                work = dataclasses.replace(work * (1 / again), read=weigh + max(work.read - weigh, 0) / again, contractions=work.contractions)
                made = made and dataclasses.replace(made, rows=made.rows / again if not made.attention else made.rows, batch=made.batch / again if made.attention else made.batch)
                comm = tuple((kind, nbytes / again, n) for kind, nbytes, n in comm)
            memo[key] = cost(work, mesh, ways=ways, collectives=comm, layers=layers, shape=made) * again
        return memo[key]

    level(graph)
    return found
