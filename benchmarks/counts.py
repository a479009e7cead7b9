"""Our counts against others': operations against XLA's of the lowered program, fused bytes against `jax.experimental.roofline`.

The programs decode one token after a prompt with unrolled layers, so that no loop runs more than once: both count a body once. XLA counts
an experts' contraction as if every row met every expert, and roofline has no rule for it: it is counted as XLA does for the first, and such
models are left out of the second. Roofline reads and writes the scores of an attention, which our rules keep on chip: they are counted here
as roofline does. Only the bytes of ops that both have rules for are held against each other.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import jax

from benchmarks import Bar
from partition.graph import Graph
from partition.phases import is_weight
from partition.program import Program, trace
from partition.work import work

MODELS = {
    "llama": ("smollm2-135m", "llama-3.2-1b", "qwen3-0.6b"), "gemma": ("gemma-2-2b",), "gpt2": ("gpt2", "gpt2-xl"), "mamba": ("mamba-130m", "mamba-2.8b"),
    "t5": ("t5-base", "flan-t5-xl"), "mixtral": ("mixtral-8x7b",), "deepseek": ("deepseek-v2-lite",),
}  # fmt: skip
RULED = ("dot_general",)
"""What both count fused bytes of: roofline has those of contractions alone, all else (a convolution, a gather) it counts unfused only."""


def counted(program: Program) -> tuple[float, float, bool]:
    """(operations as XLA counts them, fused bytes, whether experts are among them)."""
    graph: Graph = program.graph
    works = work(graph, weights=is_weight(program))
    flops, dense = float(sum(works[op.id].total_flops for op in graph.ops)), 0.0
    for op in graph.walk():
        if op.primitive == "ragged_dot_general":
            dense += float(works[op.id].total_flops) * (graph.tensors[op.inputs[2]].shape[-1] - 1)
    untiled = work(graph, weights=frozenset(t.id for t in graph.tensors))  # a contraction with a weight is never tiled
    moved = sum(float(untiled[op.id].bytes) for op in graph.walk() if op.primitive in RULED)
    return flops + dense, moved, dense > 0


def compare(family: str, name: str) -> tuple[float, float | None]:
    """(ours over XLA's operations, ours over roofline's bytes), each less one; None where roofline has no rules."""
    from jax.experimental import roofline

    fn, args = importlib.import_module(f"models.{family}").generation(name, batch=2, prompt=128, new_tokens=2)
    flops, moved, experts = counted(trace(fn, *args))
    theirs: dict[str, Any] = dict(jax.jit(fn).lower(*args).cost_analysis())
    logging.disable(logging.CRITICAL)  # a line for each primitive without a rule
    try:
        other = None if experts else float(roofline.roofline(fn)(*args)[1].hbm_bytes)
    finally:
        logging.disable(logging.NOTSET)
    return flops / theirs["flops"] - 1, None if other is None else moved / other - 1


def bars() -> list[Bar]:
    """The worst model of each bar, and every model's error in the note."""
    found = {name: compare(family, name) for family, names in MODELS.items() for name in names}
    told = [", ".join(f"{name} {x[i]:+.2%}" for name, x in found.items() if x[i] is not None) for i in (0, 1)]
    return [Bar.of("operations / XLA's, less one", [abs(x) for x, _ in found.values()], None, note=told[0]),
            Bar.of("the worst of them", [max(abs(x) for x, _ in found.values())], "<=", 0.005),
            Bar.of("fused bytes / roofline's, less one", [abs(x) for _, x in found.values() if x is not None], None, note=told[1]),
            Bar.of("the worst of them", [max(abs(x) for _, x in found.values() if x is not None)], "<=", 0.03)]  # fmt: skip
