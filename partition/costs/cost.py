"""What an op costs on a mesh, in seconds, by the limit that it hits; and the rate of a device's arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from partition.errors import WorkError
from partition.hardware import Device


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds of an op or a block on one mesh, by limit. `seconds` is what it takes; adds up."""

    compute: Any = 0.0
    memory: Any = 0.0
    link: Any = 0.0
    latency: Any = 0.0
    busy: Any = 0.0  # sum over ops of max(compute, memory)
    measured: Any = 0.0  # what a user's table says instead

    @property
    def seconds(self) -> Any:
        """Time on the mesh: arithmetic and memory overlap within an op, collectives and fixed times do not."""
        return self.busy + self.link + self.latency + self.measured

    @property
    def limit(self) -> str:
        """The largest part: "compute", "memory", "link", "latency" or "measured"."""
        parts = {"compute": self.compute, "memory": self.memory, "link": self.link, "latency": self.latency, "measured": self.measured}
        return max(parts, key=lambda k: parts[k])

    def __add__(self, other: Cost) -> Cost:
        return Cost(compute=self.compute + other.compute, memory=self.memory + other.memory, link=self.link + other.link,
                    latency=self.latency + other.latency, busy=self.busy + other.busy, measured=self.measured + other.measured)  # fmt: skip

    def __mul__(self, times: float) -> Cost:
        return Cost(compute=self.compute * times, memory=self.memory * times, link=self.link * times,
                    latency=self.latency * times, busy=self.busy * times, measured=self.measured * times)  # fmt: skip


def total(parts: Iterable[tuple[Cost, float]]) -> Cost:
    """The sum of costs, each so many times. What costs the same (is one value) is added once, for its numbers may be long arrays."""
    times: dict[int, float] = {}
    kept: dict[int, Cost] = {}
    for c, n in parts:
        kept[id(c)] = c
        times[id(c)] = times.get(id(c), 0.0) + n
    return sum((kept[i] if n == 1.0 else kept[i] * n for i, n in times.items()), Cost())


def peak(device: Device, dtype: str) -> float:
    """FLOP/s that large ops of a dtype reach on one device. Raises WorkError for a dtype that the profile does not list."""
    if dtype not in device.peak:
        raise WorkError(f"{device.title} has no {dtype} arithmetic in its profile", where=f"device profile {device.name!r}, [device.peak]",
                        mend=f"use one of {', '.join(device.peak)}, or add the peak with its source")  # fmt: skip
    return float(device.peak[dtype]) * float(device.compute_efficiency)
