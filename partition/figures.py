"""Figures of a plan for papers, at column width, as SVG and PNG, each with the table behind it as CSV. The report's own drawings need no matplotlib; these do."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partition import drawings
from partition.arguments import checked
from partition.errors import OutputError
from partition.outputs import write
from partition.timeline import schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from partition.pipeline import Plan

COLUMN = 3.35
"""Width of a column [inch]."""
PHASES = {"prefill": "#3b7dd8", "decode": "#e07b39", "handoff": "#7a52c7", "other": "#2a9d8f"}


@checked
def draw(plan: Plan, folder: str | Path) -> Path:
    """Write timeline, memory and roofline into a folder, each as SVG, PNG and CSV, all or none. Raises OutputError where matplotlib is not installed or nothing can be written."""
    try:
        import matplotlib
    except ImportError:
        raise OutputError("figures need matplotlib, which is not installed", where="draw(plan, folder)", mend="pip install 'partition-planner[viz]'") from None
    made: dict[str, str | bytes] = {}
    with matplotlib.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "partition", "axes.linewidth": 0.6}):
        for name, drawn in (("timeline", _timeline), ("memory", _memory), ("roofline", _roofline)):
            figure, header, rows = drawn(plan)
            for kind in ("svg", "png"):
                held = io.BytesIO()
                figure.savefig(held, format=kind, dpi=300, metadata={"Date": None} if kind == "svg" else None)
                made[f"{name}.{kind}"] = held.getvalue()
            text = io.StringIO()
            csv.writer(text).writerows([header, *rows])
            made[f"{name}.csv"] = text.getvalue()
    return write(folder, made)


_Drawn = tuple["Figure", Sequence[str], list[Sequence[Any]]]


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    return figure, figure.add_subplot()


def _timeline(plan: Plan) -> _Drawn:
    from matplotlib.patches import Patch

    timeline, p = schedule(plan.problem, plan.placement), plan.problem
    names = list(dict.fromkeys(p.meshes[s.mesh] if s.to is None else f"{p.meshes[s.mesh]} → {p.meshes[s.to]}" for s in sorted(timeline.slots, key=lambda s: (s.to is not None, s.mesh, s.to or 0))))
    figure, axes = _axes(0.7 + 0.16 * len(names))
    rows: list[Sequence[Any]] = []
    for s in timeline.slots:
        lane = p.meshes[s.mesh] if s.to is None else f"{p.meshes[s.mesh]} → {p.meshes[s.to]}"
        kind = str(p.phase[s.node]) if s.node is not None else p.flows[s.flow or 0].kind
        axes.barh(names.index(lane), s.end - s.start, left=s.start, height=0.7, color=PHASES.get(kind, PHASES["other"]), edgecolor=PHASES.get(kind, PHASES["other"]), linewidth=0.3)
        rows.append((lane, kind, p.names[s.node] if s.node is not None else "", s.start, s.end))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("s since the request came (prefill, three tokens)")
    there = dict.fromkeys(kind if kind in PHASES else "other" for _, kind, _, start, end in rows if end > start)
    axes.legend(handles=[Patch(color=PHASES[kind], label={"handoff": "KV hand-off", "other": "other"}.get(kind, kind)) for kind in PHASES if kind in there],
                loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, handlelength=1, columnspacing=1)  # fmt: skip
    return figure, ("lane", "kind", "block", "start [s]", "end [s]"), rows


def _memory(plan: Plan) -> _Drawn:
    found = drawings.memory(schedule(plan.problem, plan.placement))
    figure, axes = _axes(2.0)
    rows: list[Sequence[Any]] = []
    for name, steps in found.items():
        m = plan.problem.meshes.index(name)
        cap = float(plan.problem.capacity[m])
        axes.step([at for at, _ in steps], [100 * held / cap for _, held in steps], where="post", linewidth=1, color=drawings.COLOURS[m % len(drawings.COLOURS)], label=name)
        rows += [(name, at, held, cap) for at, held in steps]
    axes.set(xlabel="s since the request came", ylabel="memory held [% of usable]", ylim=(0, 105))
    axes.legend(frameon=False, ncols=2)
    return figure, ("mesh", "from [s]", "held [B]", "usable [B]"), rows


def _roofline(plan: Plan) -> _Drawn:
    points, roofs = drawings.roofline(plan)
    figure, axes = _axes(2.2)
    for phase in ("prefill", "decode"):
        mine = [p for p in points if p.phase == phase]
        axes.scatter([p.intensity for p in mine], [p.reached for p in mine], s=6, color=PHASES[phase], label=phase, linewidth=0, alpha=0.7)
    if points:
        low, high = min(p.intensity for p in points) / 3, max([p.intensity for p in points] + [f / b for f, b in roofs.values()]) * 3
        for name, (peak, bandwidth) in roofs.items():
            axes.plot([low, peak / bandwidth, high], [low * bandwidth, peak, peak], color="0.2", linewidth=0.8)
            axes.annotate(name, (peak / bandwidth, peak), xytext=(2, 2), textcoords="offset points")
        axes.legend(frameon=False)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="flops/s reached")
    return figure, ("block", "phase", "mesh", "flops per byte", "flops/s"), [(p.name, p.phase, plan.problem.meshes[p.mesh], p.intensity, p.reached) for p in points]
