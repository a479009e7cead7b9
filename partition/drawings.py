"""What the pictures of a plan show, as numbers: memory over time, every block under its roof, blocks and flows by mesh. The report draws them as SVG, `figures.py` for papers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from partition.phases import Phase
from partition.timeline import Timeline

if TYPE_CHECKING:
    from partition.pipeline import Plan

COLOURS = ("#3b7dd8", "#e07b39", "#f2b661", "#c0392b", "#7a52c7", "#2a9d8f", "#8a6d3b", "#5f6b7a")
"""Of meshes, in turn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A block under its mesh's roof: flops per byte and flops/s that it reaches; what it is."""

    name: str
    phase: str
    mesh: int
    intensity: float
    reached: float


def memory(timeline: Timeline) -> dict[str, list[tuple[float, float]]]:
    """Mesh -> steps (seconds, bytes from then on): weights from the start, the state of a request from when the mesh first works with it, and the block that runs."""
    p, placed = timeline.problem, timeline.placement
    on = [set(placed.of(n)) for n in range(len(p))]
    first: dict[tuple[int, int], float] = {}
    events: list[dict[float, float]] = [{0.0: 0.0} for _ in p.meshes]
    for s in timeline.slots:
        if s.node is not None and s.to is None:
            first[s.node, s.mesh] = min(first.get((s.node, s.mesh), s.start), s.start)
            for at, sign in ((s.start, 1.0), (s.end, -1.0)):
                events[s.mesh][at] = events[s.mesh].get(at, 0.0) + sign * float(p.activation[s.node, s.mesh])
    for r, resident in enumerate(p.residents):
        for m in {m for n in resident.blocks for m in on[n]}:
            begun = 0.0 if resident.kind == "weights" else min((first[n, m] for n in resident.blocks if (n, m) in first), default=0.0)
            events[m][begun] = events[m].get(begun, 0.0) + float(p.resident[r, m])
    found = {}
    for m, name in enumerate(p.meshes):
        held, steps = 0.0, []
        for at in sorted(events[m]):
            held += events[m][at]
            steps.append((at, max(held, 0.0)))
        if any(bytes_ > 0 for _, bytes_ in steps):
            found[name] = [*steps, (max((s.end for s in timeline.slots), default=0.0), steps[-1][1])]
    return found


def roofline(plan: Plan) -> tuple[list[Point], dict[str, tuple[float, float]]]:
    """(blocks with arithmetic and bytes, machine -> (flops/s, bytes/s) of all devices of one of its meshes at bfloat16, or at its best). Empty where a problem does not say its work."""
    p, points, roofs = plan.problem, list[Point](), dict[str, tuple[float, float]]()
    for n in range(len(p)) if p.works else ():
        m, w = int(plan.placement.mesh[n]), p.works[n]
        flops, bytes_, took = float(w.total_flops), float(w.bytes), float(p.seconds[n, m])
        if flops > 0 and bytes_ > 0 and took > 0:
            points.append(Point(name=p.names[n], phase=str(p.phase[n]), mesh=m, intensity=flops / bytes_, reached=flops / took))
    for m in sorted({x.mesh for x in points}) if p.cluster is not None else ():
        mesh = p.cluster.meshes[m]  # type: ignore[union-attr]
        peak = mesh.device.peak
        roofs[mesh.device.name] = (float(peak.get("bfloat16") or max(peak.values(), key=float)) * mesh.count, float(mesh.device.memory.bandwidth) * mesh.count)
    return points, roofs


def lanes(plan: Plan) -> tuple[list[tuple[float, int, str, str]], list[tuple[int, int, str, float]]]:
    """(blocks as (place from 0 to 1, mesh, phase, name), flows between meshes as (block, block, kind, bytes a request))."""
    p, placed = plan.problem, plan.placement.mesh
    phases = [ph for ph in (Phase.PREFILL, Phase.BOTH, Phase.DECODE, Phase.NONE) if p.nodes(ph)]
    order = [n for ph in phases for n in p.nodes(ph)]
    at = {n: (i + 0.5) / len(order) for i, n in enumerate(order)}
    blocks = [(at[n], int(placed[n]), str(p.phase[n]), p.names[n]) for n in range(len(p))]
    flows = [(f.src, d, f.kind, float(f.nbytes * f.times)) for f in p.flows for d in f.dst if placed[f.src] != placed[d]]
    return blocks, flows


def formulas(plan: Plan) -> list[tuple[str, str, Sequence[tuple[str, Any]]]]:
    """How each headline number comes about: (name, formula, its terms with their values in SI units)."""
    p, e = plan.problem, plan.estimate
    busy = [(f"busy of {p.meshes[m]} [s]", b) for m, b in enumerate(e.busy) if b > 0]
    tokens = p.workload.tokens
    prefill, decode = ([(f"{phase} on {p.meshes[m]} [s]", sum(float(p.seconds[n, m]) * (1 if phase == Phase.DECODE else float(p.times[n])) for n in p.nodes(phase) if plan.placement.mesh[n] == m))
                        for m in sorted({int(plan.placement.mesh[n]) for n in p.nodes(phase)})] for phase in (Phase.PREFILL, Phase.DECODE))  # fmt: skip
    links = [(f"{p.meshes[a]} to {p.meshes[b]}, all transfers [s]", t) for (a, b), t in sorted(e.link_busy.items())]
    price = [(f"price of {p.meshes[m]} [$/s]", float(p.price[m])) for m, b in enumerate(e.busy) if b > 0]
    power = [(f"power of {p.meshes[m]} [W]", float(p.power[m])) for m, b in enumerate(e.busy) if b > 0]
    held = [(f"occupied: {p.meshes[m]} [s]", b) for m, b in enumerate(e.occupied) if b > 0]
    return [
        ("TTFT", "all blocks of prefill, one after the other where they wait for each other, and the part of the hand-off that they do not hide", [*prefill, ("exposed [s]", e.exposed)]),
        ("TPOT", "one trip of the token loop in its steady state: its blocks, and the transfers between them", [*decode, *links]),
        ("end to end", "TTFT, then a trip for each further token", [("TTFT [s]", e.ttft), ("TPOT [s]", e.tpot), ("trips", p.workload.trips)]),
        ("$ per million tokens", "each machine paid for the time that it is occupied by a request, and what links charge, over the tokens of a request, times 10^6", [*held, *price, ("tokens", tokens)]),
        ("J per token", "power of each machine while it is occupied, over the tokens of a request", [*held, *power, ("tokens", tokens)]),
        ("tokens/s, pipelined", "tokens of a request over the seconds that the busiest mesh or link is kept from others", [*busy, *held, ("tokens", tokens)]),
    ]  # fmt: skip


def explorer(plan: Plan) -> dict[str, Any]:
    """The blocks as a graph for Google's Model Explorer: layers by phase and mesh, flows as edges, costs as attributes."""
    p, placed = plan.problem, plan.placement.mesh
    ins: dict[int, list[dict[str, str]]] = {}
    for f in p.flows:
        for d in f.dst:
            ins.setdefault(d, []).append({"sourceNodeId": str(f.src), "sourceNodeOutputId": f.kind})
    nodes = []
    for n in range(len(p)):
        m = int(placed[n])
        said = {"phase": p.phase[n], "mesh": p.meshes[m], "device": p.kinds[m], "seconds of one run": f"{float(p.seconds[n, m]):.4g}", "runs a request": str(int(p.times[n]))}
        if p.works:
            said |= {"flops": f"{float(p.works[n].total_flops):.4g}", "bytes": f"{float(p.works[n].bytes):.4g}"}
        *within, label = p.names[n].split("/")
        nodes.append({"id": str(n), "label": label, "namespace": "/".join([str(p.phase[n]), p.meshes[m], *within]), "incomingEdges": ins.get(n, []), "attrs": [{"key": k, "value": str(v)} for k, v in said.items()]})
    return {"label": f"{plan.title} on {plan.cluster}", "graphs": [{"id": "plan", "nodes": nodes}]}


def overlays(plan: Plan) -> dict[str, dict[str, Any]]:
    """What Model Explorer lays over that graph: seconds of a request as a gradient, and the mesh of each block as a colour. File name -> node data."""
    p, placed = plan.problem, plan.placement.mesh
    took = {str(n): {"value": float(p.seconds[n, placed[n]] * p.times[n])} for n in range(len(p))}
    meshes = {str(n): {"value": p.meshes[int(placed[n])], "bgColor": COLOURS[int(placed[n]) % len(COLOURS)]} for n in range(len(p))}
    return {
        "explorer_seconds.json": {"plan": {"results": took, "gradient": [{"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#e07b39"}]}},
        "explorer_meshes.json": {"plan": {"results": meshes}},
    }
