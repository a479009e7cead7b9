"""What a check costs beside what it cannot do without: compiling the uncut model and each distinct stage once, and running the uncut model.

Two layers of the tiny Llama, cut at random over five meshes (its decode body too), and by phase; everything cold, in processes of their own.
"""

from __future__ import annotations

import json
import sys
import time

from benchmarks import Bar, child


def bars(rounds: int = 5) -> list[Bar]:
    """Seconds of a check over seconds of what it needs at least."""
    rows = []
    for policy in ("phase_split", "random"):
        got = [child("checking", policy, n % 2) for n in range(rounds)]
        note = f"uncut compiled {got[0]['uncut']:.2f} s, run {got[0]['run']:.3f} s; {got[0]['unique']} distinct stages compiled {got[0]['stages']:.2f} s; check {got[0]['check']:.2f} s"
        rows.append(Bar.of(f"check of two layers, {policy}: check / (compile uncut and stages, run uncut)", [g["check"] / (g["uncut"] + g["run"] + g["stages"]) for g in got], "<=", 3.0, note))
    return rows


def _main(policy: str, first: int) -> None:
    import dataclasses

    import jax

    import partition as pt
    from models import llama

    pt.host_devices(12)
    cfg = dataclasses.replace(llama.CONFIGS["tiny"], layers=2)
    fn, args = llama.generation(cfg, batch=1, prompt=16, new_tokens=8, seed=0)
    program = pt.trace(fn, *args)
    stages = pt.cut(program, pt.place(pt.pose(pt.tag(program), pt.cluster("trn2_efa_4cs3")), policy))
    found = {}

    def check() -> None:
        start = time.perf_counter()
        pt.check(stages, *args)
        found["check"] = time.perf_counter() - start

    def parts() -> None:
        start = time.perf_counter()
        whole = pt.uncut(program)
        whole(*args)
        found["uncut"] = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(whole(*args))
        found["run"] = time.perf_counter() - start
        found["uncut"] -= found["run"]
        start = time.perf_counter()
        found["unique"] = pt.prepare(stages).unique
        found["stages"] = time.perf_counter() - start

    jax.jit(lambda x: x + 1)(1.0)  # the backend is up
    for part in (check, parts) if first else (parts, check):
        part()
        jax.clear_caches()
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
