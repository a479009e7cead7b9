"""Planning Llama-3.1-405B: the passes against JAX's own cold trace, and shapes to plan in seconds and bytes.

bfloat16, batch 1, prompt 2048, 256 new tokens, layers unrolled, cluster trn2_efa_24cs3, policy phase_split. Every sample is a fresh
process, so that no cache of JAX is warm; processes that trace and processes that plan take turns.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks import Bar, child

MODEL, CLUSTER, POLICY = "llama-3.1-405b", "trn2_efa_24cs3", "phase_split"
REQUEST = {"batch": 1, "prompt": 2048, "new_tokens": 256, "dtype": "bfloat16", "layers": "unrolled"}
PASSES = ("tag", "pose", "place", "cut")


def bars(rounds: int = 5) -> list[Bar]:
    """Ratio of passes to trace by pairs, what each pass takes, wall time and peak memory of the whole."""
    traces, plans = [], []
    for _ in range(rounds):
        traces.append(child("planning", "trace")["trace"])
        plans.append(child("planning", "plan"))
    passes = [sum(p[name] for name in PASSES) for p in plans]
    ratios = [a / b for a, b in zip(passes, traces, strict=True)]
    with_read = [(a + p["read"]) / b for a, b, p in zip(passes, traces, plans, strict=True)]
    shapes_to_plan = [sum(p[k] for k in ("model", "traced", "read", "cluster", "tag", "pose", "place")) for p in plans]
    return [
        Bar.of("planning: (tag + pose + place + cut) / cold make_jaxpr", ratios, "<=", 1.0, "405B, fresh processes, in turn"),
        Bar.of("planning: the same with reading the graph", with_read, None),
        Bar.of("planning: cold jax.make_jaxpr [s]", traces, None),
        *(Bar.of(f"planning: {name} [s]", [p[name] for p in plans], None) for name in ("read", *PASSES)),
        Bar.of("planning: shapes to plan, wall [s]", shapes_to_plan, "<", 10.0, "model, trace, graph, tag, pose, place; without imports"),
        Bar.of("planning: imports [s]", [p["imports"] for p in plans], None),
        Bar.of("planning: peak RSS, up to the placement [GB]", [p["rss_plan"] for p in plans], "<", 1.5, "VmHWM of the planning process"),
        Bar.of("planning: peak RSS, cut included [GB]", [p["rss"] for p in plans], "<", 1.5),
    ]


def peak() -> float:
    """Peak resident memory [GB] of this process (VmHWM; ru_maxrss would count the parent's, which fork hands on)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def _main(what: str) -> None:
    taken: dict[str, float] = {}
    clock = [time.perf_counter()]

    def lap(name: str) -> None:
        now = time.perf_counter()
        taken[name], clock[0] = now - clock[0], now

    import jax

    import partition as pt
    from models.llama import generation

    _ = pt.trace, pt.tag, pt.pose, pt.place, pt.cut, pt.cluster
    lap("imports")
    fn, args = generation(MODEL, **REQUEST)  # type: ignore[arg-type]
    lap("model")
    if what == "trace":
        jax.make_jaxpr(fn)(*args)
        lap("trace")
    else:
        program = pt.trace(fn, *args)
        lap("read")
        taken["traced"], taken["read"] = program.seconds, taken["read"] - program.seconds
        machines = pt.cluster(CLUSTER)
        lap("cluster")
        phases = pt.tag(program)
        lap("tag")
        problem = pt.pose(phases, machines)
        lap("pose")
        placement = pt.place(problem, POLICY)
        lap("place")
        taken["rss_plan"] = peak()
        clock[0] = time.perf_counter()
        stages = pt.cut(program, placement)
        lap("cut")
        taken["stages"], taken["rss"] = len(stages.all), peak()
    print(json.dumps(taken))


if __name__ == "__main__":
    _main(sys.argv[1])
