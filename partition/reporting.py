"""Plans and verdicts for people and programs: text tables, HTML, a Perfetto trace, JUnit, numbered dumps."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

from partition import drawings
from partition.arguments import checked
from partition.evaluation import under_way
from partition.phases import Phase
from partition.sharding import parallelism
from partition.tables import table
from partition.timeline import Timeline, schedule
from partition.units import dollars, flops, outcome, rate, seconds, shown, size
from partition.work import Work

if TYPE_CHECKING:
    from partition.explanation import Answer
    from partition.pipeline import Plan
    from partition.problem import Problem
    from partition.swings import Swing
    from partition.verdict import Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One stage of a plan: nodes of one phase that follow each other on one mesh. flops, bytes, seconds: of one run; times: a request."""

    stage: str
    mesh: str
    ops: int
    flops: float
    bytes: float
    seconds: float
    times: int
    bound_by: str


def rows(plan: Plan) -> list[Row]:
    """The stage table of a plan."""
    if plan.table:
        return [Row(**row) for row in plan.table]
    p, mesh = plan.problem, plan.placement.mesh
    runs: list[list[int]] = []
    for n in range(len(p)):
        key = (int(mesh[n]), p.phase[n], p.region[n] != "top")
        if runs and key == (int(mesh[runs[-1][0]]), p.phase[runs[-1][0]], p.region[runs[-1][0]] != "top"):
            runs[-1].append(n)
        else:
            runs.append([n])
    found = []
    for i, run in enumerate(runs):
        m = int(mesh[run[0]])
        work = sum((p.works[n] for n in run), Work()) if p.works else Work()
        limits: dict[str, float] = {}
        for n in run if p.costs else []:
            c = p.costs[n][m]
            parts = {"compute": c.compute, "memory": c.memory} if c.busy else {}
            for name, value in {**parts, "link": c.link, "latency": c.latency}.items():
                limits[name] = limits.get(name, 0.0) + value
        found.append(Row(
            stage=f"{i} {p.phase[run[0]]}" + (_extent(p, run) if len(runs) > 4 else ""), mesh=p.meshes[m], ops=sum(len(p.blocks[n].items) for n in run) if p.blocks else 0,
            flops=float(work.total_flops), bytes=float(work.bytes), seconds=float(p.seconds[run, m].sum()), times=int(p.times[run[0]]),
            bound_by=max(limits, key=lambda k: limits[k]) if any(limits.values()) else "",
        ))  # fmt: skip
    return found


def _extent(p: Problem, run: list[int]) -> str:
    """From which node to which a stage goes, without the phase in their names."""
    first, last = (p.names[n].removeprefix(f"{p.phase[n]}/") for n in (run[0], run[-1]))
    return f" {first}" + (f" .. {last}" if last != first else "")


def stage_table(plan: Plan, most: int = 30) -> str:
    """Stage, mesh, ops, flops, bytes, time, bound by."""
    found = rows(plan)
    lines = [(r.stage, r.mesh, str(r.ops), flops(r.flops), size(r.bytes), seconds(r.seconds) + (f" x {r.times}" if r.times > 1 else ""), r.bound_by)
             for r in found[:most]]  # fmt: skip
    title = "Stages" + (f" (first {most} of {len(found)})" if len(found) > most else "")
    return table(title, ("stage", "mesh", "ops", "flops", "bytes", "time", "bound by"), lines)


def link_table(plan: Plan) -> str:
    """Links with bytes, time, and what of the hand-off prefill hides."""
    found = links(plan)
    if not found:
        return "Links: nothing crosses"
    lines = [(f"{a} -> {b}", size(n), seconds(t), rate(beta), how) for a, b, n, t, beta, how in found]
    shown = table("Links (a request)", ("link", "bytes", "time", "bandwidth", "overlapped with prefill"), lines)
    return shown + (f"\nprefill hides all of the hand-off but {seconds(plan.estimate.exposed)}" if any(how != "no" for *_, how in found) else "")


def links(plan: Plan) -> list[tuple[str, str, float, float, float, str]]:
    """(from, to, bytes a request, seconds, bytes per second, what is overlapped) of every link that is used."""
    p, e = plan.problem, plan.estimate
    handoff = {(int(plan.placement.mesh[f.src]), int(plan.placement.mesh[d])) for f in p.flows if f.kind == "handoff" for d in f.dst}
    return [(p.meshes[a], p.meshes[b], n, e.link_busy[a, b], float(p.beta[a, b]), "hand-off, as layers finish" if (a, b) in handoff else "no")
            for (a, b), n in sorted(e.link_bytes.items())]  # fmt: skip


def memory_table(plan: Plan) -> str:
    """Memory against capacity for each mesh that is used."""
    p = plan.problem
    lines = [(name, size(used), size(float(cap)), f"{100 * used / float(cap):.1f} %")
             for name, used, cap in zip(p.meshes, plan.estimate.memory, p.capacity, strict=True) if used > 0]  # fmt: skip
    return table("Memory", ("mesh", "held", "usable", "full"), lines)


def sharding_text(plan: Plan) -> str:
    """How the contractions with weights are split inside each mesh that is used, a line a mesh."""
    p = plan.problem
    if p.phases is None or p.cluster is None:
        return plan.saved_splits
    lines = []
    for m, mesh in enumerate(p.cluster.meshes):
        if mesh.ways > 1 and plan.estimate.busy[m] > 0:
            kinds = parallelism(p.layouts[m], p.phases.program.graph)
            lines.append(f"{mesh.name} splits {mesh.ways} ways: " + ", ".join(f"{n} contractions with weights {kind}" for kind, n in sorted(kinds.items())))
    lines += [f"{p.meshes[m]} works on {most:.0f} batches at once, as many as {'it has layers' if most >= depth else 'its memory holds'}"
              for m, (most, depth) in enumerate(zip(under_way(p, plan.placement), p.depth, strict=True)) if depth > 1 and plan.estimate.busy[m] > 0]  # fmt: skip
    return "\n".join(lines)


def headline(plan: Plan) -> str:
    """What a plan gives, in a line, and how far it may be from the best."""
    e = plan.estimate
    return (
        f"{plan.title} on {plan.cluster} by {plan.policy}: TTFT {seconds(e.ttft)}, TPOT {seconds(e.tpot)}, end to end {seconds(e.e2e)}, "
        f"{e.throughput:,.0f} tokens/s, {dollars(e.usd_per_mtok)} per million tokens (rate-matched fleet; {dollars(e.usd_reserved)} if reserved), {e.joules_per_token:,.3g} J per token\n"
        f"at most {100 * plan.gap:.1f} % from the best {plan.problem.objective} ({plan.bound.proof})"
    )


def band_text(plan: Plan) -> str:
    """What the plan gives when the numbers it rests on lie at the ends of their bands."""
    if len(plan.ends) != 2:
        return ""
    (a, b), parts = plan.ends, []
    for name, field, show in (("TTFT", "ttft", seconds), ("TPOT", "tpot", seconds), ("end to end", "e2e", seconds), ("per Mtok", "usd_per_mtok", dollars)):
        parts.append(f"{name} {show(a[field])} .. {show(b[field])}")
    return f"\nwith all numbers at the better or the worse end of their bands: {', '.join(parts)}"


def text(plan: Plan) -> str:
    """A plan on one screen."""
    own = f"\n{len(plan.problem.measured)} of {plan.problem.seconds.size} times of nodes on meshes are measured, not modelled" if plan.problem.measured else ""
    return "\n\n".join([headline(plan) + own + band_text(plan), *filter(None, [stage_table(plan), sharding_text(plan), link_table(plan), memory_table(plan)])])


def alternatives_table(answer: Answer) -> str:
    """What every alternative would give."""
    lines = []
    for a in answer.alternatives:
        e = a.estimate
        lines.append((a.name, *([a.why_not[:60], "", "", ""] if e is None else
                                [seconds(e.ttft), seconds(e.tpot), seconds(e.e2e), dollars(e.usd_per_mtok)])))  # fmt: skip
    return table("Alternatives", ("placement", "TTFT", "TPOT", "end to end", "$ per Mtok"), lines)


def trace_events(plan: Plan) -> dict[str, Any]:
    """The timeline as Chrome trace JSON (open it in ui.perfetto.dev): a track a mesh, a track a link; one of the loop's trips is one slice set.

    Times in the file are microseconds, as the format asks.
    """
    timeline, p = schedule(plan.problem, plan.placement), plan.problem
    tracks: dict[tuple[int, int | None], int] = {}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": f"{plan.title} on {plan.cluster}"}}]
    for slot in timeline.slots:
        key = (slot.mesh, slot.to)
        if key not in tracks:
            tracks[key] = len(tracks) + 2  # track ids differ from the process id, or viewers merge them
            name = p.meshes[slot.mesh] if slot.to is None else f"{p.meshes[slot.mesh]} -> {p.meshes[slot.to]}"
            events.append({"ph": "M", "pid": 1, "tid": tracks[key], "name": "thread_name", "args": {"name": name}})
        if slot.node is not None:
            label, more = p.names[slot.node], dict[str, Any](phase=str(p.phase[slot.node]))
        else:
            flow = p.flows[slot.flow or 0]
            label, more = f"{flow.kind} {size(flow.nbytes)}", {"bytes": flow.nbytes, "from": p.names[flow.src]}
        end = slot.end - (float(p.alpha[slot.mesh, slot.to]) if slot.to is not None else 0.0)
        start_ns, end_ns = round(slot.start * 1e9), round(end * 1e9)  # viewers count whole nanoseconds: round ends, not lengths
        if end_ns > start_ns:
            events.append({"ph": "X", "pid": 1, "tid": tracks[key], "name": label, "ts": start_ns / 1e3, "dur": (end_ns - start_ns) / 1e3,
                           "args": more | ({"trip": slot.trip} if slot.trip >= 0 else {})})  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _bars(timeline: Timeline) -> dict[str, Any]:
    """Tracks of the timeline as shares of its length, for the drawing in the report; neighbours of one kind are one bar."""
    p = timeline.problem
    length = max((s.end for s in timeline.slots), default=1.0)
    tracks: dict[str, list[list[Any]]] = {}
    for s in timeline.slots:
        name = p.meshes[s.mesh] if s.to is None else f"{p.meshes[s.mesh]} → {p.meshes[s.to]}"
        kind = str(p.phase[s.node]) if s.node is not None else p.flows[s.flow or 0].kind
        kind += f" {s.trip}" if s.trip >= 0 else ""
        bars = tracks.setdefault(name, [])
        if bars and bars[-1][2] == kind and s.start - bars[-1][1] < length / 500:
            bars[-1][1] = max(bars[-1][1], s.end)
        else:
            bars.append([s.start, s.end, kind])
    shown = {name: [(100 * a / length, max(100 * (b - a) / length, 0.15), kind, seconds(b - a)) for a, b, kind in bars] for name, bars in tracks.items()}
    return {"tracks": shown, "length": seconds(length)}


def _pictures(plan: Plan, timeline: Timeline) -> dict[str, Any]:
    """Memory, roofline and blocks by mesh as coordinates of drawings 1,000 wide."""
    p, colours = plan.problem, drawings.COLOURS
    length = max((s.end for s in timeline.slots), default=0.0) or 1.0
    tracks = []
    for name, steps in drawings.memory(timeline).items():
        cap = float(p.capacity[p.meshes.index(name)])
        path = "".join(f"{'M' if i == 0 else 'H'}{1000 * at / length:.1f}{',' if i == 0 else 'V'}{40 - 40 * held / cap:.2f}" for i, (at, held) in enumerate(steps))
        tracks.append((name, path, size(max(h for _, h in steps)), size(cap), colours[p.meshes.index(name) % len(colours)]))
    points, roofs = drawings.roofline(plan)
    blocks, flows = drawings.lanes(plan)
    used = sorted({m for _, m, _, _ in blocks})
    row = {m: 26 + 44 * i for i, m in enumerate(used)}
    dots = [(1000 * x, row[m], phase, name) for x, m, phase, name in blocks]
    arcs = [(dots[a][0], dots[a][1], dots[b][0], dots[b][1], kind, size(n)) for a, b, kind, n in flows]
    return {"memory": tracks, "roofline": _roofline(points, roofs, p.meshes, colours), "dots": dots, "arcs": arcs, "rows": [(row[m], p.meshes[m], colours[m % len(colours)]) for m in used], "height": 44 * len(used) + 10}


def _roofline(points: Sequence[drawings.Point], roofs: Mapping[str, tuple[float, float]], meshes: Sequence[str], colours: Sequence[str]) -> dict[str, Any] | None:
    """Points and roofs as coordinates of a drawing 1,000 x 320 with logarithmic axes; None where there is nothing to draw."""
    if not points or not roofs:
        return None
    ridges = [f / b for f, b in roofs.values()]
    x0, x1 = (10.0 ** f(math.log10(v)) for f, v in ((math.floor, min([x.intensity for x in points] + ridges)), (math.ceil, max([x.intensity for x in points] + ridges))))
    y0, y1 = 10.0 ** math.floor(math.log10(min(x.reached for x in points))), 10.0 ** math.ceil(math.log10(max(f for f, _ in roofs.values())))

    def x(v: float) -> float:
        return 60 + 920 * math.log10(v / x0) / math.log10(x1 / x0)

    def y(v: float) -> float:
        return 290 - 280 * math.log10(v / y0) / math.log10(y1 / y0)

    lines = []
    for name, (peak, bandwidth) in roofs.items():
        low = max(x0, y0 / bandwidth)
        lines.append((f"M{x(low):.1f},{y(low * bandwidth):.1f}L{x(peak / bandwidth):.1f},{y(peak):.1f}H980", name, x(peak / bandwidth), y(peak)))
    ticks = [(x(10.0**k), f"10^{k}") for k in range(round(math.log10(x0)), round(math.log10(x1)) + 1)]
    marks = [(y(10.0**k), f"{flops(10.0**k)}/s") for k in range(round(math.log10(y0)), round(math.log10(y1)) + 1)]
    shown = [(x(p.intensity), y(p.reached), p.phase, f"{p.name} on {meshes[p.mesh]}: {p.intensity:.3g} flops/B, {flops(p.reached)}/s") for p in points]
    return {"lines": lines, "points": shown, "ticks": ticks, "marks": marks[:: max(1, len(marks) // 6)]}


@checked
def html(plan: Plan, swings: Sequence[Swing] = ()) -> str:
    """The report: one file that opens offline. swings: what `sensitivity` found."""
    import jinja2

    from partition.explanation import explain

    try:
        answer: Answer | None = explain(plan.problem)
    except Exception as error:
        answer, reason = None, str(error).splitlines()[0]
    else:
        reason = ""
    source = importlib.resources.files("partition").joinpath("report.html.j2").read_text()
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    p, e = plan.problem, plan.estimate
    sources = []
    if p.cluster is not None:
        for device in {m.device.name: m.device for m in p.cluster.meshes}.values():
            fields = {f"peak {k}": q for k, q in device.peak.items()} | {
                "memory": device.memory.capacity, "bandwidth": device.memory.bandwidth, "usable": device.memory.usable,
                "compute efficiency": device.compute_efficiency, "memory efficiency": device.memory_efficiency,
                "contraction latency": device.contraction_latency, "price": device.price}  # fmt: skip
            sources += [(device.name, k, f"{float(q):.4g}", str(q.kind), q.source) for k, q in fields.items()]
        for edge in {x.link.name: x for x in p.cluster.edges}.values():
            sources += [(edge.link.name, k, f"{float(q):.4g}", str(q.kind), q.source) for k, q in (("alpha", edge.link.alpha), ("beta", edge.link.beta), ("ingest", edge.ingest)) if q]  # fmt: skip
    timeline = schedule(p, plan.placement)
    return template.render(
        swings=swings[:12], pictures=_pictures(plan, timeline), formulas=drawings.formulas(plan), colours=drawings.COLOURS, plan=plan, e=e, p=p, headline=headline(plan), answer=answer, reason=reason, rows=rows(plan), bars=_bars(timeline),
        sources=sources, seconds=seconds, size=size, flops=flops, dollars=dollars, rate=rate, shown=shown, outcome=outcome, wafers=sorted({m.name for i, m in enumerate(p.cluster.meshes) if m.device.region is not None and e.busy[i] > 0}) if p.cluster is not None else [], Phase=Phase, zip=zip,
        links=links(plan),
    )  # fmt: skip


def notebook(plan: Plan) -> str:
    """A plan as a notebook shows it: its numbers, and its stages."""
    e = plan.estimate
    numbers = (("TTFT", seconds(e.ttft)), ("TPOT", seconds(e.tpot)), ("end to end", seconds(e.e2e)), ("tokens/s", f"{e.throughput:,.0f}"), ("$ per Mtok", dollars(e.usd_per_mtok)), ("at most from the best", f"{100 * plan.gap:.1f} %"))
    head = "".join(f"<td style='text-align:left'><small>{escape(k)}</small><br><b>{escape(v)}</b></td>" for k, v in numbers)
    body = "".join(f"<tr><td style='text-align:left'>{escape(r.stage)}</td><td>{escape(r.mesh)}</td><td>{flops(r.flops)}</td><td>{size(r.bytes)}</td><td>{seconds(r.seconds)}{f' × {r.times}' if r.times > 1 else ''}</td><td>{escape(r.bound_by)}</td></tr>" for r in rows(plan)[:20])
    columns = "".join(f"<th>{c}</th>" for c in ("stage", "mesh", "flops", "bytes", "time", "bound by"))
    return f"<p><b>{escape(plan.title)}</b> on {escape(plan.cluster)} by {escape(plan.policy)}</p><table><tr>{head}</tr></table><table><tr>{columns}</tr>{body}</table>"


def junit(name: str, verdict: Verdict) -> str:
    """A verdict as JUnit XML: one test case an output, one for the boundaries."""
    cases = []
    for d in verdict.outputs:
        inner = "" if d.equal or verdict.tie else f"<failure message={quoteattr(str(d))}>{escape(verdict.culprit or '')}</failure>"
        cases.append(f"<testcase classname={quoteattr(name)} name={quoteattr('output ' + d.name)}>{inner}</testcase>")
    bad = [d for d in verdict.boundaries if not d.equal and not verdict.tie]
    inner = f"<failure message={quoteattr(verdict.culprit or str(bad[0]))}/>" if bad else ""
    cases.append(f"<testcase classname={quoteattr(name)} name={quoteattr(f'{len(verdict.boundaries)} values at stage boundaries')}>{inner}</testcase>")
    failures = sum("<failure" in c for c in cases)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites><testsuite name={quoteattr(name)} tests="{len(cases)}" failures="{failures}" time="{verdict.seconds:.3f}">{"".join(cases)}</testsuite></testsuites>\n'


def dumps(plan: Plan) -> list[tuple[str, str]]:
    """Numbered files of every intermediate value of a plan."""
    p, phases = plan.problem, plan.problem.phases
    assert phases is not None
    program = phases.program
    ops = [f"{o.id:6d} {phases.of.get(o.id, Phase.NONE):8s} {o.primitive:24s} {list(o.inputs)} -> {list(o.outputs)}  {o.scope}" for o in program.graph.walk()]
    nodes = [f"{n:4d} {p.phase[n]:8s} {p.region[n]:5s} {p.names[n]:30s} " + " ".join(f"{p.meshes[m]}={seconds(float(p.seconds[n, m]))}" for m in range(min(len(p.meshes), 4))) for n in range(len(p))]
    flows = [f"{f.kind:8s} {size(f.nbytes):>9s} x{f.times:<5d} {p.names[f.src]} -> {', '.join(p.names[d] for d in f.dst[:6])}" for f in p.flows]
    placed = [f"{n:4d} {p.names[n]:30s} {', '.join(p.meshes[m] for m in plan.placement.of(n))}" for n in range(len(p))]
    slots = [f"{seconds(s.start):>9s} {seconds(s.end):>9s} {p.meshes[s.mesh]}{'' if s.to is None else ' -> ' + p.meshes[s.to]} {p.names[s.node] if s.node is not None else p.flows[s.flow or 0].kind}"
             for s in schedule(p, plan.placement).slots]  # fmt: skip
    return [
        ("00_jaxpr.txt", str(program.entry.jaxpr)), ("01_graph.txt", "\n".join([str(program), *ops])), ("02_phases.txt", str(phases)),
        ("03_problem.txt", "\n".join(nodes)), ("04_flows.txt", "\n".join(flows)), ("05_placement.txt", "\n".join(placed)),
        ("06_timeline.txt", "\n".join(slots)), ("07_stages.txt", str(plan.stages)),
        ("08_estimate.json", json.dumps({k: v for k, v in dataclasses.asdict(plan.estimate).items() if not k.startswith("link_")}, indent=1)),
    ]  # fmt: skip
