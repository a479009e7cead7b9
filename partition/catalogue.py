"""Devices and clusters as tables and JSON, for `partition devices`; needs neither JAX nor NetworkX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from partition.hardware import Cluster, Device
from partition.tables import table
from partition.units import dollars, flops, rate, size


def devices_text(devices: Sequence[Device]) -> str:
    """A line a device."""
    lines = [
        (d.name, d.title, f"{flops(float(d.peak['bfloat16']))}/s" if "bfloat16" in d.peak else "", size(float(d.memory.capacity)),
         rate(float(d.memory.bandwidth)), f"{dollars(float(d.price) * 3600)}/h ({d.price.kind})") for d in devices
    ]  # fmt: skip
    return table("Devices", ("device", "what", "bf16 peak", "memory", "bandwidth", "price"), lines)


def clusters_text(clusters: Sequence[Cluster]) -> str:
    """A line a cluster."""
    lines = [(c.name, c.title, ", ".join(f"{n} x {k}" for k, n in _counts(c).items()), f"{dollars(sum(m.price for m in c.meshes) * 3600)}/h") for c in clusters]
    return table("Clusters", ("cluster", "what", "meshes", "price"), lines)


def _counts(cluster: Cluster) -> dict[str, int]:
    counts: dict[str, int] = {}
    for m in cluster.meshes:
        counts[f"{m.count} {m.device.name}"] = counts.get(f"{m.count} {m.device.name}", 0) + 1
    return counts


def devices_json(devices: Sequence[Device], clusters: Sequence[Cluster]) -> dict[str, Any]:
    """Every number with kind and source, in SI units."""
    return {
        "devices": [dataclasses.asdict(d) for d in devices],
        "clusters": [{"name": c.name, "title": c.title, "meshes": [m.name for m in c.meshes],
                      "links": [{"src": e.src, "dst": e.dst, "link": e.link.name, "alpha": float(e.link.alpha), "beta": e.beta} for e in c.edges]} for c in clusters],
    }  # fmt: skip
