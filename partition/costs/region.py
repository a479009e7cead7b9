"""A wafer: cycles of contractions on a square of cores (see `hardware.Region`). More cores make arithmetic faster, and the way over them longer."""

from __future__ import annotations

import math

from partition.costs.cost import Cost
from partition.hardware import Region
from partition.work import Work


def price(work: Work, region: Region, layers: float) -> Cost:
    """Cost of contractions; layers: how many share the wafer, which leaves each its part of the cores."""
    side = float(region.side) if region.side is not None else math.sqrt(float(region.cores) / max(layers, 1.0))
    arithmetic = float(region.mac) * work.macs / (float(region.lanes) * side * side) / float(region.clock)
    begin = work.contractions * (float(region.fixed) + float(region.hop) * side) / float(region.clock)
    ways = work.rows * (float(region.row_fixed) + float(region.row_hop) * side) / float(region.clock)
    return Cost(compute=arithmetic, latency=begin, link=ways, busy=arithmetic)
