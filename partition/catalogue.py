"""Devices and clusters as tables and JSON, for `partition devices`; needs neither JAX nor NetworkX."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from partition.hardware import Cluster, Device
from partition.profiles import package
from partition.shipped import OURS, ROOT
from partition.tables import table
from partition.units import dollars, flops, rate, size


def devices_text(devices: Sequence[Device]) -> str:
    """A line a device."""
    lines = [
        (d.name, package(d.name, "device"), d.title, f"{flops(float(d.peak['bfloat16']))}/s" if "bfloat16" in d.peak else "", size(float(d.memory.capacity)),
         rate(float(d.memory.bandwidth)), f"{dollars(float(d.price) * 3600)}/h ({d.price.kind})") for d in devices
    ]  # fmt: skip
    return table("Devices", ("device", "from", "what", "bf16 peak", "memory", "bandwidth", "price"), lines)


def clusters_text(clusters: Sequence[Cluster]) -> str:
    """A line a cluster."""
    lines = [(c.name, package(c.name, "cluster"), c.title, ", ".join(f"{n} x {k}" for k, n in _counts(c).items()), f"{dollars(sum(m.price for m in c.meshes) * 3600)}/h") for c in clusters]
    return table("Clusters", ("cluster", "from", "what", "meshes", "price"), lines)


def own_policies() -> list[dict[str, str]]:
    """The policies of the package: each file of `policies/` is one, whose function bears its name. Read, not imported: they are slower to import than to read."""
    rows = []
    for path in sorted((ROOT / "partition" / "policies").glob("[!_]*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == path.stem:
                rows.append({"name": path.stem, "package": OURS, "about": (ast.get_docstring(node) or "").splitlines()[0]})
    return rows


def plugins(kind: str) -> list[dict[str, str]]:
    """What entry points register as "models" or "policies": name, the package that it comes from, what it is."""
    found = importlib.metadata.entry_points(group=f"partition.{kind}")
    return [{"name": p.name, "package": p.dist.name if p.dist is not None else p.module, "about": p.value} for p in sorted(found, key=lambda p: p.name)]


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
