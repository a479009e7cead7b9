"""Placement: how near the bound the policies come and how soon, on Llama-3.1-405B and on the suite v1; many placements at once against one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import numpy as np

import partition as pt
from benchmarks import Bar
from models import llama
from partition import suites
from partition.batch import Batch
from partition.bounds import lower_bound
from partition.evaluation import evaluate
from partition.moves import Moves
from partition.pipeline import place
from partition.problem import Placement, Problem

COUNT = 10_000


def posed(name: str, cluster: str) -> tuple[Problem, float]:
    """(the problem of a request with 2,048 + 256 tokens, seconds that its first trace took)."""
    fn, args = llama.generation(name, prompt=2048, new_tokens=256)
    start = time.perf_counter()
    program = pt.trace(fn, *args)
    traced = time.perf_counter() - start
    return pt.pose(pt.tag(program), pt.cluster(cluster)), traced


def timed(work: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def moved(problem: Problem, start: Placement) -> Bar:
    """What moving one node costs, of what a whole evaluation does."""
    moves, rng = Moves(start), np.random.default_rng(0)
    turns = [(int(rng.integers(len(problem))), int(rng.integers(len(problem.meshes)))) for _ in range(500)]
    ratios = []
    for _ in range(5):
        whole = min(timed(lambda: evaluate(problem, start))[0] for _ in range(3))
        taken, _none = timed(lambda: [(moves.move(n, m), moves.score("throughput")) for n, m in turns])
        ratios.append(taken / len(turns) / whole)
    return Bar.of(f"one of {len(problem):,} nodes moved / a whole evaluation", ratios, "<=", 1 / 50, note="throughput; times to tokens are evaluated whole")


def thousands() -> list[Bar]:
    """Ten thousand nodes on one and on two kinds of machine."""
    gaps, seconds = [], []
    for made in (suites.chain(10_000, 1, (8,)), suites.chain(10_000, 1, (4, 4)), suites.layered(10_000, 1, (2, 2))):
        took, placement = timed(lambda made=made: place(made, "portfolio"))
        seconds.append(took)
        gaps.append(lower_bound(made).gap(evaluate(made, placement).score("throughput")))
    return [Bar.of("10,000 nodes: gap of portfolio", gaps, "<=", 0.05), Bar.of("10,000 nodes: its seconds", seconds, None)]


def bars() -> list[Bar]:
    """The largest model's gap and times, ten thousand placements, and the suite."""
    big, traced = posed("llama-3.1-405b", "trn2_efa_24cs3")
    quick, placement = timed(lambda: place(big, "phase_split"))
    best, found = timed(lambda: place(big, "portfolio"))
    proof, bound = timed(lambda: lower_bound(big))
    rows = [Bar.of("405B: gap of phase_split, end to end", [bound.gap(evaluate(big, placement).e2e)], "<=", 0.02), Bar.of("405B: its seconds / those of a cold trace", [quick / traced], "<=", 1 / 3),
            Bar.of("405B: gap of portfolio", [bound.gap(evaluate(big, found).e2e)], "<=", 0.01), Bar.of("405B: portfolio and proof [s]", [best + proof], "<=", 10.0, note="an absolute time: a guide")]  # fmt: skip
    problem, _ = posed("llama-3.1-70b", "trn2_efa_4cs3")
    rng, here = np.random.default_rng(0), place(problem, "phase_split")
    mesh = np.repeat(here.mesh[None, :], COUNT, axis=0)
    mesh[np.arange(COUNT), rng.integers(len(problem), size=COUNT)] = rng.integers(len(problem.meshes), size=COUNT)
    one = min(timed(lambda: evaluate(problem, here))[0] for _ in range(5))
    for objective, limit in (("e2e", 1.0), ("throughput", 1.0)):
        taken = [timed(lambda objective=objective: Batch(problem).scores(mesh, objective))[0] for _ in range(2)]
        rows.append(Bar.of(f"{COUNT:,} placements of {len(problem)} nodes at once, {objective} [s]", taken, "<=", limit, note=f"one by one {one * COUNT:.0f} s"))
    rows.append(moved(big, found))
    seconds, gaps = [], []
    for made in suites.suite("v1").values():
        took, placement = timed(lambda made=made: place(made, "portfolio"))
        seconds.append(took)
        gaps.append(lower_bound(made).gap(evaluate(made, placement).score("throughput")))
    exact = []
    for made in suites.suite("v1").values():
        held = dataclasses.replace(made, contiguous=True)
        with contextlib.suppress(pt.PartitionError):  # too many ideals
            exact.append(timed(lambda held=held: place(held, "ideal_dp"))[0])
    return [*rows, Bar.of("suite v1: seconds of portfolio, worst problem", [max(seconds)], "<=", 10.0, note="up to 1,000 nodes; an absolute time: a guide"),
            Bar.of("suite v1: gap of portfolio", gaps, None, note="against areas and minimum cuts"),
            *thousands(),
            Bar.of("suite v1: seconds of the proof of ordered stages", exact, None, note=f"{len(exact)} of {len(suites.SUITES['v1'])} problems; the others have too many ideals")]  # fmt: skip
