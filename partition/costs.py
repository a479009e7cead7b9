"""(Work, Mesh) -> seconds, and which limit was hit: compute, memory, link or latency.

A roofline, and never a bare one: time = max(flops / rate, bytes / bandwidth) + collectives + fixed time of each contraction. Rates
are peak x efficiency x the ways the op is split; an op that cannot be split is repeated by every device and gains nothing. A wafer with
a `region` takes cycles for each contraction instead: more cores make its arithmetic faster, and the way over them longer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from partition.collectives import collective
from partition.errors import WorkError
from partition.graph import Graph, Op, bodies
from partition.hardware import Device, Mesh, Region
from partition.sharding import Layout
from partition.work import Work, copies, loop_trips


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds of an op or a block on one mesh, by limit. `seconds` is what it takes; adds up."""

    compute: float = 0.0
    memory: float = 0.0
    link: float = 0.0
    latency: float = 0.0
    busy: float = 0.0  # sum over ops of max(compute, memory)

    @property
    def seconds(self) -> float:
        """Time on the mesh: arithmetic and memory overlap within an op, collectives and fixed times do not."""
        return self.busy + self.link + self.latency

    @property
    def limit(self) -> str:
        """The largest part: "compute", "memory", "link" or "latency"."""
        parts = {"compute": self.compute, "memory": self.memory, "link": self.link, "latency": self.latency}
        return max(parts, key=lambda k: parts[k])

    def __add__(self, other: Cost) -> Cost:
        return Cost(compute=self.compute + other.compute, memory=self.memory + other.memory, link=self.link + other.link,
                    latency=self.latency + other.latency, busy=self.busy + other.busy)  # fmt: skip

    def __mul__(self, times: float) -> Cost:
        return Cost(compute=self.compute * times, memory=self.memory * times, link=self.link * times,
                    latency=self.latency * times, busy=self.busy * times)  # fmt: skip


def peak(device: Device, dtype: str) -> float:
    """FLOP/s that large ops of a dtype reach on one device. Raises WorkError for a dtype that the profile does not list."""
    if dtype not in device.peak:
        raise WorkError(f"{device.title} has no {dtype} arithmetic in its profile", where=f"device profile {device.name!r}, [device.peak]",
                        mend=f"use one of {', '.join(device.peak)}, or add the peak with its source")  # fmt: skip
    return float(device.peak[dtype]) * float(device.compute_efficiency)


def cost(work: Work, mesh: Mesh, *, ways: int = 1, collectives: Iterable[tuple[str, float, int]] = (), layers: float = 1.0) -> Cost:
    """Cost of one run of an op on a mesh, split `ways` ways, with the collectives (kind, bytes, devices) that it waits for.

    layers: how many layers share a wafer, which leaves each its part of the cores.
    """
    device = mesh.device
    if device.region is not None and work.contractions:
        return _on_region(work, device.region, layers)
    compute = sum(float(n) / peak(device, dtype) for dtype, n in work.flops.items()) / ways
    memory = float(work.bytes) / (float(device.memory.bandwidth) * float(device.memory_efficiency)) / ways
    link = sum(collective(kind, nbytes, n, mesh.fabric) for kind, nbytes, n in collectives)
    latency = float(work.contractions) * float(device.contraction_latency)
    return Cost(compute=compute, memory=memory, link=link, latency=latency, busy=max(compute, memory))


def _on_region(work: Work, region: Region, layers: float) -> Cost:
    """Cycles of contractions on a square of cores (see `Region`)."""
    side = float(region.side) if region.side is not None else math.sqrt(float(region.cores) / max(layers, 1.0))
    arithmetic = float(region.mac) * float(work.macs) / (float(region.lanes) * side * side) / float(region.clock)
    begin = float(work.contractions) * (float(region.fixed) + float(region.hop) * side) / float(region.clock)
    ways = float(work.rows) * (float(region.row_fixed) + float(region.row_hop) * side) / float(region.clock)
    return Cost(compute=arithmetic, latency=begin, link=ways, busy=arithmetic)


def costs(graph: Graph, works: Mapping[int, Work], layout: Layout, mesh: Mesh, trips: int | None = None, layers: float = 1.0) -> dict[int, Cost]:
    """Cost of every op of every level, by op id, for one run of its own level; a loop counts its trips, a cond its dearest branch.

    layers: how many layers share a device, where it is a wafer.
    """
    found: dict[int, Cost] = {}
    memo: dict[tuple[object, ...], Cost] = {}

    def level(g: Graph) -> Cost:
        total = [0.0] * 5
        for op in g.ops:
            found[op.id] = c = price(op, g)
            for i, part in enumerate((c.compute, c.memory, c.link, c.latency, c.busy)):
                total[i] += part
        return Cost(compute=total[0], memory=total[1], link=total[2], latency=total[3], busy=total[4])

    def price(op: Op, g: Graph) -> Cost:
        inside = [level(b) for b in bodies(op)]
        if op.loop is not None:
            return sum(inside, Cost()) * loop_trips(op, g, trips)
        if inside:
            return max(inside, key=lambda c: c.seconds) * copies(op)
        work, ways, comm = works[op.id], layout.ways.get(op.id, 1), layout.collectives.get(op.id, ())
        key = (tuple(work.flops.items()), work.bytes, work.contractions, work.rows, ways, comm)
        if key not in memo:
            memo[key] = cost(work, mesh, ways=ways, collectives=comm, layers=layers)
        return memo[key]

    level(graph)
    return found
