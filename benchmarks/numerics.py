"""What the arithmetic of the announced machines would do to SmolLM2-135M on a fixed text, by phase, and what a narrower wire costs and saves: of a program in
float32, and of the one in bfloat16 that is deployed.

The prompt is the first half of the text, and decode reads the second half: the perplexity is that of the second half. With random weights, where the
checkpoint is not installed, the numbers mean nothing, and are told as such.
"""

from __future__ import annotations

import dataclasses
import sys

import numpy as np

import partition as pt
from benchmarks import Bar
from benchmarks.decode import weights
from partition import numerics
from partition.hardware import Kind, Precision

TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. However little known the
feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding families, that
he is considered the rightful property of some one or other of their daughters."""
"""Jane Austen, Pride and Prejudice (1813), which is in the public domain."""

OTHERS = {"as the profile says": None, "cbfloat16": Precision(kind=Kind.ASSUMED, source="tried", multiply="cbfloat16", result="cbfloat16"), "float8 operands": Precision(kind=Kind.ASSUMED, source="tried", multiply="float8_e4m3")}  # fmt: skip
"""Other arithmetics of the decode machine that are published or spoken of."""


def ids() -> np.ndarray:
    """The text as tokens [1, n] of SmolLM2; of its bytes where the tokenizer is not installed."""
    from models.checkpoint import gguf_tokenizer, open_gguf, packaged_gguf

    if (file := packaged_gguf()) is None:
        return np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)[None]
    return np.array(gguf_tokenizer(open_gguf(file)).encode(TEXT).ids, np.int32)[None]


def bars() -> list[Bar]:
    """Perplexity and tokens by arithmetic."""
    from models.llama import generation

    text = ids()
    half, rows = text.shape[1] // 2, list[Bar]()
    for dtype in ("float32", "bfloat16"):
        options, what = weights(dtype)
        fn, args = generation(**options, prompt=text[:, :half], new_tokens=text.shape[1] - half, logits=True, text=text[:, half:])
        program = pt.trace(fn, *args)
        phases = pt.tag(program)
        for name, precision in OTHERS.items():
            print(f"numerics: {dtype}, {name}", file=sys.stderr, flush=True)
            machines = pt.cluster("trn2_efa_cs3")
            meshes = machines.meshes if precision is None else tuple(dataclasses.replace(m, device=dataclasses.replace(m.device, precision=precision if m.device.name == "cs3" else None)) for m in machines.meshes)
            problem = pt.pose(phases, dataclasses.replace(machines, meshes=meshes), sharding="tensor")
            stages = pt.cut(program, pt.place(problem, "phase_split"))
            found = numerics.effects(stages, *args, wires=("bfloat16", "float8_e4m3") if precision is None else (), text=text[:, half:])
            for e in found if precision is None else found[1:]:
                note = f"{what}; {100 * e.logits.top1:.1f} % of likeliest tokens kept, KL {e.logits.kl[0]:.2g}, {e.crossed:,} B cross" if e.logits is not None else what
                rows.append(Bar.of(f"perplexity in {dtype}, {e.name}" + ("" if precision is None else f" ({name})"), [e.perplexity or float("nan")], None, note=note))
    return rows
